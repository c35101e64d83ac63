/* The life of a request on the coordinator's thread: queue, replica, tokens to text, the end. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "coordinator/coordinator.h"
#include "coordinator/router.h"

enum { CHUNK_MAX_TOKENS = 4096 };   /* so that a chunk with 20 log-probs per token stays below 1 MiB */

static double seconds(int64_t from_ns, int64_t to_ns) {
    return from_ns == 0 || to_ns < from_ns ? 0 : (double)(to_ns - from_ns) / 1e9;
}

/* Frees the session when nobody will speak of it again. */
static void release_if_over(struct coordinator *c, struct session *session) {
    if (session->state != SESSION_DONE || !session->call_closed || !session->prepared) return;
    if (session->replica != NULL) return;
    session_table_remove(&c->sessions, session);
    session_free(session);
}

/* ---- the ends -------------------------------------------------------------------------------- */

/* Leaves the queue, or tells the replica to stop; the client's id is free again. */
static void detach(struct coordinator *c, struct session *session) {
    if (session->state == SESSION_QUEUED) admission_leave(&c->admission, &session->entry);
    if (session->replica != NULL && !session->cancel_sent) {
        line_cancel(session->replica, session->key);
        session->cancel_sent = true;
    }
    session_table_forget_id(&c->sessions, session);
    session->state = SESSION_DONE;
    session->done_ns = clock_now_ns();
}

/* Tokens already given to the RPC layer stay intact, those held here go out first. */
static void flush(struct session *session);

static void fail(struct coordinator *c, struct session *session, const struct error *err) {
    flush(session);
    session->ending = false;
    detach(c, session);
    rpc_call_fail(session->call, err);
    facts_refuse(&c->facts, err->status);
}

static void fill_usage(const struct session *session, Tandem__V1__Usage *usage,
                       Tandem__V1__Timing *timing) {
    usage->prompt_tokens = (uint32_t)session->prompt.n;
    usage->cached_tokens = session->n_cached;
    usage->completion_tokens = session->n_tokens;
    timing->queue_seconds = seconds(session->arrived_ns, session->started_ns);
    timing->total_seconds = seconds(session->arrived_ns, session->done_ns);
    if (session->first_token_ns == 0) return;
    timing->ttft_seconds = seconds(session->arrived_ns, session->first_token_ns);
    double rest = seconds(session->first_token_ns, session->last_token_ns);
    if (rest > 0) timing->tokens_per_second = (session->n_tokens - 1) / rest;
}

static void send_finish(struct session *session) {
    Tandem__V1__Usage usage = TANDEM__V1__USAGE__INIT;
    Tandem__V1__Timing timing = TANDEM__V1__TIMING__INIT;
    Tandem__V1__SpeculationReport speculation = TANDEM__V1__SPECULATION_REPORT__INIT;
    Tandem__V1__Finish finish = TANDEM__V1__FINISH__INIT;
    Tandem__V1__GenerateChunk chunk = TANDEM__V1__GENERATE_CHUNK__INIT;
    fill_usage(session, &usage, &timing);
    spec_report_describe(&session->report, &speculation);
    finish.reason = (char *)session->reason;
    int stop = stream_stop(session->stream);
    if (stop >= 0) finish.stop_string = session->params.stops[stop];
    if (stop < 0 && strcmp(session->reason, "stop") == 0) {
        finish.stop_token__case = TANDEM__V1__FINISH__STOP_TOKEN__STOP_TOKEN;
        finish.stop_token = session->last_token;
    }
    finish.seed = session->params.seed;
    finish.usage = &usage;
    finish.timing = &timing;
    finish.speculation = &speculation;
    chunk.request_id = session->id;
    chunk.finish = &finish;
    session->ending = false;
    if (rpc_call_send(session->call, &chunk.base) == STATUS_RESOURCE_EXHAUSTED) {
        rpc_call_abort(session->call, STATUS_INTERNAL, "the last chunk did not fit the send queue");
    }
    rpc_call_finish(session->call, STATUS_OK, NULL);
}

/* ---- chunks ---------------------------------------------------------------------------------- */

static bool has_output(const struct session *session) {
    return session->output.text.n > 0 || session->output.ids.n > 0;
}

