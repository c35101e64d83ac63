/* tandem policy: shows how the replicas of a server speculate and what the policy expects of every
 * mode; with --mode, sets it. */
#pragma once

/* Exit status: 0 shown or set, 1 the server cannot be reached or refuses, 2 wrong usage. */
int client_policy(int argc, char **argv);
