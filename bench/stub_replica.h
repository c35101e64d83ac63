/* A stand-in for a replica, for measuring the coordinator: joins over tandem.v1.Replica/Attach and
 * gives every request one token per step, as fast as its pacing lets it. Computes nothing. */
#pragma once
#include <stdatomic.h>
#include <stdint.h>

#include "common/error.h"
#include "proto/rpc.h"

struct stub_replica;

/* `received`: tokens that clients have got so far, for pacing: the stub stays at most `ahead` steps in
 * front of them. */
struct stub_options {
    uint32_t max_sequences;
    int32_t token;              /* the one it always makes */
    const atomic_long *received;
    int ahead;
};

/* Joins over `channel` (both borrowed until stub_stop); returns when it has said ready. */
enum status stub_start(struct stub_replica **out, struct rpc_channel *channel,
                       const struct stub_options *options, struct error *err);
void stub_stop(struct stub_replica *stub);
