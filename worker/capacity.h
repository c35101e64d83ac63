/* What fits: from footprints and memory to the number of KV blocks, before anything is allocated.
 * Pure. Every rank computes its own; the group serves with the smallest number of blocks. */
#pragma once
#include <stdint.h>

#include "common/error.h"
#include "model/footprint.h"

struct capacity_request {
    const struct model_config *config;
    const struct shard *shard;
    enum dtype weights;
    int max_sequences;       /* running at once */
    int max_step_tokens;     /* rows of one step */
    int max_context;         /* positions of one sequence */
    int max_logit_rows;      /* of one step; 0: max_sequences */
    struct footprint beside; /* another model's shard on this rank (a shared draft); zero: none */
    int64_t memory_bytes;    /* of the host or device, whoever else stands on it */
    int64_t kv_budget_bytes; /* 0: what is free after weights, scratch and a reserve */
};

struct capacity {
    int64_t memory_bytes, weights_bytes, scratch_bytes, kv_bytes, reserve_bytes;
    int n_blocks;        /* KV blocks of this rank */
    int wanted_blocks;   /* max_sequences at full context: more would never be used */
};

/* Rows of one step: the token budget, or a row for each running sequence and a block of prefill
 * where that is more. */
int capacity_rows(int max_step_tokens, int max_sequences);

/* RESOURCE_EXHAUSTED with the numbers when the weights and one sequence at full context do not
 * fit. */
enum status capacity_compute(struct capacity *out, const struct capacity_request *request,
                             struct error *err);

/* Ranks that share memory are one budget: the blocks that all n ranks have room for together, at most
 * the fewest of any. places[n]: equal numbers, the same memory. Ranks may differ (a target and its
 * draft): what weights and scratch leave is split so that each gets as many blocks.
 * RESOURCE_EXHAUSTED with the numbers of the fullest place when it is less than one sequence of
 * max_context tokens. */
enum status capacity_share(int *n_blocks, const struct capacity *capacities, const int *places, int n,
                           int max_context, struct error *err);
