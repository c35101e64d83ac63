/* tandem-bench tokenizer. */
#pragma once
int bench_tokenizer(int argc, char **argv);
