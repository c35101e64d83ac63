/* What a drafter knows of each sequence: its tokens (committed ones, then candidates), how it is
 * sampled, and a rolling hash of the committed tokens by which target and drafter notice at once
 * if they ever disagree. Pure book-keeping; every drafter has one. */
#pragma once
#include "worker/draft/drafter.h"

struct draft_sequence {
    bool live;
    int32_t *tokens; /* committed, then candidates */
    int token_capacity;
    int n_prompt, n_committed, n_candidates;
    uint64_t hash; /* of the committed tokens */
    struct sample_params sampling;
    struct sample_bias *bias;
    int32_t *stop_ids;
    int n_stop_ids, min_tokens;
};

struct draft_history {
    struct draft_sequence *sequences; /* [n_slots] */
    int n_slots, vocab;
};

/* Committed ids from `vocab` on (a target's longer padded tail) are kept as id 0, so that a draft
 * model can be fed with them; the hash is of what they are. */
struct draft_history *draft_history_create(int n_slots, int vocab);
void draft_history_destroy(struct draft_history *history);

/* CHECKs that the slot is free. */
struct draft_sequence *draft_history_begin(struct draft_history *history,
                                           const struct draft_begin *begin);
void draft_history_end(struct draft_history *history, int slot);

/* Applies what a job says has happened. *dropped: candidates fell. ABORTED, with this side's last
 * tokens in the words, when the outcome is not what the target says it is. */
enum status draft_history_apply(struct draft_history *history, const struct draft_job *job,
                                bool *dropped, struct error *err);

/* A candidate behind all others. */
void draft_history_append(struct draft_sequence *sequence, int32_t token);

static inline int draft_sequence_length(const struct draft_sequence *sequence) {
    return sequence->n_committed + sequence->n_candidates;
}

/* The sampling parameters of the token behind the sequence's last one: end tokens are banned before
 * min_tokens. */
struct sample_params draft_sequence_params(const struct draft_sequence *sequence);

/* Whether nothing is worth drafting behind this token. */
bool draft_sequence_ends_with(const struct draft_sequence *sequence, int32_t token);

/* The hash after one more token; 0 is the hash of nothing. */
uint64_t draft_history_hash(uint64_t hash, int32_t token);