/* The log-prob messages of the first n tokens; the caller frees *rows and *messages. Returns how many
 * alternatives they used. */
static size_t build_logprobs(const struct session_output *output, size_t n,
                             Tandem__V1__TokenLogprob **messages,
                             Tandem__V1__TokenLogprob ***rows) {
    const float *logprobs = (const float *)output->logprobs.data;
    const uint32_t *n_top = (const uint32_t *)output->n_top.data;
    float *top_logprobs = (float *)output->top_logprobs.data;
    size_t top = 0;
    *messages = xcalloc(n, sizeof **messages);
    *rows = xcalloc(n, sizeof **rows);
    for (size_t i = 0; i < n; i++) {
        Tandem__V1__TokenLogprob *row = &(*messages)[i];
        tandem__v1__token_logprob__init(row);
        row->token_id = output->ids.ids[i];
        row->logprob = logprobs[i];
        row->n_top_ids = row->n_top_logprobs = n_top[i];
        row->top_ids = output->top_ids.ids + top;
        row->top_logprobs = top_logprobs + top;
        top += n_top[i];
        (*rows)[i] = row;
    }
    return top;
}

static void drop_ids(struct token_list *list, size_t n) {
    if (n == 0) return;
    memmove(list->ids, list->ids + n, (list->n - n) * sizeof *list->ids);
    list->n -= n;
}

/* Takes out what a chunk carried: the first n tokens, n_bytes of text, `top` alternatives. */
static void drop_sent(struct session *session, size_t n, size_t n_bytes, size_t top) {
    struct session_output *output = &session->output;
    bytes_drop(&output->text, n_bytes);
    drop_ids(&output->ids, n);
    bytes_drop(&output->drafted, n * sizeof(protobuf_c_boolean));
    bytes_drop(&output->text_ends, n * sizeof(uint32_t));
    uint32_t *ends = (uint32_t *)output->text_ends.data;
    for (size_t i = 0; i < output->ids.n; i++) ends[i] -= (uint32_t)n_bytes;
    if (session->params.logprobs < 0) return;
    bytes_drop(&output->logprobs, n * sizeof(float));
    bytes_drop(&output->n_top, n * sizeof(uint32_t));
    drop_ids(&output->top_ids, top);
    bytes_drop(&output->top_logprobs, top * sizeof(float));
}

/* Sends the first tokens of the output with their text. False: the call takes nothing now. */
static bool send_chunk(struct session *session) {
    struct session_output *output = &session->output;
    Tandem__V1__GenerateChunk chunk = TANDEM__V1__GENERATE_CHUNK__INIT;
    Tandem__V1__TokenLogprob *messages = NULL, **rows = NULL;
    uint32_t *ends = (uint32_t *)output->text_ends.data;
    bool all = output->ids.n <= CHUNK_MAX_TOKENS;
    size_t n = all ? output->ids.n : CHUNK_MAX_TOKENS, top = 0;
    size_t n_bytes = all ? output->text.n : ends[n - 1];
    chunk.request_id = session->id;
    chunk.text = (ProtobufCBinaryData){n_bytes, (uint8_t *)output->text.data};
    chunk.n_token_ids = n;
    chunk.token_ids = output->ids.ids;
    if (session->has_drafter) {
        chunk.n_drafted = chunk.n_text_ends = n;
        chunk.drafted = (protobuf_c_boolean *)output->drafted.data;
        chunk.text_ends = ends;
    }
    if (session->params.logprobs >= 0) {
        top = build_logprobs(output, n, &messages, &rows);
        chunk.n_logprobs = n;
        chunk.logprobs = rows;
    }
    enum status status = rpc_call_send(session->call, &chunk.base);
    free(messages);
    free(rows);
    if (status == STATUS_RESOURCE_EXHAUSTED) return false;
    drop_sent(session, n, n_bytes, top);
    return true;
}

/* Whether the client has read enough to be sent more; if not, a drained event will come. */
static bool may_send(struct session *session) {
    if (rpc_call_backlog(session->call) == 0) return true;
    atomic_store(&session->wants_drain, true);
    /* It may have drained between the question and the wish. */
    return rpc_call_backlog(session->call) == 0;
}

