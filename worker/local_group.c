#include "worker/local_group.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

struct member {
    struct local_group *group;
    struct comm *comm;
    struct backend *backend;
    struct transformer *transformer;
    struct engine *engine;
    pthread_t thread;
    bool started;
    enum status loaded;
    struct error err;
};

struct local_group {
    struct local_group_options options;
    struct checkpoint *checkpoint;
    int max_context;
    struct member members[SHARD_LEAVES];
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
    if (options->pin_ranks) pin(comm_rank(member->comm));
    struct backend_options backend = {
        .isa = options->isa,
        .n_threads = options->n_threads,
        .max_rows = options->max_rows,
        .max_width = model_config_max_width(checkpoint_config(group->checkpoint)),
    };
    TRY(backend_create(&member->backend, &backend, &member->err));
    struct transformer_options transformer = {
        .checkpoint = group->checkpoint,
        .backend = member->backend,
        .group = member->comm,
        .weights = options->weights,
        .n_blocks = options->n_blocks,
        .max_rows = options->max_rows,
        .max_logit_rows = options->max_logit_rows,
        .max_context = group->max_context,
    };
    TRY(transformer_create(&member->transformer, &transformer, &member->err));
    int per_sequence = (group->max_context + BACKEND_KV_BLOCK - 1) / BACKEND_KV_BLOCK;
    struct engine_options engine = {
        .transformer = member->transformer,
        .group = member->comm,
        .max_rows = options->max_rows,
        .max_segments = options->max_sequences,
        .max_logit_rows = options->max_logit_rows,
        .max_blocks = options->max_sequences * per_sequence,
    };
    member->engine = engine_create(&engine);
    return STATUS_OK;
}

/* All members learn whether all have loaded. */
static bool all_loaded(struct member *member) {
    enum status all[SHARD_LEAVES];
    struct error err;
    if (comm_all_gather(member->comm, all, &member->loaded, sizeof member->loaded, &err) !=
        STATUS_OK) {
        return false;
    }
    for (int i = 0; i < comm_size(member->comm); i++) {
        if (all[i] != STATUS_OK) return false;
    }
    return true;
}

static void *follow(void *arg) {
    struct member *member = arg;
    member->loaded = load_member(member);
    if (!all_loaded(member)) return NULL;
    if (engine_follow(member->engine, &member->err) != STATUS_OK) {
        comm_abort(member->comm, member->err.text);
    }
    return NULL;
}

enum status local_group_create(struct local_group **out, const struct local_group_options *options,
                               struct error *err) {
    enum status status;
    struct local_group *group = xcalloc(1, sizeof *group);
    group->options = *options;
    TRY_OR_FAIL(checkpoint_open(&group->checkpoint, options->model_dir, err));
    const struct model_config *config = checkpoint_config(group->checkpoint);
    group->max_context = options->max_context > 0 ? options->max_context : config->max_position;
    struct comm *comms[SHARD_LEAVES];
    if (options->degree < 1 || options->degree > SHARD_LEAVES) {
        status = error_set(err, STATUS_INVALID_ARGUMENT, "degree %d, expected 1, 2, 4 or 8",
                           options->degree);
        goto fail;
    }
    TRY_OR_FAIL(comm_threads_create(comms, options->degree, err));
    for (int i = 0; i < options->degree; i++) {
        group->members[i].group = group;
        group->members[i].comm = comms[i];
    }
    for (int i = 1; i < options->degree; i++) {
        struct member *member = &group->members[i];
        CHECK(pthread_create(&member->thread, NULL, follow, member) == 0);
        member->started = true;
    }
    struct member *leader = &group->members[0];
    leader->loaded = load_member(leader);
    if (all_loaded(leader)) {
        *out = group;
        return STATUS_OK;
    }
    for (int i = 1; i < options->degree; i++) {
        pthread_join(group->members[i].thread, NULL);
        group->members[i].started = false;
    }
    status = STATUS_OK;
    for (int i = options->degree - 1; i >= 0; i--) {
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
    if (group->members[1].started) engine_stop(group->members[0].engine, &err);
    for (int i = 0; i < SHARD_LEAVES; i++) {
        if (group->members[i].started) pthread_join(group->members[i].thread, NULL);
    }
    for (int i = 0; i < SHARD_LEAVES; i++) {
        struct member *member = &group->members[i];
        engine_destroy(member->engine);
        transformer_destroy(member->transformer);
        backend_destroy(member->backend);
        if (member->comm != NULL) comm_destroy(member->comm);
    }
    if (group->checkpoint != NULL) checkpoint_close(group->checkpoint);
    free(group);
}

struct engine *local_group_engine(struct local_group *group) {
    return group->members[0].engine;
}

struct backend *local_group_backend(struct local_group *group) {
    return group->members[0].backend;
}

struct transformer *local_group_transformer(struct local_group *group) {
    return group->members[0].transformer;
}

const struct model_config *local_group_config(const struct local_group *group) {
    return checkpoint_config(group->checkpoint);
}
