#include "worker/replica.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/capacity.h"
#include "worker/engine.h"
#include "worker/host.h"
#include "worker/link.h"
#include "worker/step_loop.h"

enum { REPLICA_MAX_RANKS = 64, REPLICA_MAX_PATH = 4096 };

/* The coordinator's plan as every rank needs it, small and flat: it is broadcast as bytes. */
struct replica_plan {
    char model_dir[REPLICA_MAX_PATH];
    uint64_t checkpoint_fingerprint;
    enum dtype weights;
    int32_t shard[REPLICA_MAX_RANKS];  /* of each world rank */
    int32_t degree[REPLICA_MAX_RANKS];
    int64_t kv_budget_bytes;
    int32_t max_sequences, max_step_tokens, max_context;
    bool prefix_cache;
};

struct replica {
    const struct replica_options *options;
    struct comm *world;
    int rank, n_ranks;
    struct host_facts *facts; /* [n_ranks] */
    struct link *link;        /* rank 0 */
    struct replica_plan plan;
    struct checkpoint *checkpoint;
    struct shard shard;
    struct capacity capacity;
    int n_blocks; /* of the group: the smallest of the ranks */
    int max_context;
    struct backend *backend;
    struct transformer *transformer;
    struct engine *engine;
    enum backend_isa isa; /* resolved: never AUTO */
    int64_t progress_at_ns;
};

/* --- agreement ------------------------------------------------------------------------------ */

struct verdict {
    enum status status;
    char text[640];
};

/* Everybody says how its part went; all return the first failure in rank order, in its rank's words. */
static enum status agree(struct replica *r, enum status mine, struct error *err) {
    struct verdict verdict = {mine, ""};
    if (mine != STATUS_OK) snprintf(verdict.text, sizeof verdict.text, "%s", err->text);
    struct verdict *all = xcalloc((size_t)r->n_ranks, sizeof *all);
    enum status status = comm_all_gather(r->world, all, &verdict, sizeof verdict, err);
    for (int i = 0; i < r->n_ranks && status == STATUS_OK; i++) {
        if (all[i].status == STATUS_OK) continue;
        status = r->n_ranks == 1
                     ? error_set(err, all[i].status, "%s", all[i].text)
                     : error_set(err, all[i].status, "rank %d: %s", i, all[i].text);
    }
    free(all);
    return status;
}

/* --- joining -------------------------------------------------------------------------------- */

static enum status gather_facts(struct replica *r, struct error *err) {
    struct host_facts mine;
    char device[64];
    snprintf(device, sizeof device, "cpu (%s)", backend_isa_to_name(r->isa));
    host_facts_read(&mine, device);
    r->facts = xcalloc((size_t)r->n_ranks, sizeof *r->facts);
    return comm_all_gather(r->world, r->facts, &mine, sizeof mine, err);
}

/* The host's memory, shared out among the ranks that stand on it. */
static int64_t memory_of_rank(const struct replica *r, int rank) {
    int sharers = 0;
    int64_t bytes = r->facts[rank].memory_bytes;
    for (int i = 0; i < r->n_ranks; i++) {
        if (strcmp(r->facts[i].host, r->facts[rank].host) != 0) continue;
        sharers++;
        if (r->facts[i].memory_bytes < bytes) bytes = r->facts[i].memory_bytes;
    }
    return bytes / sharers;
}

