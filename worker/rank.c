#include "worker/rank.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/comm/comm_tensors.h"
#include "worker/draft/draft_service.h"
#include "worker/draft/model_drafter.h"
#include "worker/draft/ngram_drafter.h"
#include "worker/draft/remote_drafter.h"

/* A model as this rank sees it. */
struct part {
    struct checkpoint *checkpoint;
    int shard_i; /* -1: no shard here */
    struct shard shard;
    struct transformer *transformer;
    struct comm *tensors; /* owned: the group's way between devices; NULL: the group itself */
};

struct rank {
    struct rank_options options;
    struct part parts[ENGINE_N_MODELS];
    struct capacity capacity;
    int max_context, n_blocks;
    char role[64];
    struct rank_loading loading;
    struct backend *backend;
    struct engine *engine;
    struct drafter *drafter;
};

/* --- the plan --------------------------------------------------------------------------------- */

static bool is_disjoint(const struct rank_plan *plan) {
    return plan->drafter == RANK_MODEL_DRAFTER && !plan->shared;
}

int rank_plan_n_ranks(const struct rank_plan *plan) {
    return plan->target_degree + (is_disjoint(plan) ? plan->draft_degree : 0);
}

int rank_plan_target_shard(const struct rank_plan *plan, int rank) {
    return rank < plan->target_degree ? rank : -1;
}

int rank_plan_draft_shard(const struct rank_plan *plan, int rank) {
    if (plan->drafter != RANK_MODEL_DRAFTER) return -1;
    int shard = is_disjoint(plan) ? rank - plan->target_degree : rank;
    return shard >= 0 && shard < plan->draft_degree ? shard : -1;
}

int rank_plan_draft_leader(const struct rank_plan *plan) {
    return is_disjoint(plan) ? plan->target_degree : -1;
}

bool rank_plan_shares_device(const struct rank_plan *plan, int rank, const int *devices) {
    bool target = rank < plan->target_degree;
    int begin = target ? 0 : plan->target_degree;
    int end = target ? plan->target_degree : rank_plan_n_ranks(plan);
    for (int i = begin; i < end; i++) {
        for (int j = i + 1; j < end; j++) {
            if (devices[i] == devices[j]) return true;
        }
    }
    return false;
}

static int rows_of(const struct rank_plan *plan) {
    return capacity_rows(plan->max_step_tokens, plan->max_sequences);
}

/* Without a drafter a row for each sequence; with one, windows for many sequences, and for the last
 * few that run alone. */
int rank_plan_logit_rows(const struct rank_plan *plan) {
    enum { MORE = 256 };
    if (plan->max_logit_rows > 0) return plan->max_logit_rows;
    if (plan->drafter == RANK_NO_DRAFTER) return plan->max_sequences;
    int rows = plan->max_sequences * (plan->max_window + 1);
    if (rows > plan->max_sequences + MORE) rows = plan->max_sequences + MORE;
    return rows < rows_of(plan) ? rows : rows_of(plan);
}

/* --- opening ---------------------------------------------------------------------------------- */

static enum status open_part(struct rank *r, enum engine_model model, const char *dir,
                             uint64_t wanted, int shard_i, int degree, struct error *err) {
    struct part *part = &r->parts[model];
    TRY(checkpoint_open(&part->checkpoint, dir, err));
    uint64_t seen = checkpoint_fingerprint(part->checkpoint);
    if (wanted != 0 && seen != wanted) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "%s: checkpoint fingerprint %016llx, the coordinator's is %016llx: the "
                         "folders differ", dir, (unsigned long long)seen,
                         (unsigned long long)wanted);
    }
    part->shard_i = shard_i;
    if (shard_i < 0) return STATUS_OK;
    return shard_make(&part->shard, checkpoint_config(part->checkpoint), shard_i, degree, err);
}

static enum status set_context(struct rank *r, struct error *err) {
    const struct rank_plan *plan = r->options.plan;
    int limit = rank_target_config(r)->max_position;
    r->max_context = plan->max_context > 0 && plan->max_context < limit ? plan->max_context : limit;
    if (plan->drafter != RANK_MODEL_DRAFTER) return STATUS_OK;
    int draft = checkpoint_config(r->parts[ENGINE_DRAFT].checkpoint)->max_position;
    if (draft >= r->max_context) return STATUS_OK;
    return error_set(err, STATUS_FAILED_PRECONDITION,
                     "the draft %s has a context of %d tokens, %d are to be served; use another draft "
                     "or --max-context %d", plan->draft_dir, draft, r->max_context, draft);
}