/* The text is over, but the replica, which still has the request, will say what drafting did for it:
 * the finish waits for that, a step at most. */
static bool awaits_report(const struct session *session) {
    return session->has_drafter && session->replica != NULL && !session->reported;
}

/* Sends what the client can take; with nothing left and the end known, the finish. */
static void advance(struct session *session) {
    while (has_output(session)) {
        if (!may_send(session) || !send_chunk(session)) return;
    }
    if (!session->ending || awaits_report(session)) return;
    if (may_send(session)) send_finish(session);
}

/* Before an error: everything goes out, whatever the client has read. */
static void flush(struct session *session) {
    while (session->state != SESSION_PREPARING && has_output(session) && send_chunk(session)) continue;
}

static void finish(struct coordinator *c, struct session *session, enum facts_finish why) {
    static const char *const reasons[] = {"stop", "length", "cancelled"};
    if (!stream_end(session->stream, &session->output.text)) {
        session->reason = reasons[why];
    } else {
        session->reason = reasons[why = FACTS_STOP];
    }
    detach(c, session);
    session->ending = true;
    metric_add(c->facts.success[why], 1);
    metric_observe(c->facts.e2e, seconds(session->arrived_ns, session->done_ns));
    c->finished++;
    advance(session);
}

/* ---- arriving and routing -------------------------------------------------------------------- */

static enum status enter(struct coordinator *c, struct session *session, struct error *err) {
    int64_t retry_after_ms;
    if (session->refused.status != STATUS_OK) {
        *err = session->refused;
        return err->status;
    }
    if (c->shutting_down) return error_set(err, STATUS_UNAVAILABLE, "shutting down");
    if (!atomic_load(&c->serving)) {
        char why[500];
        fleet_explain(&c->fleet, why, sizeof why);
        return error_set(err, STATUS_UNAVAILABLE, "%s", why);
    }
    TRY(session_table_add(&c->sessions, session, err));
    enum status status = admission_enter(&c->admission, &session->entry, c->finished_per_second,
                                         &retry_after_ms, err);
    if (status == STATUS_RESOURCE_EXHAUSTED) {
        char text[32];
        snprintf(text, sizeof text, "%" PRId64, retry_after_ms);
        rpc_call_trailer(session->call, "retry-after-ms", text);
    }
    return status;
}

void generate_prepared(struct coordinator *c, struct session *session) {
    struct error err;
    session->prepared = true;
    if (session->call_closed) {
        session->state = SESSION_DONE;
        metric_add(c->facts.disconnected, 1);
    } else if (enter(c, session, &err) == STATUS_OK) {
        session->state = SESSION_QUEUED;
        generate_route(c);
    } else {
        fail(c, session, &err);
    }
    release_if_over(c, session);
}

void generate_route(struct coordinator *c) {
    struct router_load loads[FLEET_MAX_REPLICAS];
    struct admission_entry *entry;
    if (admission_first(&c->admission) == NULL) return;
    for (size_t i = 0; i < c->fleet.n_replicas; i++) {
        const struct replica *replica = c->fleet.replicas[i];
        /* Some beyond what runs, so that the replica's batch never waits for the network. */
        loads[i] = (struct router_load){replica->state == REPLICA_SERVING, replica->n_submitted,
                                        2 * replica->max_sequences, replica->n_tokens};
    }
    while ((entry = admission_first(&c->admission)) != NULL) {
        int best = router_pick(loads, c->fleet.n_replicas);
        if (best < 0) return;
        struct session *session = session_of_entry(entry);
        struct replica *replica = c->fleet.replicas[best];
        admission_leave(&c->admission, entry);
        session->state = SESSION_RUNNING;
        session->replica = replica;
        replica->n_submitted++;
        replica->n_tokens += session->prompt.n;
        loads[best].n_requests = replica->n_submitted;
        loads[best].n_tokens = replica->n_tokens;
        metric_add(c->facts.prompt_tokens, session->prompt.n);
        line_submit(replica, session);
    }
}

/* ---- a step's columns ------------------------------------------------------------------------ */

struct columns {
    const Tandem__V1__Step *step;
    size_t token, logprob, top;   /* how far each column is read */
};