static enum status accept_plan(struct replica *r, const Tandem__V1__Plan *plan,
                               struct error *err) {
    struct replica_plan *out = &r->plan;
    if (strlen(plan->model_dir) >= sizeof out->model_dir) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "the plan's model folder has a path of %zu "
                         "bytes, at most %zu are possible", strlen(plan->model_dir),
                         sizeof out->model_dir - 1);
    }
    if (plan->n_ranks != (size_t)r->n_ranks) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the plan has %zu ranks, mpirun started %d", plan->n_ranks, r->n_ranks);
    }
    strcpy(out->model_dir, plan->model_dir);
    out->checkpoint_fingerprint = plan->checkpoint_fingerprint;
    out->weights = strcmp(plan->weights, "int8") == 0 ? DTYPE_I8 : DTYPE_BF16;
    out->kv_budget_bytes = (int64_t)plan->kv_budget_bytes;
    out->max_sequences = (int32_t)plan->max_sequences;
    out->max_step_tokens = (int32_t)plan->max_step_tokens;
    out->max_context = (int32_t)plan->max_context;
    out->prefix_cache = !plan->prefix_cache_off;
    for (size_t i = 0; i < plan->n_ranks; i++) {
        const Tandem__V1__PlannedRank *planned = plan->ranks[i];
        if (planned->rank >= (uint32_t)r->n_ranks || strcmp(planned->role, "target") != 0 ||
            planned->shard != planned->rank || planned->degree != (uint32_t)r->n_ranks) {
            return error_set(err, STATUS_FAILED_PRECONDITION,
                             "the plan gives rank %u role \"%s\", shard %u of %u; expected role "
                             "\"target\", shard %u of %d", planned->rank, planned->role,
                             planned->shard, planned->degree, planned->rank, r->n_ranks);
        }
        out->shard[planned->rank] = (int32_t)planned->shard;
        out->degree[planned->rank] = (int32_t)planned->degree;
    }
    return STATUS_OK;
}

/* Leader: says hello, gets the plan. */
static enum status join(struct replica *r, struct error *err) {
    Tandem__V1__RankHello *hellos = xcalloc((size_t)r->n_ranks, sizeof *hellos);
    Tandem__V1__RankHello **rows = xcalloc((size_t)r->n_ranks, sizeof *rows);
    for (int i = 0; i < r->n_ranks; i++) {
        tandem__v1__rank_hello__init(&hellos[i]);
        hellos[i].rank = (uint32_t)i;
        hellos[i].host = r->facts[i].host;
        hellos[i].device = r->facts[i].device;
        hellos[i].memory_bytes = (uint64_t)r->facts[i].memory_bytes;
        hellos[i].cores = (uint32_t)r->facts[i].cores;
        rows[i] = &hellos[i];
    }
    Tandem__V1__Hello hello = TANDEM__V1__HELLO__INIT;
    hello.protocol = 1;
    hello.replica_id = (char *)r->options->id;
    hello.n_ranks = (size_t)r->n_ranks;
    hello.ranks = rows;
    Tandem__V1__Plan *plan;
    enum status status = link_dial(&r->link, &plan, r->options->coordinator, &hello,
                                   r->options->patience_ns, err);
    free(rows);
    free(hellos);
    return status == STATUS_OK ? accept_plan(r, plan, err) : status;
}

/* --- loading -------------------------------------------------------------------------------- */

static enum status open_checkpoint(struct replica *r, struct error *err) {
    TRY(checkpoint_open(&r->checkpoint, r->plan.model_dir, err));
    const struct model_config *config = checkpoint_config(r->checkpoint);
    uint64_t seen = checkpoint_fingerprint(r->checkpoint);
    if (r->plan.checkpoint_fingerprint != 0 && seen != r->plan.checkpoint_fingerprint) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: checkpoint fingerprint %016llx, the coordinator's is %016llx: the "
                         "folders differ", r->plan.model_dir, (unsigned long long)seen,
                         (unsigned long long)r->plan.checkpoint_fingerprint);
    }
    TRY(shard_make(&r->shard, config, r->plan.shard[r->rank], r->plan.degree[r->rank], err));
    r->max_context = r->plan.max_context > 0 && r->plan.max_context < config->max_position
                         ? r->plan.max_context
                         : config->max_position;
    struct capacity_request request = {
        .config = config,
        .shard = &r->shard,
        .weights = r->plan.weights,
        .max_sequences = r->plan.max_sequences,
        .max_step_tokens = r->plan.max_step_tokens,
        .max_context = r->max_context,
        .memory_bytes = memory_of_rank(r, r->rank),
        .kv_budget_bytes = r->plan.kv_budget_bytes,
    };
    return capacity_compute(&r->capacity, &request, err);
}

