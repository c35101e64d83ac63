/* tandem-bench kernels. */
#pragma once
int bench_kernels(int argc, char **argv);
