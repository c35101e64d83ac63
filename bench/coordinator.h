/* tandem-bench coordinator: how many tokens per second pass through tandem-coordinator from a replica
 * to its clients, and what it adds to the time to first token. The replica is a stand-in that computes
 * nothing; coordinator, gRPC and clients are real. */
#pragma once

/* The subcommand; argv[0] is its name. Returns the process's exit status: 0, 1 for a failure, 2 for
 * wrong usage. Aims that are missed are said, not failed. */
int bench_coordinator(int argc, char **argv);
