/* Collectives of one group of ranks. Made of threads of one process (comm_threads.c) or over MPI
 * (comm_mpi.c), for host memory; and over such a group for devices (comm_tensors.c): NCCL (comm_nccl.c,
 * opened by comm_device.c), peers (comm_peer.c), or copies through the host (comm_staged.c). All calls are collective unless said
 * otherwise, made by one thread per rank, in the same order on every rank. No call sums: ordered sums
 * are the backend's.
 *
 * Groups of host memory, and copies through it, have done when a call returns. NCCL's and peers' calls
 * work on device memory: a call returns when it is enqueued on the group's stream, in order with everything
 * else there; buffers must stay until comm_complete (or another wait for that stream).
 *
 * Waiting spins a few microseconds, then yields, then sleeps until woken (over a network: with
 * growing pauses), so that idle ranks cost little and ranks that share a core make progress. A lost
 * or aborted group makes every call return UNAVAILABLE or ABORTED within seconds (peers: a minute, as long
 * as a kernel waits for a line); after that the group is dead. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"

struct comm;

int comm_rank(const struct comm *comm);
int comm_size(const struct comm *comm);

/* `bytes` from root's buffer into everybody's. Waiting non-roots may wait for hours (idle server). */
enum status comm_broadcast(struct comm *comm, void *buffer, size_t bytes, int root,
                           struct error *err);

/* recv[size][bytes] on every rank, in rank order. recv may hold send at its place. */
enum status comm_all_gather(struct comm *comm, void *recv, const void *send, size_t bytes,
                            struct error *err);

/* As all_gather, with results at root only. Parts may differ in size: bytes_of_rank[size]. recv is
 * the concatenation in rank order. */
enum status comm_gather(struct comm *comm, void *recv, const void *send,
                        const size_t *bytes_of_rank, int root, struct error *err);

enum status comm_barrier(struct comm *comm, struct error *err);

/* Point to point, in order per (sender, receiver) pair. Not collective. */
enum status comm_send(struct comm *comm, const void *buffer, size_t bytes, int to,
                      struct error *err);
enum status comm_recv(struct comm *comm, void *buffer, size_t bytes, int from, struct error *err);

/* All-gathers of up to so many bytes a rank (a multiple of 4) are only enqueued, so that a graph can record
 * them; 0: none. The same on all ranks. */
size_t comm_recordable_bytes(const struct comm *comm);

/* Waits until everything enqueued so far is done; at once on groups of host memory. Not collective.
 * UNAVAILABLE or ABORTED, with what was waited for, when that does not come; the group is dead then. */
enum status comm_complete(struct comm *comm, struct error *err);

/* Whether the group lives, as far as is known here: OK, UNAVAILABLE or ABORTED. Not collective, never
 * waits. Any thread. */
enum status comm_check(struct comm *comm, struct error *err);

/* Makes every pending and future call of the group fail with ABORTED on all ranks. Any thread. */
void comm_abort(struct comm *comm, const char *reason);
void comm_destroy(struct comm *comm);

/* --- makers ---------------------------------------------------------------------------------- */

/* n ranks of one process: out[0..n-1], one for each thread. */
enum status comm_threads_create(struct comm **out, int n_ranks, struct error *err);
/* A subgroup of such a world (members in increasing rank; collective over members only, of which the
 * caller is one). */
enum status comm_threads_group(struct comm **out, struct comm *world, const int *members,
                               int n_members, struct error *err);

/* The ranks of MPI_COMM_WORLD, or a subgroup of that world (members in increasing world rank;
 * collective over members only). MPI itself must have been initialised by comm_mpi_init. */
enum status comm_mpi_init(int *argc, char ***argv, struct error *err);
void comm_mpi_finalize(void);
enum status comm_mpi_world(struct comm **out, struct error *err);
enum status comm_mpi_group(struct comm **out, struct comm *world, const int *members, int n_members,
                           struct error *err);
/* Ends the whole job at once with exit status `code`. Does not return. */
_Noreturn void comm_mpi_kill_job(int code);