/* The draft is laid out for layer parallelism where it may be asked for and there is more than one
 * rank to spread it over. */
static bool owns_layers(const struct rank_plan *plan) {
    return plan->max_layer_width > 1 && plan->draft_degree > 1;
}

static struct footprint draft_footprint(const struct rank *r) {
    const struct rank_plan *plan = r->options.plan;
    const struct part *draft = &r->parts[ENGINE_DRAFT];
    if (draft->shard_i < 0) return (struct footprint){0};
    return footprint_of_draft(checkpoint_config(draft->checkpoint), &draft->shard, plan->weights,
                              rows_of(plan), plan->max_sequences, owns_layers(plan),
                              plan->max_layer_width);
}

/* A device keeps embeddings of its own. */
static size_t table_bytes(const struct rank *r) {
    size_t bytes = 0;
    for (int model = 0; model < ENGINE_N_MODELS; model++) {
        if (r->parts[model].shard_i < 0) continue;
        struct checkpoint_tensor tensor =
            checkpoint_tensor(r->parts[model].checkpoint, CHECKPOINT_EMBEDDING, 0);
        bytes += (size_t)(tensor.rows * tensor.cols) * dtype_bytes(tensor.dtype);
    }
    return bytes;
}

/* Leaders draw; 0 rows: this rank is none. */
static int draw_rows(const struct rank *r, int *vocab) {
    const struct rank_plan *plan = r->options.plan;
    bool leads_draft = r->options.rank == rank_plan_draft_leader(plan);
    *vocab = leads_draft ? checkpoint_config(r->parts[ENGINE_DRAFT].checkpoint)->vocab
                         : rank_target_config(r)->vocab;
    if (leads_draft) return plan->max_sequences;
    return r->options.rank == 0 ? rank_plan_logit_rows(plan) : 0;
}

/* On a device: counts of tokens and raw logits of every row (backend_sample_reserve). */
static size_t draw_bytes(const struct rank *r) {
    int vocab, n_rows = draw_rows(r, &vocab);
    return 2 * (size_t)n_rows * (size_t)vocab * sizeof(float);
}

static enum status compute_capacity(struct rank *r, struct error *err) {
    const struct rank_plan *plan = r->options.plan;
    bool has_target = r->parts[ENGINE_TARGET].shard_i >= 0;
    struct part *part = &r->parts[has_target ? ENGINE_TARGET : ENGINE_DRAFT];
    struct capacity_request request = {
        .config = checkpoint_config(part->checkpoint),
        .shard = &part->shard,
        .weights = plan->weights,
        .max_sequences = plan->max_sequences,
        .max_step_tokens = plan->max_step_tokens,
        .max_context = r->max_context,
        .max_logit_rows = has_target ? rank_plan_logit_rows(plan) : plan->max_sequences,
        .memory_bytes = r->options.memory_bytes,
        .kv_budget_bytes = plan->kv_budget_bytes,
    };
    if (has_target) request.beside = draft_footprint(r);
    if (r->options.isa >= BACKEND_CUDA) {
        request.beside.weights_bytes += table_bytes(r);
        request.beside.scratch_bytes += draw_bytes(r);
    }
    return capacity_compute(&r->capacity, &request, err);
}

static void name_role(struct rank *r) {
    const struct rank_plan *plan = r->options.plan;
    int target = r->parts[ENGINE_TARGET].shard_i, draft = r->parts[ENGINE_DRAFT].shard_i;
    size_t used = 0;
    if (target >= 0) {
        used = (size_t)snprintf(r->role, sizeof r->role, "target %d/%d", target,
                                plan->target_degree);
    }
    if (draft >= 0) {
        snprintf(r->role + used, sizeof r->role - used, "%sdraft %d/%d", used > 0 ? ", " : "",
                 draft, plan->draft_degree);
    }
}

enum status rank_open(struct rank **out, const struct rank_options *options, struct error *err) {
    enum status status;
    const struct rank_plan *plan = options->plan;
    struct rank *r = xcalloc(1, sizeof *r);
    r->options = *options;
    r->parts[ENGINE_DRAFT].shard_i = -1;
    TRY_OR_FAIL(open_part(r, ENGINE_TARGET, plan->model_dir, plan->fingerprint,
                          rank_plan_target_shard(plan, options->rank), plan->target_degree, err));
    if (plan->drafter == RANK_MODEL_DRAFTER) {
        TRY_OR_FAIL(open_part(r, ENGINE_DRAFT, plan->draft_dir, plan->draft_fingerprint,
                              rank_plan_draft_shard(plan, options->rank), plan->draft_degree, err));
    }
    TRY_OR_FAIL(set_context(r, err));
    TRY_OR_FAIL(compute_capacity(r, err));
    name_role(r);
    *out = r;
    return STATUS_OK;

fail:
    rank_close(r);
    return status;
}

