/* tandem-bench engine. */
#pragma once
int bench_engine(int argc, char **argv);
