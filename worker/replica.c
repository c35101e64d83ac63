#include "worker/replica.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/capacity.h"
#include "worker/device.h"
#include "worker/hello_links.h"
#include "worker/host.h"
#include "worker/link.h"
#include "worker/progress.h"
#include "worker/rank.h"
#include "worker/step_loop.h"
#include "worker/trace.h"

enum { REPLICA_MAX_RANKS = 64 };

struct replica {
    const struct replica_options *options;
    struct comm *world;
    int rank_i, n_ranks;
    struct host_facts *facts; /* [n_ranks] */
    struct hello_links links; /* rank 0 */
    struct link *link;        /* rank 0 */
    struct rank_plan plan;
    struct spec_policy policy; /* to begin with; rank 0 */
    struct rank_comms comms;
    struct rank *rank;
    struct trace *trace;
    int n_blocks; /* of each pool: the smallest of the ranks */
    struct device device; /* resolved */
    int64_t progress_at_ns;
    struct progress progress; /* rank 0 */
};

/* --- agreement ------------------------------------------------------------------------------ */

struct verdict {
    enum status status;
    char text[640];
};

/* Everybody says how its part went; all return the first failure in rank order, in its rank's
 * words. */
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
    host_facts_read(&mine, r->device.text);
    if (r->device.memory_bytes >= 0) mine.memory_bytes = r->device.memory_bytes;
    r->facts = xcalloc((size_t)r->n_ranks, sizeof *r->facts);
    return comm_all_gather(r->world, r->facts, &mine, sizeof mine, err);
}

/* Whether two ranks take their memory from the same place: one device of one host. */
static bool share_memory(const struct replica *r, int a, int b) {
    return strcmp(r->facts[a].host, r->facts[b].host) == 0 &&
           strcmp(r->facts[a].device, r->facts[b].device) == 0;
}

/* The memory of the host or device that a rank stands on; settle_capacity shares it out. */
static int64_t memory_of_rank(const struct replica *r, int rank) {
    int64_t bytes = r->facts[rank].memory_bytes;
    for (int i = 0; i < r->n_ranks; i++) {
        if (!share_memory(r, i, rank)) continue;
        if (r->facts[i].memory_bytes < bytes) bytes = r->facts[i].memory_bytes;
    }
    return bytes;
}

/* places[n_ranks]: the first rank that shares memory with each. */
static void find_places(const struct replica *r, int places[REPLICA_MAX_RANKS]) {
    for (int i = 0; i < r->n_ranks; i++) {
        places[i] = 0;
        while (!share_memory(r, places[i], i)) places[i]++;
    }
}

/* Bits agree within one kind of device only ("cuda:0 (9.0)" and "cuda:1 (9.0)" are of one). */
static enum status check_devices(const struct replica *r, struct error *err) {
    const char *kind = strchr(r->facts[0].device, '(');
    for (int i = 1; i < r->n_ranks; i++) {
        const char *other = strchr(r->facts[i].device, '(');
        bool same_sort = strncmp(r->facts[i].device, r->facts[0].device, 4) == 0;
        if (same_sort && (kind == NULL ? other == NULL : other != NULL && strcmp(kind, other) == 0)) {
            continue;
        }
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "rank %d computes on %s, rank 0 on %s: their bits would differ; give all "
                         "ranks the same --device and --isa", i, r->facts[i].device,
                         r->facts[0].device);
    }
    return STATUS_OK;
}

static enum status copy_dir(char out[RANK_MAX_PATH], const char *dir, struct error *err) {
    if (strlen(dir) < RANK_MAX_PATH) {
        strcpy(out, dir);
        return STATUS_OK;
    }
    return error_set(err, STATUS_INVALID_ARGUMENT, "the plan's model folder has a path of %zu bytes, "
                     "at most %d are possible", strlen(dir), RANK_MAX_PATH - 1);
}

static struct spec_policy policy_of(const Tandem__V1__Policy *told) {
    int mode = told != NULL ? spec_mode_parse(told->mode) : -1;
    if (mode < 0) return (struct spec_policy){SPEC_PLAIN, 1, 1, 0};
    return (struct spec_policy){
        .mode = (enum spec_mode)mode,
        .window = (int)told->window,
        .layer_width = (int)told->layer_width,
        .delay = (int)told->delay,
    };
}

