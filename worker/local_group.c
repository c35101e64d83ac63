#include "worker/local_group.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "worker/trace.h"

enum { MAX_MEMBERS = 2 * SHARD_LEAVES };

struct member {
    struct local_group *group;
    int rank_i;
    struct comm *world;
    struct rank_comms comms;
    struct rank *rank;
    struct trace *trace;
    pthread_t thread;
    bool started;
    enum status loaded;
    struct error err;
};

struct local_group {
    struct local_group_options options;
    struct rank_plan plan;
    struct rank_leadership leadership;
    int n_members;
    bool led; /* followers run */
    struct member members[MAX_MEMBERS];
};

static void pin(int processor_i) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(processor_i % (int)sysconf(_SC_NPROCESSORS_ONLN), &cpus);
    pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus);
}

static enum status load_member(struct member *member) {
    struct local_group *group = member->group;
    const struct local_group_options *options = &group->options;
    if (options->pin_ranks) pin(member->rank_i);
    struct rank_options rank = {
        .plan = &group->plan,
        .rank = member->rank_i,
        .isa = options->isa == BACKEND_AUTO ? backend_isa_best() : options->isa,
        .shares_device = true,
        .one_process = true,
        .n_threads = options->n_threads,
        .memory_bytes = INT64_MAX / 1024,
    };
    TRY(rank_open(&member->rank, &rank, &member->err));
    if (options->trace_file != NULL) {
        char lane[96];
        snprintf(lane, sizeof lane, "rank %d: %s", member->rank_i, rank_role(member->rank));
        TRY(trace_create(&member->trace, member->world, lane, &member->err));
    }
    struct rank_loading loading = {
        .comms = member->comms,
        .n_blocks = options->n_blocks,
        .trace = member->trace,
    };
    return rank_load(member->rank, &loading, &member->err);
}

/* All members learn whether all have loaded. */
static bool all_loaded(struct member *member) {
    enum status all[MAX_MEMBERS];
    struct error err;
    if (comm_all_gather(member->world, all, &member->loaded, sizeof member->loaded, &err) !=
        STATUS_OK) {
        return false;
    }
    for (int i = 0; i < comm_size(member->world); i++) {
        if (all[i] != STATUS_OK) return false;
    }
    return true;
}

static void abort_groups(struct member *member) {
    struct comm *comms[] = {member->world, member->comms.target, member->comms.draft,
                            member->comms.pair};
    for (size_t i = 0; i < sizeof comms / sizeof *comms; i++) {
        if (comms[i] != NULL) comm_abort(comms[i], member->err.text);
    }
}

static void write_trace(struct member *member) {
    const char *path = member->group->options.trace_file;
    if (member->trace == NULL) return;
    struct error err;
    if (trace_write(member->trace, member->world, path, &err) != STATUS_OK) {
        fprintf(stderr, "%s\n", err.text);
    }
}

static void *follow(void *arg) {
    struct member *member = arg;
    member->loaded = load_member(member);
    if (!all_loaded(member)) return NULL;
    if (rank_follow(member->rank, &member->err) == STATUS_OK) write_trace(member);
    else abort_groups(member);
    return NULL;
}

static void fill_plan(struct local_group *group) {
    const struct local_group_options *options = &group->options;
    struct rank_plan *plan = &group->plan;
    snprintf(plan->model_dir, sizeof plan->model_dir, "%s", options->model_dir);
    plan->weights = options->weights;
    plan->target_degree = options->degree;
    plan->max_sequences = options->max_sequences;
    plan->max_step_tokens = options->max_rows;
    plan->max_context = options->max_context;
    plan->prefix_cache = options->prefix_cache;
    plan->kv_budget_bytes = 0;
    plan->max_window = options->max_window > 0 ? options->max_window : SPEC_MAX_WINDOW;
    plan->max_layer_width = options->max_layer_width > 0 ? options->max_layer_width : 1;
    plan->rule = options->rule;
    plan->keeps_fuzzy = options->keeps_fuzzy;
    plan->replace = options->replace;
    plan->replace_user = options->replace_user;
    plan->max_logit_rows = options->max_logit_rows;
    if (options->ngram) plan->drafter = RANK_NGRAM_DRAFTER;
    if (options->draft_dir == NULL) return;
    plan->drafter = RANK_MODEL_DRAFTER;
    plan->shared = options->shared;
    plan->draft_degree = options->draft_degree > 0 ? options->draft_degree : 1;
    snprintf(plan->draft_dir, sizeof plan->draft_dir, "%s", options->draft_dir);
}

