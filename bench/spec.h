/* tandem-bench spec: every mode of speculation side by side. */
#pragma once

/* argv[0] is the subcommand's name. Returns the exit status. */
int bench_spec(int argc, char **argv);