/* The topology by the roles of the ranks. */
static void read_topology(struct rank_plan *out, const Tandem__V1__Plan *plan) {
    uint32_t first_draft = UINT32_MAX;
    for (size_t i = 0; i < plan->n_ranks; i++) {
        const Tandem__V1__PlannedRank *planned = plan->ranks[i];
        bool draft = strcmp(planned->role, "draft") == 0;
        if (draft) out->draft_degree = (int32_t)planned->degree;
        else out->target_degree = (int32_t)planned->degree;
        if (draft && planned->rank < first_draft) first_draft = planned->rank;
    }
    out->shared = first_draft == 0;
}

/* Whether every entry is what this worker makes of the topology. */
static enum status check_topology(const struct replica *r, const Tandem__V1__Plan *plan,
                                  struct error *err) {
    const struct rank_plan *out = &r->plan;
    int roles = out->target_degree + out->draft_degree;
    if (rank_plan_n_ranks(out) != r->n_ranks || plan->n_ranks != (size_t)roles) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the plan has a target on %d ranks and a draft on %d%s, mpirun started %d "
                         "ranks", out->target_degree, out->draft_degree,
                         out->shared ? " of them" : "", r->n_ranks);
    }
    for (size_t i = 0; i < plan->n_ranks; i++) {
        const Tandem__V1__PlannedRank *planned = plan->ranks[i];
        bool draft = strcmp(planned->role, "draft") == 0;
        int shard = draft ? rank_plan_draft_shard(out, (int)planned->rank)
                          : rank_plan_target_shard(out, (int)planned->rank);
        if (planned->rank < (uint32_t)r->n_ranks && (int)planned->shard == shard) continue;
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the plan gives rank %u role \"%s\", shard %u of %u; expected shard %d",
                         planned->rank, planned->role, planned->shard, planned->degree, shard);
    }
    return STATUS_OK;
}

static int32_t within(uint32_t value, int32_t low, int32_t high) {
    return value < (uint32_t)low ? low : value > (uint32_t)high ? high : (int32_t)value;
}

static enum status accept_plan(struct replica *r, const Tandem__V1__Plan *plan,
                               struct error *err) {
    struct rank_plan *out = &r->plan;
    TRY(copy_dir(out->model_dir, plan->model_dir, err));
    TRY(copy_dir(out->draft_dir, plan->draft_dir, err));
    out->fingerprint = plan->checkpoint_fingerprint;
    out->draft_fingerprint = plan->draft_checkpoint_fingerprint;
    int weights = dtype_of_weights(plan->weights);
    if (weights < 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "the plan has weights \"%s\", expected bf16, int8 or fp8", plan->weights);
    }
    out->weights = (enum dtype)weights;
    out->kv_budget_bytes = (int64_t)plan->kv_budget_bytes;
    out->max_sequences = (int32_t)plan->max_sequences;
    out->max_step_tokens = (int32_t)plan->max_step_tokens;
    out->max_context = (int32_t)plan->max_context;
    out->prefix_cache = !plan->prefix_cache_off;
    out->max_window = within(plan->max_window, 1, SPEC_MAX_WINDOW);
    out->max_layer_width = within(plan->max_layer_width, 1, SPEC_MAX_LAYER_WIDTH);
    bool rejection = strcmp(plan->sampling_rule, "rejection") == 0;
    out->rule = rejection ? SAMPLING_REJECTION : SAMPLING_COUPLED;
    out->drafter = strcmp(plan->drafter, "model") == 0   ? RANK_MODEL_DRAFTER
                   : strcmp(plan->drafter, "ngram") == 0 ? RANK_NGRAM_DRAFTER
                                                         : RANK_NO_DRAFTER;
    r->policy = policy_of(plan->policy);
    read_topology(out, plan);
    return check_topology(r, plan, err);
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
    if (r->links.message.n_latency_ns > 0) hello.links = &r->links.message;
    Tandem__V1__Plan *plan;
    enum status status = link_dial(&r->link, &plan, r->options->coordinator, &hello,
                                   r->options->patience_ns, err);
    free(rows);
    free(hellos);
    return status == STATUS_OK ? accept_plan(r, plan, err) : status;
}