/* The columns that only replicas with a drafter fill. */
static enum status check_speculation(const Tandem__V1__Step *step, struct error *err) {
    struct spec_report report;
    if ((step->n_accepted_counts != 0 && step->n_accepted_counts != step->n_keys) ||
        (step->n_spec_reports != 0 && step->n_spec_reports != step->n_finished_keys)) {
        return error_set(err, STATUS_INTERNAL,
                         "a step has %zu accepted counts for %zu keys and %zu reports for %zu "
                         "finished keys; expected one for each, or none",
                         step->n_accepted_counts, step->n_keys, step->n_spec_reports,
                         step->n_finished_keys);
    }
    for (size_t i = 0; i < step->n_accepted_counts; i++) {
        if (step->accepted_counts[i] <= step->token_counts[i]) continue;
        return error_set(err, STATUS_INTERNAL,
                         "a step has %" PRIu32 " accepted tokens among the %" PRIu32
                         " of key %" PRIu64, step->accepted_counts[i], step->token_counts[i],
                         step->keys[i]);
    }
    for (size_t i = 0; i < step->n_spec_reports; i++) {
        TRY(spec_report_take(&report, step->spec_reports[i], err));
    }
    return STATUS_OK;
}

/* Proves once that every later index is inside its column. */
static enum status check_columns(const struct coordinator *c, const struct replica *replica,
                                 const Tandem__V1__Step *step, struct error *err) {
    uint64_t tokens = 0, top = 0, asked = 0;
    if (step->n_keys != step->n_token_counts || step->n_finished_keys != step->n_finish_reasons ||
        step->n_finished_keys != step->n_cached_tokens || step->n_logprobs != step->n_n_top ||
        step->n_top_ids != step->n_top_logprobs) {
        return error_set(err, STATUS_INTERNAL, "a step's columns differ in length");
    }
    TRY(check_speculation(step, err));
    for (size_t i = 0; i < step->n_keys; i++) {
        const struct session *session = session_by_key(&c->sessions, step->keys[i]);
        if (session == NULL || session->replica != replica) {
            return error_set(err, STATUS_INTERNAL,
                             "a step has tokens for key %" PRIu64 ", which is not on this replica",
                             step->keys[i]);
        }
        tokens += step->token_counts[i];
        if (session->params.logprobs >= 0) asked += step->token_counts[i];
    }
    for (size_t i = 0; i < step->n_n_top; i++) top += step->n_top[i];
    if (tokens == step->n_tokens && asked == step->n_logprobs && top == step->n_top_ids) {
        return STATUS_OK;
    }
    return error_set(err, STATUS_INTERNAL,
                     "a step counts %" PRIu64 " tokens, %" PRIu64 " log-probs and %" PRIu64
                     " alternatives, its columns hold %zu, %zu and %zu",
                     tokens, asked, top, step->n_tokens, step->n_logprobs, step->n_top_ids);
}

static void take_logprob(struct session *session, struct columns *at, bool keep) {
    const Tandem__V1__Step *step = at->step;
    uint32_t n_top = step->n_top[at->logprob];
    struct session_output *output = &session->output;
    if (keep) {
        bytes_append(&output->logprobs, &step->logprobs[at->logprob], sizeof(float));
        bytes_append(&output->n_top, &n_top, sizeof n_top);
        for (uint32_t i = 0; i < n_top; i++) {
            token_list_push(&output->top_ids, step->top_ids[at->top + i]);
        }
        bytes_append(&output->top_logprobs, step->top_logprobs + at->top, n_top * sizeof(float));
    }
    at->logprob++;
    at->top += n_top;
}

/* One token; true: it completed a stop string. */
static bool take_token(struct session *session, int32_t id, bool drafted, bool is_end,
                       int64_t now_ns) {
    struct session_output *output = &session->output;
    protobuf_c_boolean flag = drafted;
    bool matched = false;
    if (is_end) stream_push_silent(session->stream);
    else matched = stream_push(session->stream, &output->text, id);
    uint32_t text_end = (uint32_t)output->text.n;
    token_list_push(&output->ids, id);
    bytes_append(&output->drafted, &flag, sizeof flag);
    bytes_append(&output->text_ends, &text_end, sizeof text_end);
    session->last_token = id;
    session->n_tokens++;
    session->last_token_ns = now_ns;
    return matched;
}

