/* What tests tell the emulator; between launches only.
 *
 * In which order it runs what may run at once: 0 upwards, 1 downwards, 2 by chance (from
 * the seed), 3 and 4 one warp as far ahead of the others as it can get, from the first or the last. */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
enum { EMULATION_ORDERS = 5 };
void emulation_set_order(int order, uint32_t seed);
/* How many devices there are (1 at the start), and whether they reach each other's memory: 0 no, 1 yes,
 * 2 they say so and refuse. */
void emulation_set_devices(int n_devices, int mapped);
/* Whether `from` has mapped `to`'s memory. */
int emulation_peer_enabled(int from, int to);
/* Launches so far, and how many of them were replayed from graphs. */
uint64_t emulation_launches(void);
uint64_t emulation_replays(void);
#ifdef __cplusplus
}
#endif
