/* What runs in the next step: continuous batching at iteration level, chunked prefill under a
 * token budget, prefix reuse at admission, preemption by recompute, and the rows of each
 * sequence's round of speculation. Pure: time is an argument, tokens come in and plans go out.
 *
 * A request holds its tokens (prompt, then output) and how many of them have KV. All that is left
 * is prefill if it is more than one row, decoding if it is one: a preempted request computes its
 * own output again as if it were prompt, and never draws a token twice. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "worker/kv_blocks.h"
#include "worker/spec/policy.h"

/* Why a request ended; the numbers are replica.proto's FinishReason. */
enum finish_reason {
    FINISH_NONE = 0,
    FINISH_STOP_TOKEN = 1,
    FINISH_LENGTH = 2,
    FINISH_CANCELLED = 3,
    FINISH_DEADLINE = 4,
    FINISH_REFUSED = 5,
};

enum request_state { REQUEST_WAITING, REQUEST_RUNNING, REQUEST_ENDED };

/* A candidate's origin, kept until it is judged. */
struct candidate {
    float q;    /* probability it was drawn with (sampling rule `rejection`) */
    bool fuzzy; /* of a layer-parallel step */
};

/* What speculation remembers of a request (worker/speculation.h keeps it). */
struct request_spec {
    struct spec_wish wish;
    int n_tail; /* unjudged candidates behind the committed tokens, in `tokens` as well */
    struct candidate candidates[2 * SPEC_MAX_WINDOW]; /* tail, then this round's */
    /* At the drafter: its slot (-1: not known there), how many committed tokens it knows of, and what has
     * happened since it was told. */
    int slot, n_told, n_accepted_since;
    bool abandon; /* its candidates were dropped unjudged */
    uint64_t hash; /* of the first n_hashed tokens */
    int n_hashed;
    uint32_t drafts, drafted, accepted, histogram[SPEC_MAX_WINDOW + 1];
    uint32_t rounds_in_mode[SPEC_N_MODES];
};

/* Owned by the scheduler from scheduler_submit until scheduler_forget. */
struct request {
    uint64_t key;
    int32_t *tokens; /* prompt, then output, then candidates; grows */
    int n_prompt, n_tokens, token_capacity;

    struct sample_params sampling; /* borrows the three arrays below */
    struct sample_bias *bias;
    int32_t *stop_ids; /* end tokens of this request (EOS included unless ignored) */
    int n_stop_ids;
    int max_tokens, min_tokens;
    int64_t deadline_ns; /* 0: none */

    enum request_state state;
    enum finish_reason reason; /* when ended */
    bool cancelled;
    bool started;       /* has been scheduled once */
    int n_computed;     /* positions 0..n_computed-1 have KV */
    int n_cached;       /* prompt positions found in the prefix cache when first admitted */
    int n_preemptions;
    struct kv_sequence kv;
    struct request_spec spec;
    struct request *next; /* in the queue it stands in */
};

struct scheduler;

struct scheduler_options {
    struct kv_blocks *pool; /* borrowed */
    int n_blocks;           /* of the pool */
    int max_sequences;      /* running at once */
    int max_step_tokens;    /* rows of one step; more than max_sequences, so that prefill moves on */
    int max_context;        /* positions of one sequence */
    int max_logit_rows;     /* of one step; 0: max_sequences, the least */
};

/* Rows of one sequence in the coming step: positions position .. position + n_rows - 1. */
struct scheduler_item {
    struct request *request;
    int position;
    int n_rows;
    bool draws; /* the rows reach the last known token: a token is drawn after them */
    struct round_plan round; /* of a sequence that decodes; of one that prefills: nothing drafted */
};

/* Arrays are the scheduler's, valid until the next scheduler_plan or scheduler_submit. */
struct scheduler_plan {
    struct scheduler_item *items;
    int n_items;
    int n_rows, n_prefill_rows; /* sums over items */
    struct request **ended;     /* cancelled, expired or refused; no longer scheduled */
    int n_ended;
    struct request **started;   /* scheduled for the first time */
    int n_started;
};

struct scheduler *scheduler_create(const struct scheduler_options *options);
void scheduler_destroy(struct scheduler *scheduler);

/* In force from the next plan on; plain to begin with. */
void scheduler_set_policy(struct scheduler *scheduler, const struct spec_policy *policy);

/* Takes the request (tokens, parameters, limits and wish filled in, spec.slot -1, the rest zero).
 * One that can never run ends with FINISH_REFUSED in the next plan. */
void scheduler_submit(struct scheduler *scheduler, struct request *request);

/* It ends in the next plan. False: there is no such request. */
bool scheduler_cancel(struct scheduler *scheduler, uint64_t key);

/* Decides the next step. Ended requests come first out of the way; then every decoding sequence
 * gets the rows of its round (round.h), a single one where memory is short; what the budget leaves
 * goes to prefill, first of running sequences, then of waiting ones, in the order of arrival. When
 * KV runs out the youngest running sequence is preempted. */
struct scheduler_plan *scheduler_plan(struct scheduler *scheduler, int64_t now_ns);

/* Before the forward pass: the drafter made fewer tokens than the item's round planned. */
void scheduler_made(struct scheduler_item *item, int made);

/* After the forward pass: the item's rows have KV. */
void scheduler_computed(struct scheduler *scheduler, const struct scheduler_item *item);

/* Room for so many tokens in request->tokens. */
void scheduler_reserve(struct request *request, int n_tokens);

/* Commits a drawn token. Returns FINISH_NONE, or why the request ends with it (it is then no longer
 * scheduled and its KV is given back; its memory stays until scheduler_forget). */
enum finish_reason scheduler_commit(struct scheduler *scheduler, struct request *request,
                                    int32_t token);

/* After the round's commits: n_tail candidates stay; KV behind the committed tokens is cut. Only
 * while the request runs. */
void scheduler_settle(struct scheduler *scheduler, struct request *request, int n_tail);

/* Frees an ended request. */
void scheduler_forget(struct scheduler *scheduler, struct request *request);

bool scheduler_idle(const struct scheduler *scheduler);
int scheduler_n_running(const struct scheduler *scheduler);
int scheduler_n_waiting(const struct scheduler *scheduler);
uint64_t scheduler_n_preemptions(const struct scheduler *scheduler);