/* --- loading -------------------------------------------------------------------------------- */

static bool shares_device(const struct replica *r) {
    int places[REPLICA_MAX_RANKS];
    find_places(r, places);
    return rank_plan_shares_device(&r->plan, r->rank_i, places);
}

static bool is_one_process(const struct replica *r) {
    return r->options->make_group == comm_threads_group;
}

static enum status open_rank(struct replica *r, struct error *err) {
    struct rank_options options = {
        .plan = &r->plan,
        .rank = r->rank_i,
        .isa = r->device.isa,
        .device = r->device.index,
        .shares_device = shares_device(r),
        .one_process = is_one_process(r),
        .n_threads = r->options->n_threads,
        .memory_bytes = memory_of_rank(r, r->rank_i),
    };
    return rank_open(&r->rank, &options, err);
}

struct rank_part {
    uint64_t fingerprint;
    struct capacity capacity;
    char role[64];
};

static void log_capacity(const struct replica *r, const struct rank_part *parts) {
    log_info("capacity (MiB)  rank  role                   host              memory  weights   "
             "scratch  reserve       KV  blocks");
    for (int i = 0; i < r->n_ranks; i++) {
        const struct capacity *c = &parts[i].capacity;
        double mib = 1024.0 * 1024.0;
        log_info("                %4d  %-21.21s  %-14.14s %9.1f %8.1f %9.1f %8.1f %8.1f %7d", i,
                 parts[i].role, r->facts[i].host, (double)c->memory_bytes / mib,
                 (double)c->weights_bytes / mib, (double)c->scratch_bytes / mib,
                 (double)c->reserve_bytes / mib, (double)c->kv_bytes / mib, c->n_blocks);
    }
    int context = rank_max_context(r->rank);
    int places[REPLICA_MAX_RANKS];
    find_places(r, places);
    for (int i = 1; i < r->n_ranks; i++) {
        if (places[i] != i) {
            log_info("ranks on one host or device share its memory: one budget");
            break;
        }
    }
    log_info("KV memory of %d blocks holds %d tokens: %.1f sequences of %d", r->n_blocks,
             r->n_blocks * BACKEND_KV_BLOCK, (double)r->n_blocks * BACKEND_KV_BLOCK / context,
             context);
}

/* The blocks that all ranks serve with; the parts then say what of them is each one's. */
static enum status share_memory_out(struct replica *r, struct rank_part *parts, struct error *err) {
    struct capacity capacities[REPLICA_MAX_RANKS];
    int places[REPLICA_MAX_RANKS];
    for (int i = 0; i < r->n_ranks; i++) capacities[i] = parts[i].capacity;
    find_places(r, places);
    TRY(capacity_share(&r->n_blocks, capacities, places, r->n_ranks, rank_max_context(r->rank), err));
    for (int i = 0; i < r->n_ranks; i++) {
        struct capacity *c = &parts[i].capacity;
        if (c->n_blocks > 0) c->kv_bytes = c->kv_bytes / c->n_blocks * r->n_blocks;
        c->n_blocks = r->n_blocks;
    }
    return STATUS_OK;
}

/* All ranks must see the same checkpoints, and serve with what the smallest can hold. */
static enum status settle_capacity(struct replica *r, struct error *err) {
    struct rank_part mine = {rank_fingerprint(r->rank), *rank_capacity(r->rank), ""};
    snprintf(mine.role, sizeof mine.role, "%s", rank_role(r->rank));
    struct rank_part *parts = xcalloc((size_t)r->n_ranks, sizeof *parts);
    enum status status = comm_all_gather(r->world, parts, &mine, sizeof mine, err);
    for (int i = 0; i < r->n_ranks && status == STATUS_OK; i++) {
        if (parts[i].fingerprint == parts[0].fingerprint) continue;
        status = error_set(err, STATUS_FAILED_PRECONDITION,
                           "rank %d on %s reads other checkpoints than rank 0 on %s: fingerprints "
                           "%016llx and %016llx", i, r->facts[i].host, r->facts[0].host,
                           (unsigned long long)parts[i].fingerprint,
                           (unsigned long long)parts[0].fingerprint);
    }
    if (status == STATUS_OK) status = share_memory_out(r, parts, err);
    if (status == STATUS_OK && r->rank_i == 0) log_capacity(r, parts);
    free(parts);
    return status;
}