struct rank_part {
    uint64_t fingerprint;
    struct capacity capacity;
};

static void log_capacity(const struct replica *r, const struct rank_part *parts) {
    log_info("capacity (MiB)  rank  host              memory  weights   scratch  reserve       KV  "
             "blocks");
    for (int i = 0; i < r->n_ranks; i++) {
        const struct capacity *c = &parts[i].capacity;
        double mib = 1024.0 * 1024.0;
        log_info("                %4d  %-14.14s %9.1f %8.1f %9.1f %8.1f %8.1f %7d", i,
                 r->facts[i].host, (double)c->memory_bytes / mib, (double)c->weights_bytes / mib,
                 (double)c->scratch_bytes / mib, (double)c->reserve_bytes / mib,
                 (double)c->kv_bytes / mib, c->n_blocks);
    }
    log_info("KV memory of %d blocks holds %d tokens: %.1f sequences of %d", r->n_blocks,
             r->n_blocks * BACKEND_KV_BLOCK,
             (double)r->n_blocks * BACKEND_KV_BLOCK / r->max_context, r->max_context);
}

/* All ranks must see one checkpoint, and serve with what the smallest can hold. */
static enum status settle_capacity(struct replica *r, struct error *err) {
    struct rank_part mine = {checkpoint_fingerprint(r->checkpoint), r->capacity};
    struct rank_part *parts = xcalloc((size_t)r->n_ranks, sizeof *parts);
    enum status status = comm_all_gather(r->world, parts, &mine, sizeof mine, err);
    r->n_blocks = r->capacity.n_blocks;
    for (int i = 0; i < r->n_ranks && status == STATUS_OK; i++) {
        if (parts[i].capacity.n_blocks < r->n_blocks) r->n_blocks = parts[i].capacity.n_blocks;
        if (parts[i].fingerprint == parts[0].fingerprint) continue;
        status = error_set(err, STATUS_FAILED_PRECONDITION,
                           "rank %d on %s reads another checkpoint than rank 0 on %s: fingerprints "
                           "%016llx and %016llx", i, r->facts[i].host, r->facts[0].host,
                           (unsigned long long)parts[i].fingerprint,
                           (unsigned long long)parts[0].fingerprint);
    }
    if (status == STATUS_OK && r->rank == 0) log_capacity(r, parts);
    free(parts);
    return status;
}

static void on_progress(void *user, size_t bytes_done, size_t bytes_total) {
    struct replica *r = user;
    int64_t now = clock_now_ns();
    if (bytes_done < bytes_total && now - r->progress_at_ns < 200 * 1000 * 1000) return;
    r->progress_at_ns = now;
    if (r->link != NULL) link_send_progress(r->link, bytes_done, bytes_total);
}

static enum status load_weights(struct replica *r, struct error *err) {
    struct backend_options backend = {
        .isa = r->isa,
        .n_threads = r->options->n_threads,
        .max_rows = capacity_rows(r->plan.max_step_tokens, r->plan.max_sequences),
        .max_width = model_config_max_width(checkpoint_config(r->checkpoint)),
    };
    TRY(backend_create(&r->backend, &backend, err));
    struct transformer_options transformer = {
        .checkpoint = r->checkpoint,
        .backend = r->backend,
        .group = r->world,
        .weights = r->plan.weights,
        .n_blocks = r->n_blocks,
        .max_rows = capacity_rows(r->plan.max_step_tokens, r->plan.max_sequences),
        .max_logit_rows = r->plan.max_sequences,
        .max_context = r->max_context,
        .progress = on_progress,
        .progress_user = r,
    };
    int64_t start = clock_now_ns();
    TRY(transformer_create(&r->transformer, &transformer, err));
    struct transformer_memory memory = transformer_memory(r->transformer);
    log_info("loaded %.1f MiB of %s weights in %.2f s", (double)memory.weights_bytes / 1048576.0,
             dtype_name(r->plan.weights), (double)(clock_now_ns() - start) / 1e9);
    int blocks_per_sequence = (r->max_context + BACKEND_KV_BLOCK - 1) / BACKEND_KV_BLOCK;
    struct engine_options engine = {
        .transformer = r->transformer,
        .group = r->world,
        .max_rows = transformer.max_rows,
        .max_segments = r->plan.max_sequences,
        .max_logit_rows = transformer.max_logit_rows,
        .max_blocks = r->plan.max_sequences * blocks_per_sequence,
    };
    r->engine = engine_create(&engine);
    return STATUS_OK;
}