void rank_close(struct rank *r) {
    if (r == NULL) return;
    drafter_destroy(r->drafter);
    engine_destroy(r->engine);
    for (int model = 0; model < ENGINE_N_MODELS; model++) {
        transformer_destroy(r->parts[model].transformer);
        comm_destroy(r->parts[model].tensors);
        if (r->parts[model].checkpoint != NULL) checkpoint_close(r->parts[model].checkpoint);
    }
    backend_destroy(r->backend);
    free(r);
}

const struct capacity *rank_capacity(const struct rank *r) {
    return &r->capacity;
}

uint64_t rank_target_fingerprint(const struct rank *r) {
    return checkpoint_fingerprint(r->parts[ENGINE_TARGET].checkpoint);
}

uint64_t rank_fingerprint(const struct rank *r) {
    uint64_t both = rank_target_fingerprint(r);
    if (r->parts[ENGINE_DRAFT].checkpoint == NULL) return both;
    return both * 31 + checkpoint_fingerprint(r->parts[ENGINE_DRAFT].checkpoint);
}

int rank_max_context(const struct rank *r) {
    return r->max_context;
}

const struct model_config *rank_target_config(const struct rank *r) {
    return checkpoint_config(r->parts[ENGINE_TARGET].checkpoint);
}

const char *rank_role(const struct rank *r) {
    return r->role;
}

/* --- loading ---------------------------------------------------------------------------------- */

static enum status load_part(struct rank *r, enum engine_model model, struct error *err) {
    struct part *part = &r->parts[model];
    const struct rank_plan *plan = r->options.plan;
    if (part->shard_i < 0) return STATUS_OK;
    bool draft = model == ENGINE_DRAFT;
    struct comm *group = draft ? r->loading.comms.draft : r->loading.comms.target;
    struct comm_tensors_options tensors = {
        .name = draft ? "draft" : "target",
        .backend = r->backend,
        .isa = r->options.isa,
        .device = r->options.device,
        .shares_device = r->options.shares_device,
        .one_process = r->options.one_process,
    };
    TRY(comm_tensors_create(&part->tensors, group, &tensors, err));
    struct transformer_options options = {
        .checkpoint = part->checkpoint,
        .backend = r->backend,
        .group = part->tensors != NULL ? part->tensors : group,
        .weights = plan->weights,
        .n_blocks = r->loading.n_blocks,
        .max_rows = rows_of(plan),
        .max_logit_rows = draft ? plan->max_sequences : rank_plan_logit_rows(plan),
        .max_context = r->max_context,
        .layer_owner = draft && owns_layers(plan),
        .max_layer_width = draft ? plan->max_layer_width : 1,
        .progress = r->loading.progress,
        .progress_user = r->loading.progress_user,
    };
    return transformer_create(&part->transformer, &options, err);
}

static int max_width(const struct rank *r) {
    int width = 0;
    for (int model = 0; model < ENGINE_N_MODELS; model++) {
        if (r->parts[model].shard_i < 0) continue;
        int own = model_config_max_width(checkpoint_config(r->parts[model].checkpoint));
        if (own > width) width = own;
    }
    return width;
}

static enum status load(struct rank *r, struct error *err) {
    const struct rank_plan *plan = r->options.plan;
    const struct rank_loading *loading = &r->loading;
    struct backend_options backend = {
        .isa = r->options.isa,
        .n_threads = r->options.n_threads,
        .max_rows = rows_of(plan),
        .max_width = max_width(r),
        .device = r->options.device,
    };
    TRY(backend_create(&r->backend, &backend, err));
    TRY(load_part(r, ENGINE_TARGET, err));
    TRY(load_part(r, ENGINE_DRAFT, err));
    int vocab, n_draws = draw_rows(r, &vocab);
    TRY(backend_sample_reserve(r->backend, n_draws, vocab, err));
    int blocks_per_sequence = (r->max_context + BACKEND_KV_BLOCK - 1) / BACKEND_KV_BLOCK;
    bool has_target = r->parts[ENGINE_TARGET].shard_i >= 0;
    struct engine_options engine = {
        .transformers = {r->parts[ENGINE_TARGET].transformer, r->parts[ENGINE_DRAFT].transformer},
        .group = has_target ? loading->comms.target : loading->comms.draft,
        .trace = loading->trace,
        .max_rows = rows_of(plan),
        .max_segments = plan->max_sequences,
        .max_logit_rows = rank_plan_logit_rows(plan),
        .max_blocks = plan->max_sequences * blocks_per_sequence,
    };
    r->engine = engine_create(&engine);
    return STATUS_OK;
}