/* --- groups --------------------------------------------------------------------------------- */

/* The group of ranks first .. first + n, where this rank is one of them. */
static enum status make_group(struct replica *r, struct comm **out, int first, int n,
                              struct error *err) {
    int members[REPLICA_MAX_RANKS];
    if (r->rank_i < first || r->rank_i >= first + n) return STATUS_OK;
    for (int i = 0; i < n; i++) members[i] = first + i;
    return r->options->make_group(out, r->world, members, n, err);
}

static enum status make_groups(struct replica *r, struct error *err) {
    const struct rank_plan *plan = &r->plan;
    TRY(make_group(r, &r->comms.target, 0, plan->target_degree, err));
    if (plan->drafter != RANK_MODEL_DRAFTER) return STATUS_OK;
    int leader = rank_plan_draft_leader(plan);
    TRY(make_group(r, &r->comms.draft, leader < 0 ? 0 : leader, plan->draft_degree, err));
    if (leader < 0 || (r->rank_i != 0 && r->rank_i != leader)) return STATUS_OK;
    return r->options->make_group(&r->comms.pair, r->world, (int[]){0, leader}, 2, err);
}

static enum status begin_trace(struct replica *r, struct error *err) {
    char lane[96];
    if (r->options->trace_file == NULL) return STATUS_OK;
    snprintf(lane, sizeof lane, "rank %d: %s", r->rank_i, rank_role(r->rank));
    return trace_create(&r->trace, r->world, lane, err);
}

static void on_progress(void *user, size_t bytes_done, size_t bytes_total) {
    struct replica *r = user;
    int64_t now = clock_now_ns();
    if (r->rank_i == 0) progress_show(&r->progress, bytes_done, bytes_total);
    if (bytes_done < bytes_total && now - r->progress_at_ns < 200 * 1000 * 1000) return;
    r->progress_at_ns = now;
    if (r->link != NULL) link_send_progress(r->link, bytes_done, bytes_total);
}

static enum status load_weights(struct replica *r, struct error *err) {
    struct rank_loading loading = {
        .comms = r->comms,
        .n_blocks = r->n_blocks,
        .trace = r->trace,
        .progress = on_progress,
        .progress_user = r,
    };
    int64_t start = clock_now_ns();
    TRY(rank_load(r->rank, &loading, err));
    log_info("%s: loaded %.1f MiB of %s weights in %.2f s", rank_role(r->rank),
             (double)rank_memory(r->rank).weights_bytes / 1048576.0, dtype_name(r->plan.weights),
             (double)(clock_now_ns() - start) / 1e9);
    return STATUS_OK;
}

static enum status report_ready(struct replica *r, struct error *err) {
    struct transformer_memory mine = rank_memory(r->rank);
    struct transformer_memory *all = xcalloc((size_t)r->n_ranks, sizeof *all);
    enum status status = comm_all_gather(r->world, all, &mine, sizeof mine, err);
    if (status == STATUS_OK && r->rank_i == 0) {
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
        message.max_context = (uint32_t)rank_max_context(r->rank);
        message.checkpoint_fingerprint = rank_target_fingerprint(r->rank);
        message.draft_kv_blocks = r->plan.drafter == RANK_MODEL_DRAFTER ? (uint32_t)r->n_blocks : 0;
        link_send_ready(r->link, &message);
        free(rows);
        free(ready);
    }
    free(all);
    return status;
}

static enum status measure_devices(struct replica *r, struct error *err) {
    int places[REPLICA_MAX_RANKS];
    find_places(r, places);
    struct hello_devices devices = {.isa = r->device.isa, .device = r->device.index,
                                    .one_process = is_one_process(r)};
    for (int i = 0; i < r->n_ranks; i++) {
        devices.shares_device = devices.shares_device || places[i] != i;
    }
    TRY(make_group(r, &devices.group, 0, r->n_ranks, err));
    enum status status = hello_links_measure(&r->links, r->world, &devices, err);
    comm_destroy(devices.group);
    return status;
}