/* One group of those members that `first` .. `first + n` count. */
static enum status make_comms(struct local_group *group, int first, int n, size_t field,
                              struct error *err) {
    struct comm *comms[MAX_MEMBERS];
    TRY(comm_threads_create(comms, n, err));
    for (int i = 0; i < n; i++) {
        memcpy((char *)&group->members[first + i] + field, &comms[i], sizeof *comms);
    }
    return STATUS_OK;
}

static enum status make_groups(struct local_group *group, struct error *err) {
    const struct rank_plan *plan = &group->plan;
    TRY(make_comms(group, 0, group->n_members, offsetof(struct member, world), err));
    TRY(make_comms(group, 0, plan->target_degree, offsetof(struct member, comms.target), err));
    if (plan->drafter != RANK_MODEL_DRAFTER) return STATUS_OK;
    int leader = rank_plan_draft_leader(plan);
    TRY(make_comms(group, leader < 0 ? 0 : leader, plan->draft_degree,
                   offsetof(struct member, comms.draft), err));
    if (leader < 0) return STATUS_OK;
    struct comm *pair[2];
    TRY(comm_threads_create(pair, 2, err));
    group->members[0].comms.pair = pair[0];
    group->members[leader].comms.pair = pair[1];
    return STATUS_OK;
}

static enum status check_degrees(const struct rank_plan *plan, struct error *err) {
    int target = plan->target_degree, draft = plan->draft_degree;
    if (target < 1 || target > SHARD_LEAVES || draft < 0 || draft > SHARD_LEAVES ||
        (plan->shared && draft > target)) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "degrees %d (target) and %d (draft), expected 1, 2, 4 or 8, the draft's at "
                         "most the target's where they share ranks", target, draft);
    }
    return STATUS_OK;
}

enum status local_group_create(struct local_group **out, const struct local_group_options *options,
                               struct error *err) {
    enum status status;
    struct local_group *group = xcalloc(1, sizeof *group);
    group->options = *options;
    fill_plan(group);
    TRY_OR_FAIL(check_degrees(&group->plan, err));
    group->n_members = rank_plan_n_ranks(&group->plan);
    TRY_OR_FAIL(make_groups(group, err));
    for (int i = 0; i < group->n_members; i++) {
        group->members[i].group = group;
        group->members[i].rank_i = i;
    }
    for (int i = 1; i < group->n_members; i++) {
        struct member *member = &group->members[i];
        CHECK(pthread_create(&member->thread, NULL, follow, member) == 0);
        member->started = true;
    }
    struct member *leader = &group->members[0];
    leader->loaded = load_member(leader);
    if (all_loaded(leader)) {
        group->led = true;
        TRY_OR_FAIL(rank_lead(leader->rank, &group->leadership, err));
        *out = group;
        return STATUS_OK;
    }
    for (int i = 1; i < group->n_members; i++) {
        pthread_join(group->members[i].thread, NULL);
        group->members[i].started = false;
    }
    status = STATUS_OK;
    for (int i = group->n_members - 1; i >= 0; i--) {
        if (group->members[i].loaded == STATUS_OK) continue;
        *err = group->members[i].err;
        status = group->members[i].loaded;
    }

fail:
    local_group_destroy(group);
    return status;
}

void local_group_destroy(struct local_group *group) {
    if (group == NULL) return;
    struct error err;
    if (group->led) {
        struct member *leader = &group->members[0];
        if (rank_stop(leader->rank, &err) == STATUS_OK) {
            write_trace(leader);
        } else {
            leader->err = err;
            abort_groups(leader);
        }
    }
    for (int i = 0; i < group->n_members; i++) {
        if (group->members[i].started) pthread_join(group->members[i].thread, NULL);
    }
    for (int i = 0; i < group->n_members; i++) {
        struct member *member = &group->members[i];
        rank_close(member->rank);
        trace_destroy(member->trace);
        struct comm *comms[] = {member->world, member->comms.target, member->comms.draft,
                                member->comms.pair};
        for (size_t j = 0; j < sizeof comms / sizeof *comms; j++) {
            if (comms[j] != NULL) comm_destroy(comms[j]);
        }
    }
    free(group);
}

struct engine *local_group_engine(struct local_group *group) {
    return group->leadership.engine;
}

struct backend *local_group_backend(struct local_group *group) {
    return group->leadership.backend;
}

struct transformer *local_group_transformer(struct local_group *group) {
    return rank_transformer(group->members[0].rank, ENGINE_TARGET);
}

struct transformer *local_group_draft(struct local_group *group) {
    return rank_transformer(group->members[0].rank, ENGINE_DRAFT);
}

const struct model_config *local_group_config(const struct local_group *group) {
    return rank_target_config(group->members[0].rank);
}

const struct rank_leadership *local_group_leadership(const struct local_group *group) {
    return &group->leadership;
}

struct trace *local_group_trace(struct local_group *group) {
    return group->members[0].trace;
}