/* Others may be waiting for this rank in its groups. */
enum status rank_load(struct rank *r, const struct rank_loading *loading, struct error *err) {
    r->loading = *loading;
    enum status status = load(r, err);
    struct comm *groups[] = {loading->comms.target, loading->comms.draft, loading->comms.pair};
    for (int i = 0; i < 3 && status != STATUS_OK; i++) {
        if (groups[i] != NULL) comm_abort(groups[i], err->text);
    }
    return status;
}

struct transformer *rank_transformer(struct rank *r, enum engine_model model) {
    return r->parts[model].transformer;
}

struct transformer_memory rank_memory(const struct rank *r) {
    struct transformer_memory sum = {0};
    for (int model = 0; model < ENGINE_N_MODELS; model++) {
        if (r->parts[model].transformer == NULL) continue;
        struct transformer_memory memory = transformer_memory(r->parts[model].transformer);
        sum.weights_bytes += memory.weights_bytes;
        sum.kv_bytes += memory.kv_bytes;
        sum.scratch_bytes += memory.scratch_bytes;
    }
    return sum;
}

/* --- leading and following -------------------------------------------------------------------- */

static int common_vocab(const struct rank *r) {
    int target = rank_target_config(r)->vocab;
    int draft = checkpoint_config(r->parts[ENGINE_DRAFT].checkpoint)->vocab;
    return draft < target ? draft : target;
}

static struct drafter *model_drafter(struct rank *r) {
    const struct rank_plan *plan = r->options.plan;
    struct model_drafter_options options = {
        .engine = r->engine,
        .backend = r->backend,
        .trace = r->loading.trace,
        .vocab = common_vocab(r),
        .stride = checkpoint_config(r->parts[ENGINE_DRAFT].checkpoint)->vocab,
        .n_blocks = r->loading.n_blocks,
        .max_sequences = plan->max_sequences,
        .max_rows = rows_of(plan),
        .prefix_cache = plan->prefix_cache,
        .keeps_distributions = plan->rule == SAMPLING_REJECTION,
        .keeps_fuzzy = plan->keeps_fuzzy,
        .replace = plan->replace,
        .replace_user = plan->replace_user,
        .feeds = backend_stream(r->backend) != NULL && plan->draft_degree == 1,
    };
    return model_drafter_create(&options);
}

enum status rank_lead(struct rank *r, struct rank_leadership *out, struct error *err) {
    const struct rank_plan *plan = r->options.plan;
    CHECK(r->options.rank == 0);
    *out = (struct rank_leadership){.engine = r->engine, .backend = r->backend};
    if (is_disjoint(plan)) {
        out->drafter_remote = true;
        TRY(remote_drafter_create(&r->drafter, r->loading.comms.pair,
                                  rank_target_config(r)->vocab, &out->handoff_ns, err));
    } else if (plan->drafter == RANK_MODEL_DRAFTER) {
        r->drafter = model_drafter(r);
    } else if (plan->drafter == RANK_NGRAM_DRAFTER) {
        r->drafter = ngram_drafter_create(plan->max_sequences);
    }
    out->drafter = r->drafter;
    return STATUS_OK;
}

enum status rank_stop(struct rank *r, struct error *err) {
    if (r->drafter != NULL) TRY(drafter_stop(r->drafter, err));
    return engine_stop(r->engine, err);
}

/* The draft's leader serves the target's; its own followers stop after it. */
static enum status serve_drafts(struct rank *r, struct error *err) {
    r->drafter = model_drafter(r);
    struct draft_service_options options = {
        .pair = r->loading.comms.pair,
        .drafter = r->drafter,
        .vocab = rank_target_config(r)->vocab,
        .max_sequences = r->options.plan->max_sequences,
        .trace = r->loading.trace,
    };
    TRY(draft_service_run(&options, err));
    return engine_stop(r->engine, err);
}

enum status rank_follow(struct rank *r, struct error *err) {
    if (r->options.rank == rank_plan_draft_leader(r->options.plan)) return serve_drafts(r, err);
    return engine_follow(r->engine, err);
}
