/* Speculation in the leader's step: tells the drafter what has become of every sequence and what
 * is wanted, takes its tokens in, lets the policy change, and counts. Between speculation_start
 * and speculation_finish the target computes; where draft and target are disjoint, so does the
 * draft.
 *
 * Owned and called by the target leader's compute thread, between scheduler and engine
 * (step_loop.c). */
#pragma once
#include "tandem/v1/replica.pb-c.h"
#include "worker/draft/drafter.h"
#include "worker/scheduler.h"
#include "worker/spec/accept.h"

struct speculation;
struct trace;

struct speculation_options {
    struct drafter *drafter; /* borrowed */
    bool remote;             /* on ranks of its own: overlapped modes are possible */
    int64_t handoff_ns;      /* measured, one way; 0 where not remote */
    int max_sequences;
    int max_window;
    struct trace *trace; /* NULL: none */
};

struct speculation *speculation_create(const struct speculation_options *options);
void speculation_destroy(struct speculation *speculation);

/* A policy as this replica can run it: overlapped modes become their serial ones where the drafter
 * is not remote, windows are cut to the largest. */
struct spec_policy speculation_fit(const struct speculation *speculation,
                                   const struct spec_policy *policy);
void speculation_set_policy(struct speculation *speculation, const struct spec_policy *policy);

/* Before the target's pass: items get their drafted tokens (behind the committed ones), all in
 * serial modes, those the target waits for in others; items shrink where fewer came. */
enum status speculation_start(struct speculation *speculation, struct scheduler_plan *plan,
                              int64_t now_ns, struct error *err);

/* After it: the rest of the tokens. pass_ns: what the target's pass took, 0: there was none. */
enum status speculation_finish(struct speculation *speculation, struct scheduler_plan *plan,
                               int64_t pass_ns, struct error *err);

/* The distribution [vocab] that the request's candidate at an absolute position was drawn from is
 * filled in, over zeros. */
enum status speculation_distribution(struct speculation *speculation, float *q,
                                     const struct request *request, int position,
                                     struct error *err);

/* The item's candidates were judged: `accepted` hold; the request has its new tokens. over: it
 * ended with the last of them, the others were not judged. Returns how many candidates stay as its
 * tail. */
int speculation_settle(struct speculation *speculation, const struct scheduler_item *item,
                       int accepted, bool over);

/* The request is over: its slot at the drafter becomes free. Any number of times. */
void speculation_end(struct speculation *speculation, struct request *request);

/* Nothing is running: the drafter learns which slots are free, and gives their memory back. */
enum status speculation_flush(struct speculation *speculation, struct error *err);

/* After the step: tokens it committed and how long it took, for the rate under this policy. */
void speculation_note_step(struct speculation *speculation, int n_tokens, int64_t step_ns);

/* What the coordinator is told. Arrays are borrowed until the next call. */
void speculation_describe(struct speculation *speculation, Tandem__V1__SpecStats *stats,
                          Tandem__V1__Policy *policy);

/* The part of one request. histogram is borrowed from the request. */
void speculation_report(const struct request *request, Tandem__V1__SpecReport *report);