static void observe_tokens(struct coordinator *c, struct session *session, uint32_t n,
                           int64_t now_ns) {
    if (n == 0) return;
    if (session->first_token_ns == 0) {
        session->first_token_ns = now_ns;
        metric_observe(c->facts.ttft, seconds(session->arrived_ns, now_ns));
        return;
    }
    double each = seconds(session->last_token_ns, now_ns) / n;
    metric_observe_many(c->facts.itl, each, n);
}

/* The next n tokens, of which the first n_accepted were drafted. */
static void take_tokens(struct coordinator *c, struct session *session, struct columns *at,
                        uint32_t n, uint32_t n_accepted, int64_t now_ns) {
    bool matched = false;
    if (at->step->n_accepted_counts > 0) session->has_drafter = true;
    if (session->state == SESSION_RUNNING) observe_tokens(c, session, n, now_ns);
    for (uint32_t i = 0; i < n; i++) {
        int32_t id = at->step->tokens[at->token++];
        bool keep = session->state == SESSION_RUNNING && !matched;
        if (session->params.logprobs >= 0) take_logprob(session, at, keep);
        if (!keep) continue;
        bool is_end = i + 1 == n && session->step_finish == TANDEM__V1__FINISH_REASON__FINISH_STOP_TOKEN;
        matched = take_token(session, id, i < n_accepted, is_end, now_ns);
        session->replica->n_tokens++;
    }
    if (session->state != SESSION_RUNNING) return;
    if (matched) finish(c, session, FACTS_STOP);
    else if (session->step_finish == TANDEM__V1__FINISH_REASON__FINISH_NONE) advance(session);
}

static void end_with_error(struct coordinator *c, struct session *session, uint32_t reason) {
    struct error err;
    if (reason == TANDEM__V1__FINISH_REASON__FINISH_DEADLINE) {
        error_set(&err, STATUS_DEADLINE_EXCEEDED, "the request's deadline passed after %" PRIu32
                  " tokens", session->n_tokens);
    } else if (reason == TANDEM__V1__FINISH_REASON__FINISH_REFUSED) {
        error_set(&err, STATUS_INVALID_ARGUMENT,
                  "the prompt's %zu tokens with max_tokens %" PRIu32 " never fit the %" PRIu32
                  " KV blocks of replica %s; expected less",
                  session->prompt.n, session->params.max_tokens, session->replica->kv_blocks,
                  session->replica->id);
    } else {
        error_set(&err, STATUS_INTERNAL, "replica %s ended the request with reason %" PRIu32,
                  session->replica->id, reason);
    }
    fail(c, session, &err);
}

/* The replica has ended it and forgets the key. */
static void take_finish(struct coordinator *c, struct session *session, uint32_t cached) {
    uint32_t reason = session->step_finish;
    session->reported = true;
    session->n_cached = cached;
    session->step_finish = TANDEM__V1__FINISH_REASON__FINISH_NONE;
    if (session->state == SESSION_RUNNING) {
        if (reason == TANDEM__V1__FINISH_REASON__FINISH_STOP_TOKEN) finish(c, session, FACTS_STOP);
        else if (reason == TANDEM__V1__FINISH_REASON__FINISH_LENGTH) finish(c, session, FACTS_LENGTH);
        else if (reason == TANDEM__V1__FINISH_REASON__FINISH_CANCELLED) {
            finish(c, session, FACTS_CANCELLED);
        } else end_with_error(c, session, reason);
    }
    struct replica *replica = session->replica;
    uint64_t tokens = session->prompt.n + session->n_tokens;
    replica->n_submitted--;
    replica->n_tokens -= tokens < replica->n_tokens ? tokens : replica->n_tokens;
    session->replica = NULL;
    /* Of a text that ended earlier (a stop string, a cancel) the finish waited for the report. */
    if (session->ending && !session->call_closed) advance(session);
    release_if_over(c, session);
}

static void take_report(struct session *session, const Tandem__V1__SpecReport *said) {
    struct error err;
    /* Checked with the columns. */
    CHECK(spec_report_take(&session->report, said, &err) == STATUS_OK);
}

