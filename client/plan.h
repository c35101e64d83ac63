/* tandem plan: what the planner thinks of a server before it is started: the candidates as a table and
 * why one of them wins. Runs tandem-coordinator --explain-plan, which knows the models. */
#pragma once

/* Exit status: 0 planned, 1 nothing works or fits, 2 wrong usage. */
int client_plan(int argc, char **argv);
