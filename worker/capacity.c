#include "worker/capacity.h"

#include "kernels/backend.h"

/* Kept free on the host for page cache, libraries and the coordinator. */
enum { RESERVE_PERCENT = 10 };

static double mib(int64_t bytes) {
    return (double)bytes / (1024.0 * 1024.0);
}

static enum status refuse(const struct capacity *c, const struct capacity_request *request,
                          int64_t block_bytes, struct error *err) {
    int64_t context_blocks =
        (request->max_context + BACKEND_KV_BLOCK - 1) / BACKEND_KV_BLOCK;
    int64_t need = context_blocks * block_bytes;
    if (request->kv_budget_bytes > 0 && c->n_blocks >= context_blocks) {
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "KV memory: the budget is %.1f MiB a rank, but rank %d has %.1f MiB, of "
                         "which weights take %.1f, scratch %.1f, reserve %.1f; lower --kv-budget or "
                         "use more ranks",
                         mib(request->kv_budget_bytes), request->shard->rank,
                         mib(c->memory_bytes), mib(c->weights_bytes), mib(c->scratch_bytes),
                         mib(c->reserve_bytes));
    }
    if (request->kv_budget_bytes > 0) {
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "KV memory: the budget of %.1f MiB a rank holds %d blocks, one sequence of "
                         "%d tokens needs %lld (%.1f MiB); raise --kv-budget or lower --max-context",
                         mib(request->kv_budget_bytes), c->n_blocks, request->max_context,
                         (long long)context_blocks, mib(need));
    }
    return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                     "does not fit: rank %d has %.1f MiB; weights take %.1f, scratch %.1f, reserve "
                     "%.1f, KV of one sequence of %d tokens %.1f MiB; use more ranks, --weights int8 "
                     "or a lower --max-context",
                     request->shard->rank, mib(c->memory_bytes), mib(c->weights_bytes),
                     mib(c->scratch_bytes), mib(c->reserve_bytes), request->max_context, mib(need));
}

int capacity_rows(int max_step_tokens, int max_sequences) {
    int least = max_sequences + BACKEND_KV_BLOCK;
    return max_step_tokens > least ? max_step_tokens : least;
}

enum status capacity_compute(struct capacity *out, const struct capacity_request *request,
                             struct error *err) {
    int rows = capacity_rows(request->max_step_tokens, request->max_sequences);
    int logit_rows = request->max_logit_rows > 0 ? request->max_logit_rows : request->max_sequences;
    struct footprint footprint =
        footprint_of(request->config, request->shard, request->weights, rows, logit_rows);
    const struct footprint *beside = &request->beside;
    int64_t block_bytes = (int64_t)(footprint.kv_bytes_per_block + beside->kv_bytes_per_block);
    *out = (struct capacity){
        .memory_bytes = request->memory_bytes,
        .weights_bytes = (int64_t)(footprint.weights_bytes + beside->weights_bytes),
        .scratch_bytes = (int64_t)(footprint.scratch_bytes + beside->scratch_bytes),
        .reserve_bytes = request->memory_bytes / 100 * RESERVE_PERCENT,
    };
    int per_sequence = (request->max_context + BACKEND_KV_BLOCK - 1) / BACKEND_KV_BLOCK;
    out->wanted_blocks = request->max_sequences * per_sequence;

    int64_t left = out->memory_bytes - out->weights_bytes - out->scratch_bytes - out->reserve_bytes;
    int64_t budget = request->kv_budget_bytes > 0 ? request->kv_budget_bytes : left;
    /* A rank without heads holds no KV: its memory does not limit the group. */
    int64_t blocks = block_bytes > 0 ? budget / block_bytes : out->wanted_blocks;
    if (budget < 0) blocks = 0;
    bool explicit_budget = request->kv_budget_bytes > 0;
    int64_t cap = explicit_budget ? INT32_MAX / BACKEND_KV_BLOCK : out->wanted_blocks;
    out->n_blocks = (int)(blocks < cap ? blocks : cap);
    out->kv_bytes = out->n_blocks * block_bytes;
    if (out->n_blocks < per_sequence || out->kv_bytes > left) {
        return refuse(out, request, block_bytes, err);
    }
    return STATUS_OK;
}

/* What the ranks of one place come to together. */
struct place {
    int64_t memory_bytes, reserve_bytes, weights_bytes, scratch_bytes, block_bytes;
    int n_ranks;
};

static struct place place_of(const struct capacity *capacities, const int *places, int n, int wanted) {
    struct place place = {.memory_bytes = INT64_MAX};
    for (int i = 0; i < n; i++) {
        const struct capacity *c = &capacities[i];
        if (places[i] != wanted) continue;
        if (c->memory_bytes < place.memory_bytes) {
            place.memory_bytes = c->memory_bytes;
            place.reserve_bytes = c->reserve_bytes;
        }
        place.weights_bytes += c->weights_bytes;
        place.scratch_bytes += c->scratch_bytes;
        if (c->n_blocks > 0) place.block_bytes += c->kv_bytes / c->n_blocks;
        place.n_ranks++;
    }
    return place;
}

enum status capacity_share(int *n_blocks, const struct capacity *capacities, const int *places, int n,
                           int max_context, struct error *err) {
    int needed = (max_context + BACKEND_KV_BLOCK - 1) / BACKEND_KV_BLOCK;
    *n_blocks = capacities[0].n_blocks;
    for (int i = 0; i < n; i++) {
        if (capacities[i].n_blocks < *n_blocks) *n_blocks = capacities[i].n_blocks;
    }
    for (int i = 0; i < n; i++) {
        struct place place = place_of(capacities, places, n, places[i]);
        int64_t left = place.memory_bytes - place.reserve_bytes - place.weights_bytes -
                       place.scratch_bytes;
        int64_t room = place.block_bytes > 0 ? left / place.block_bytes : *n_blocks;
        if (left < 0) room = 0;
        if (room < *n_blocks) *n_blocks = (int)room;
        if (room >= needed) continue;
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "does not fit: %d ranks share %.1f MiB; their weights take %.1f, scratch %.1f, "
                         "reserve %.1f, KV of one sequence of %d tokens %.1f MiB; use more devices, "
                         "--weights int8 or a lower --max-context",
                         place.n_ranks, mib(place.memory_bytes), mib(place.weights_bytes),
                         mib(place.scratch_bytes), mib(place.reserve_bytes), max_context,
                         mib(needed * place.block_bytes));
    }
    return STATUS_OK;
}