static enum status report_ready(struct replica *r, struct error *err) {
    struct transformer_memory mine = transformer_memory(r->transformer);
    struct transformer_memory *all = xcalloc((size_t)r->n_ranks, sizeof *all);
    enum status status = comm_all_gather(r->world, all, &mine, sizeof mine, err);
    if (status == STATUS_OK && r->rank == 0) {
        Tandem__V1__RankReady *ready = xcalloc((size_t)r->n_ranks, sizeof *ready);
        Tandem__V1__RankReady **rows = xcalloc((size_t)r->n_ranks, sizeof *rows);
        for (int i = 0; i < r->n_ranks; i++) {
            tandem__v1__rank_ready__init(&ready[i]);
            ready[i].rank = (uint32_t)i;
            ready[i].weights_bytes = all[i].weights_bytes;
            ready[i].kv_bytes = all[i].kv_bytes;
            ready[i].scratch_bytes = all[i].scratch_bytes;
            ready[i].device = r->facts[i].device;
            rows[i] = &ready[i];
        }
        Tandem__V1__Ready message = TANDEM__V1__READY__INIT;
        message.n_ranks = (size_t)r->n_ranks;
        message.ranks = rows;
        message.kv_blocks = (uint32_t)r->n_blocks;
        message.max_sequences = (uint32_t)r->plan.max_sequences;
        message.max_context = (uint32_t)r->max_context;
        message.checkpoint_fingerprint = checkpoint_fingerprint(r->checkpoint);
        link_send_ready(r->link, &message);
        free(rows);
        free(ready);
    }
    free(all);
    return status;
}

static enum status load(struct replica *r, struct error *err) {
    enum status status = r->rank == 0 ? join(r, err) : STATUS_OK;
    TRY(agree(r, status, err));
    TRY(comm_broadcast(r->world, &r->plan, sizeof r->plan, 0, err));
    status = open_checkpoint(r, err);
    TRY(agree(r, status, err));
    TRY(settle_capacity(r, err));
    status = load_weights(r, err);
    TRY(agree(r, status, err));
    return report_ready(r, err);
}

/* --- serving -------------------------------------------------------------------------------- */

static struct step_request request_of(const Tandem__V1__Submit *submit) {
    return (struct step_request){
        .key = submit->key,
        .prompt = submit->prompt,
        .n_prompt = (int)submit->n_prompt,
        .sampling =
            {
                .temperature = submit->temperature,
                .top_p = submit->top_p,
                .top_k = submit->top_k,
                .min_p = submit->min_p,
                .repetition_penalty = submit->repetition_penalty,
                .presence_penalty = submit->presence_penalty,
                .frequency_penalty = submit->frequency_penalty,
                .seed = submit->seed,
                .n_logprobs = submit->logprobs,
            },
        .bias_tokens = submit->bias_tokens,
        .biases = submit->biases,
        .n_biases = submit->n_bias_tokens < submit->n_biases ? (int)submit->n_bias_tokens
                                                             : (int)submit->n_biases,
        .stop_token_ids = submit->stop_token_ids,
        .n_stop_token_ids = (int)submit->n_stop_token_ids,
        .ignore_eos = submit->ignore_eos,
        .max_tokens = (int)submit->max_tokens,
        .min_tokens = (int)submit->min_tokens,
        .deadline_ns = submit->deadline_us > 0 ? clock_now_ns() + submit->deadline_us * 1000 : 0,
    };
}

