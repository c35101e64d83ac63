/* A whole tensor-parallel group inside one process: ranks are threads (comm_threads), the caller is
 * rank 0. What tests, benches and the virtual cluster run the real engine in. */
#pragma once
#include "model/checkpoint.h"
#include "worker/engine.h"

struct local_group;

struct local_group_options {
    const char *model_dir;
    int degree;    /* 1, 2, 4, 8 */
    enum backend_isa isa;
    int n_threads; /* compute threads of each rank */
    enum dtype weights;
    int n_blocks;
    int max_rows;
    int max_logit_rows;
    int max_sequences;
    int max_context; /* 0: the model's */
    bool pin_ranks;  /* rank i stays on processor i (modulo their number): for measuring */
};

/* On failure (of any rank, in its words) nothing is left. */
enum status local_group_create(struct local_group **out, const struct local_group_options *options,
                               struct error *err);
void local_group_destroy(struct local_group *group);

/* Rank 0's, borrowed. */
struct engine *local_group_engine(struct local_group *group);
struct backend *local_group_backend(struct local_group *group);
struct transformer *local_group_transformer(struct local_group *group);
const struct model_config *local_group_config(const struct local_group *group);