static enum status measure_links(struct replica *r, struct error *err) {
    if (r->device.isa >= BACKEND_CUDA && r->n_ranks > 1) return measure_devices(r, err);
    return hello_links_measure(&r->links, r->world, NULL, err);
}

static enum status load(struct replica *r, struct error *err) {
    TRY(measure_links(r, err));
    enum status status = r->rank_i == 0 ? join(r, err) : STATUS_OK;
    TRY(agree(r, status, err));
    TRY(comm_broadcast(r->world, &r->plan, sizeof r->plan, 0, err));
    status = open_rank(r, err);
    TRY(agree(r, status, err));
    TRY(settle_capacity(r, err));
    TRY(make_groups(r, err));
    TRY(begin_trace(r, err));
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
        .wish = {spec_mode_parse(submit->speculation), (int)submit->num_speculative_tokens},
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
        if (message->kind_case == TANDEM__V1__REPLICA_DOWN__KIND_POLICY) {
            struct spec_policy policy = policy_of(message->policy);
            step_loop_set_policy(loop, &policy);
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
    struct rank_leadership leadership;
    TRY(rank_lead(r->rank, &leadership, err));
    const struct model_config *config = rank_target_config(r->rank);
    struct step_loop_options options = {
        .engine = leadership.engine,
        .backend = leadership.backend,
        .config = config,
        .n_blocks = r->n_blocks,
        .max_sequences = r->plan.max_sequences,
        .max_step_tokens = capacity_rows(r->plan.max_step_tokens, r->plan.max_sequences),
        .max_context = rank_max_context(r->rank),
        .prefix_cache = r->plan.prefix_cache,
        .max_logit_rows = rank_plan_logit_rows(&r->plan),
        .drafter = leadership.drafter,
        .drafter_remote = leadership.drafter_remote,
        .handoff_ns = leadership.handoff_ns,
        .max_window = r->plan.max_window,
        .rule = r->plan.rule,
        .trace = r->trace,
    };
    struct step_loop *loop = step_loop_create(&options);
    step_loop_set_policy(loop, &r->policy);
    log_info("serving %s with %d rank%s", config->name, r->n_ranks, r->n_ranks == 1 ? "" : "s");
    enum status status = serve(r, loop, err);
    step_loop_destroy(loop);
    return status == STATUS_OK ? rank_stop(r->rank, err) : status;
}

static void end(struct replica *r, enum status status, const struct error *err) {
    if (status != STATUS_OK && r->link != NULL) link_send_fatal(r->link, err->text);
    rank_close(r->rank);
    trace_destroy(r->trace);
    struct comm *groups[] = {r->comms.target, r->comms.draft, r->comms.pair};
    for (size_t i = 0; i < sizeof groups / sizeof *groups && status == STATUS_OK; i++) {
        if (groups[i] != NULL) comm_destroy(groups[i]);
    }
    link_close(r->link);
    hello_links_free(&r->links);
    free(r->facts);
}

/* How many ranks before this one stand on its host. */
static enum status count_local(struct replica *r, int *local_rank, struct error *err) {
    struct host_facts mine;
    host_facts_read(&mine, "");
    struct host_facts *all = xcalloc((size_t)r->n_ranks, sizeof *all);
    enum status status = comm_all_gather(r->world, all, &mine, sizeof mine, err);
    *local_rank = 0;
    for (int i = 0; i < r->rank_i; i++) *local_rank += strcmp(all[i].host, mine.host) == 0;
    free(all);
    return status;
}

static enum status run(struct replica *r, struct error *err) {
    int local_rank;
    TRY(count_local(r, &local_rank, err));
    enum status status =
        device_resolve(&r->device, r->options->device, r->options->isa, local_rank, err);
    TRY(agree(r, status, err));
    TRY(gather_facts(r, err));
    TRY(check_devices(r, err));
    TRY(load(r, err));
    TRY(r->rank_i == 0 ? lead(r, err) : rank_follow(r->rank, err));
    if (r->trace == NULL) return STATUS_OK;
    return trace_write(r->trace, r->world, r->options->trace_file, err);
}

enum status replica_run(const struct replica_options *options, struct comm *world,
                        struct error *err) {
    struct replica r = {
        .options = options,
        .world = world,
        .rank_i = comm_rank(world),
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
