/* tandem generate: one generation, streamed to stdout; its statistics go to stderr. SIGINT cancels
 * the generation. With --json, one JSON object per event instead. One thread. */
#pragma once

/* Exit status: 0 done, 1 the server refused or failed, 2 wrong usage, 130 cancelled by a signal. */
int client_generate(int argc, char **argv);
