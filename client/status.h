/* tandem status: replicas, ranks and memory of a server, as tables or as JSON. */
#pragma once

/* Exit status: 0 ready, 1 no server or an error, 2 wrong usage, 3 the server is not ready. */
int client_status(int argc, char **argv);