bool generate_step(struct coordinator *c, struct replica *replica, const Tandem__V1__Step *step,
                   struct error *err) {
    int64_t now_ns = clock_now_ns();
    if (check_columns(c, replica, step, err) != STATUS_OK) return false;
    for (size_t i = 0; i < step->n_started_keys; i++) {
        struct session *session = session_by_key(&c->sessions, step->started_keys[i]);
        if (session == NULL || session->started_ns != 0) continue;   /* preempted before */
        session->started_ns = now_ns;
        metric_observe(c->facts.queue_time, seconds(session->arrived_ns, now_ns));
    }
    for (size_t i = 0; i < step->n_finished_keys; i++) {
        struct session *session = session_by_key(&c->sessions, step->finished_keys[i]);
        if (session == NULL || session->replica != replica) {
            error_set(err, STATUS_INTERNAL, "a step finishes key %" PRIu64
                      ", which is not on this replica", step->finished_keys[i]);
            return false;
        }
        session->step_finish = step->finish_reasons[i];
        session->cancel_sent = true;   /* nothing is left to be cancelled */
        if (step->n_spec_reports > 0) take_report(session, step->spec_reports[i]);
    }
    struct columns at = {.step = step};
    for (size_t i = 0; i < step->n_keys; i++) {
        struct session *session = session_by_key(&c->sessions, step->keys[i]);
        uint32_t n_accepted = step->n_accepted_counts > 0 ? step->accepted_counts[i] : 0;
        take_tokens(c, session, &at, step->token_counts[i], n_accepted, now_ns);
    }
    for (size_t i = 0; i < step->n_finished_keys; i++) {
        struct session *session = session_by_key(&c->sessions, step->finished_keys[i]);
        if (session != NULL && session->replica == replica) take_finish(c, session, step->cached_tokens[i]);
    }
    return true;
}

/* ---- other events ---------------------------------------------------------------------------- */

void generate_drained(struct session *session) {
    if (!session->call_closed) advance(session);
}

void generate_closed(struct coordinator *c, struct session *session) {
    session->call_closed = true;
    if (session->prepared && session->state != SESSION_DONE) {
        metric_add(c->facts.disconnected, 1);
        log_debug("request %s: the client went away after %" PRIu32 " tokens", session->id,
                  session->n_tokens);
        detach(c, session);
    }
    release_if_over(c, session);
}

bool generate_cancel(struct coordinator *c, const char *id) {
    struct session *session = session_by_id(&c->sessions, id);
    if (session == NULL) return false;
    finish(c, session, FACTS_CANCELLED);
    return true;
}

void generate_expire(struct coordinator *c, int64_t now_ns) {
    struct admission_entry *entry;
    while ((entry = admission_expired(&c->admission, now_ns)) != NULL) {
        struct error err;
        struct session *session = session_of_entry(entry);
        error_set(&err, STATUS_DEADLINE_EXCEEDED,
                  "the request's deadline passed while it waited in the queue, after %.3f s",
                  seconds(session->arrived_ns, now_ns));
        fail(c, session, &err);
    }
}

void generate_fail_queued(struct coordinator *c, const struct error *err) {
    struct admission_entry *entry;
    while ((entry = admission_first(&c->admission)) != NULL) fail(c, session_of_entry(entry), err);
}

static void fail_one(struct coordinator *c, struct session *session, const struct replica *replica,
                     const struct error *err) {
    if (replica != NULL && session->replica != replica) return;
    if (replica != NULL) {   /* it is gone: there is nobody to be told */
        session->replica = NULL;
        session->cancel_sent = true;
    }
    if (session->state != SESSION_DONE) fail(c, session, err);
    else if (session->ending && !session->call_closed) advance(session);
    release_if_over(c, session);
}

void generate_fail_all(struct coordinator *c, const struct replica *replica,
                       const struct error *err) {
    for (size_t i = 0; i < SESSION_BUCKETS; i++) {
        for (struct session *session = c->sessions.by_key[i], *next; session != NULL; session = next) {
            next = session->next_by_key;
            fail_one(c, session, replica, err);
        }
    }
}
