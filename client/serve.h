/* tandem serve: a whole server on one machine, in the foreground.
 *
 * Starts tandem-coordinator and, under mpirun, the ranks of one replica (tandem-worker), both found
 * beside this program. Restarts the replica when it dies; ends everything on SIGINT or SIGTERM, and
 * the children end when this process does. One thread. */
#pragma once

/* Exit status: 0 stopped by a signal, 1 the service failed, 2 wrong usage. */
int client_serve(int argc, char **argv);