static void take_work(struct step_loop *loop, const Tandem__V1__Work *work) {
    for (size_t i = 0; i < work->n_submits; i++) {
        struct step_request request = request_of(work->submits[i]);
        step_loop_submit(loop, &request);
    }
    for (size_t i = 0; i < work->n_cancels; i++) step_loop_cancel(loop, work->cancels[i]);
}

/* Takes everything that has arrived; waits for it while there is nothing to compute. */
static enum status take_messages(struct replica *r, struct step_loop *loop, bool *stop,
                                 struct error *err) {
    for (;;) {
        bool idle = step_loop_idle(loop);
        Tandem__V1__ReplicaDown *message;
        TRY(link_take(r->link, &message, idle ? 1000000000 : 0, err));
        if (message == NULL) {
            if (idle) continue;
            return STATUS_OK;
        }
        if (message->kind_case == TANDEM__V1__REPLICA_DOWN__KIND_WORK) {
            take_work(loop, message->work);
        }
        *stop = message->kind_case == TANDEM__V1__REPLICA_DOWN__KIND_STOP;
        link_free_message(message);
        if (*stop) return STATUS_OK;
    }
}

static enum status serve(struct replica *r, struct step_loop *loop, struct error *err) {
    Tandem__V1__Step step;
    Tandem__V1__StepStats stats;
    for (;;) {
        bool stop = false;
        TRY(take_messages(r, loop, &stop, err));
        if (stop) return STATUS_OK;
        TRY(step_loop_step(loop, clock_now_ns(), err));
        step_loop_describe(loop, &step, &stats);
        link_send_step(r->link, &step);
    }
}

static enum status lead(struct replica *r, struct error *err) {
    struct step_loop_options options = {
        .engine = r->engine,
        .backend = r->backend,
        .config = checkpoint_config(r->checkpoint),
        .n_blocks = r->n_blocks,
        .max_sequences = r->plan.max_sequences,
        .max_step_tokens = capacity_rows(r->plan.max_step_tokens, r->plan.max_sequences),
        .max_context = r->max_context,
        .prefix_cache = r->plan.prefix_cache,
    };
    struct step_loop *loop = step_loop_create(&options);
    log_info("serving %s with %d rank%s", checkpoint_config(r->checkpoint)->name, r->n_ranks,
             r->n_ranks == 1 ? "" : "s");
    enum status status = serve(r, loop, err);
    step_loop_destroy(loop);
    if (status == STATUS_OK) return engine_stop(r->engine, err);
    return status;
}

static void end(struct replica *r, enum status status, const struct error *err) {
    if (status != STATUS_OK && r->link != NULL) link_send_fatal(r->link, err->text);
    engine_destroy(r->engine);
    transformer_destroy(r->transformer);
    checkpoint_close(r->checkpoint);
    backend_destroy(r->backend);
    link_close(r->link);
    free(r->facts);
}

static enum status resolve_isa(struct replica *r, struct error *err) {
    r->isa = r->options->isa == BACKEND_AUTO ? backend_isa_best() : r->options->isa;
    if (backend_isa_available(r->isa)) return STATUS_OK;
    return error_set(err, STATUS_FAILED_PRECONDITION,
                     "--isa %s is not available on this processor; the best here is %s",
                     backend_isa_to_name(r->isa), backend_isa_to_name(backend_isa_best()));
}

static enum status run(struct replica *r, struct error *err) {
    enum status status = resolve_isa(r, err);
    TRY(agree(r, status, err));
    TRY(gather_facts(r, err));
    TRY(load(r, err));
    return r->rank == 0 ? lead(r, err) : engine_follow(r->engine, err);
}

enum status replica_run(const struct replica_options *options, struct comm *world,
                        struct error *err) {
    struct replica r = {
        .options = options,
        .world = world,
        .rank = comm_rank(world),
        .n_ranks = comm_size(world),
    };
    if (r.n_ranks > REPLICA_MAX_RANKS) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%d ranks, at most %d are possible",
                         r.n_ranks, REPLICA_MAX_RANKS);
    }
    enum status status = run(&r, err);
    end(&r, status, err);
    return status;
}
