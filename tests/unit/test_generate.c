/* A real coordinator between a client and a scripted replica, over loopback: what drafting did to a
 * request, from the replica's columns to the client's chunks. */
#include <stdio.h>
#include <string.h>

#include "common/clock.h"
#include "common/spec_mode.h"
#include "coordinator/coordinator.h"
#include "tests/unit/test.h"

static const int64_t PATIENCE_NS = 20LL * 1000000000;
static const char *const STORY = "Once upon a time there was a little fox.";

struct way {
    struct coordinator *coordinator;
    struct rpc_channel *up, *down;
    struct rpc_stream *replica, *client;
    ProtobufCMessage *early;   /* for the replica, read while it was sending */
    uint64_t key;              /* of the request, once the replica has it */
    struct token_list story;   /* ids of STORY */
    /* What the client has got. */
    char text[1024];
    size_t n_text;
    int32_t ids[64];
    bool drafted[64];
    size_t pieces[64];         /* bytes of text that came with each token */
    size_t n_ids, n_marks;
    Tandem__V1__GenerateChunk *last;
};

/* ---- the replica's side ---------------------------------------------------------------------- */

static Tandem__V1__ReplicaDown *told(struct way *way, unsigned kind) {
    ProtobufCMessage *message = way->early;
    way->early = NULL;
    if (message == NULL) {
        cr_assert_eq(rpc_stream_recv(way->replica, &message, PATIENCE_NS), RPC_MESSAGE);
    }
    Tandem__V1__ReplicaDown *down = (Tandem__V1__ReplicaDown *)message;
    cr_assert_eq(down->kind_case, kind);
    return down;
}

static void tell(struct way *way, Tandem__V1__ReplicaUp *up) {
    cr_assert_eq(rpc_stream_send(way->replica, &up->base), STATUS_OK);
    /* Reading moves what was sent. */
    for (int i = 0; i < 2000 && rpc_stream_backlog(way->replica) > 0; i++) {
        ProtobufCMessage *message = NULL;
        if (rpc_stream_recv(way->replica, &message, 5000000) != RPC_MESSAGE) continue;
        cr_assert_null(way->early);
        way->early = message;
    }
    cr_assert_eq(rpc_stream_backlog(way->replica), 0);
}

static void join(struct way *way) {
    Tandem__V1__RankHello rank = TANDEM__V1__RANK_HELLO__INIT, *ranks[] = {&rank};
    Tandem__V1__Hello hello = TANDEM__V1__HELLO__INIT;
    Tandem__V1__Ready ready = TANDEM__V1__READY__INIT;
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    hello.protocol = FLEET_PROTOCOL;
    hello.replica_id = "scripted";
    hello.n_ranks = 1;
    hello.ranks = ranks;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_HELLO;
    up.hello = &hello;
    tell(way, &up);
    Tandem__V1__ReplicaDown *plan = told(way, TANDEM__V1__REPLICA_DOWN__KIND_PLAN);
    ready.kv_blocks = 1000;
    ready.max_sequences = 4;
    ready.max_context = 256;
    ready.checkpoint_fingerprint = plan->plan->checkpoint_fingerprint;
    rpc_message_free(&plan->base);
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_READY;
    up.ready = &ready;
    tell(way, &up);
    for (int i = 0; i < 2000 && !atomic_load(&way->coordinator->serving); i++) {
        clock_sleep_ns(5000000);
    }
    cr_assert(atomic_load(&way->coordinator->serving));
}

/* One step for the request: n of the story's tokens from `from` on. */
struct script {
    Tandem__V1__Step step;
    Tandem__V1__SpecReport report, *reports[1];
    uint32_t n, accepted, reason, cached, histogram[4];
};

static struct script *script_step(struct way *way, struct script *script, size_t from, uint32_t n,
                                  uint32_t accepted) {
    tandem__v1__step__init(&script->step);
    script->n = n;
    script->accepted = accepted;
    if (n == 0) return script;
    script->step.n_keys = script->step.n_token_counts = script->step.n_accepted_counts = 1;
    script->step.keys = &way->key;
    script->step.token_counts = &script->n;
    script->step.accepted_counts = &script->accepted;
    script->step.n_tokens = n;
    script->step.tokens = way->story.ids + from;
    return script;
}

/* The step ends the request: 3 rounds drafted 12 tokens, of which 4 held (0, 1, 3). */
static struct script *script_finish(struct way *way, struct script *script, uint32_t reason) {
    tandem__v1__spec_report__init(&script->report);
    memcpy(script->histogram, (uint32_t[]){1, 1, 0, 1}, sizeof script->histogram);
    script->report.mode = "pearl";
    script->report.drafts = 3;
    script->report.drafted_tokens = 12;
    script->report.accepted_tokens = 4;
    script->report.histogram = script->histogram;
    script->report.n_histogram = 4;
    script->reports[0] = &script->report;
    script->reason = reason;
    script->cached = 0;
    script->step.n_finished_keys = script->step.n_finish_reasons = script->step.n_cached_tokens = 1;
    script->step.n_spec_reports = 1;
    script->step.finished_keys = &way->key;
    script->step.finish_reasons = &script->reason;
    script->step.cached_tokens = &script->cached;
    script->step.spec_reports = script->reports;
    return script;
}

static void tell_step(struct way *way, struct script *script) {
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_STEP;
    up.step = &script->step;
    tell(way, &up);
}

/* ---- the client's side ----------------------------------------------------------------------- */

static void ask(struct way *way, const char *stop, const char *speculation,
                uint32_t n_speculative) {
    struct error err;
    Tandem__V1__GenerateRequest request = TANDEM__V1__GENERATE_REQUEST__INIT;
    Tandem__V1__SamplingParams sampling = TANDEM__V1__SAMPLING_PARAMS__INIT;
    ProtobufCBinaryData stops[] = {{stop != NULL ? strlen(stop) : 0, (uint8_t *)stop}};
    request.request_id = "asked";
    request.input_case = TANDEM__V1__GENERATE_REQUEST__INPUT_TEXT;
    request.text = (ProtobufCBinaryData){2, (uint8_t *)"Hi"};
    request.sampling = &sampling;
    request.speculation = (char *)speculation;
    request.num_speculative_tokens = n_speculative;
    sampling.stop = stops;
    sampling.n_stop = stop != NULL;
    cr_assert_eq(rpc_stream_open(&way->client, way->down, "/tandem.v1.Generation/Generate",
                                 &tandem__v1__generate_chunk__descriptor, 0, NULL, &err),
                 STATUS_OK);
    cr_assert_eq(rpc_stream_send(way->client, &request.base), STATUS_OK);
    rpc_stream_half_close(way->client);
    /* Nothing comes before the replica speaks; reading moves what was sent. */
    for (int i = 0; i < 2000 && rpc_stream_backlog(way->client) > 0; i++) {
        ProtobufCMessage *message = NULL;
        cr_assert_eq(rpc_stream_recv(way->client, &message, 5000000), RPC_TIMEOUT);
    }
}

/* The replica gets the request, with this wish. */
static void submitted(struct way *way, const char *speculation, uint32_t n_speculative) {
    Tandem__V1__ReplicaDown *down = told(way, TANDEM__V1__REPLICA_DOWN__KIND_WORK);
    cr_assert_eq(down->work->n_submits, 1);
    const Tandem__V1__Submit *submit = down->work->submits[0];
    cr_assert_str_eq(submit->speculation, speculation);
    cr_assert_eq(submit->num_speculative_tokens, n_speculative);
    way->key = submit->key;
    rpc_message_free(&down->base);
}

static void cancelled(struct way *way) {
    Tandem__V1__ReplicaDown *down = told(way, TANDEM__V1__REPLICA_DOWN__KIND_WORK);
    cr_assert_eq(down->work->n_cancels, 1);
    cr_assert(down->work->cancels[0] == way->key);
    rpc_message_free(&down->base);
}

static void keep_chunk(struct way *way, const Tandem__V1__GenerateChunk *chunk) {
    cr_assert(chunk->n_drafted == 0 || chunk->n_drafted == chunk->n_token_ids);
    cr_assert_eq(chunk->n_drafted, chunk->n_text_ends);
    for (size_t i = 0; i < chunk->n_token_ids; i++) {
        cr_assert(way->n_ids < 64);
        if (chunk->n_drafted > 0) {
            uint32_t from = i > 0 ? chunk->text_ends[i - 1] : 0;
            cr_assert(from <= chunk->text_ends[i] && chunk->text_ends[i] <= chunk->text.len);
            way->pieces[way->n_ids] = chunk->text_ends[i] - from;
            way->drafted[way->n_ids] = chunk->drafted[i];
            way->n_marks++;
        }
        way->ids[way->n_ids++] = chunk->token_ids[i];
    }
    if (chunk->text.len > 0) memcpy(way->text + way->n_text, chunk->text.data, chunk->text.len);
    way->n_text += chunk->text.len;
}

/* Reads until n tokens are here. */
static void read_tokens(struct way *way, size_t n) {
    while (way->n_ids < n) {
        ProtobufCMessage *message = NULL;
        cr_assert_eq(rpc_stream_recv(way->client, &message, PATIENCE_NS), RPC_MESSAGE);
        Tandem__V1__GenerateChunk *chunk = (Tandem__V1__GenerateChunk *)message;
        cr_assert_null(chunk->finish);
        keep_chunk(way, chunk);
        rpc_message_free(message);
    }
}

/* Reads to the end and returns how the call ended; way->last: the chunk with the finish, if any. */
static enum status read_end(struct way *way) {
    struct error end;
    ProtobufCMessage *message = NULL;
    enum rpc_event event;
    while ((event = rpc_stream_recv(way->client, &message, PATIENCE_NS)) == RPC_MESSAGE) {
        cr_assert_null(way->last);
        Tandem__V1__GenerateChunk *chunk = (Tandem__V1__GenerateChunk *)message;
        keep_chunk(way, chunk);
        if (chunk->finish != NULL) way->last = chunk;
        else rpc_message_free(message);
    }
    cr_assert_eq(event, RPC_CLOSED);
    return rpc_stream_end(way->client, &end);
}

static void expect_report(const struct way *way, const char *reason) {
    cr_assert_not_null(way->last);
    cr_assert_str_eq(way->last->finish->reason, reason);
    const Tandem__V1__SpeculationReport *report = way->last->finish->speculation;
    cr_assert_str_eq(report->mode, "pearl");
    cr_assert(report->mean_acceptance_length == 1 + 4.0 / 3);
    cr_assert(report->draft_acceptance_rate == 4.0 / 12);
    cr_assert_eq(report->num_spec_steps, 3);
    cr_assert_eq(report->num_draft_tokens, 12);
    cr_assert_eq(report->num_accepted_tokens, 4);
    cr_assert_eq(report->n_acceptance_histogram, 4);
    cr_assert_eq(report->acceptance_histogram[3], 1);
}

/* ---- before and after ------------------------------------------------------------------------ */

static void open_way(struct way *way) {
    struct error err;
    char address[64];
    struct coordinator_options options = coordinator_options_default();
    struct rpc_channel_options channel = rpc_channel_options_default();
    *way = (struct way){0};
    options.model_dir = TANDEM_SOURCE_DIR "/assets/models/llama-tale-target";
    options.port = options.http_port = 0;
    cr_assert_eq(coordinator_start(&way->coordinator, &options, &err), STATUS_OK, "%s", err.text);
    snprintf(address, sizeof address, "127.0.0.1:%d", coordinator_port(way->coordinator));
    cr_assert_eq(rpc_channel_create(&way->up, address, &channel, &err), STATUS_OK, "%s", err.text);
    cr_assert_eq(rpc_channel_create(&way->down, address, &channel, &err), STATUS_OK);
    cr_assert_eq(rpc_stream_open(&way->replica, way->up, "/tandem.v1.Replica/Attach",
                                 &tandem__v1__replica_down__descriptor, 0, NULL, &err), STATUS_OK);
    cr_assert_eq(tokenizer_encode(way->coordinator->model.tokenizer, &way->story, STORY,
                                  strlen(STORY), false, &err), STATUS_OK);
    cr_assert(way->story.n >= 8);
    join(way);
}

static void close_way(struct way *way) {
    if (way->last != NULL) rpc_message_free(&way->last->base);
    rpc_stream_destroy(way->client);
    rpc_stream_destroy(way->replica);
    rpc_channel_destroy(way->up);
    rpc_channel_destroy(way->down);
    coordinator_stop(way->coordinator);
    token_list_free(&way->story);
}

/* ---- tests ----------------------------------------------------------------------------------- */

Test(generate, marks_and_text_stay_with_their_tokens) {
    struct way way;
    struct script script;
    open_way(&way);
    ask(&way, NULL, "", 5);
    submitted(&way, "", 5);
    tell_step(&way, script_step(&way, &script, 0, 1, 0));
    tell_step(&way, script_step(&way, &script, 1, 3, 2));
    tell_step(&way, script_finish(&way, script_step(&way, &script, 4, 4, 4),
                                  TANDEM__V1__FINISH_REASON__FINISH_LENGTH));
    cr_assert_eq(read_end(&way), STATUS_OK);
    cr_assert_eq(way.n_ids, 8);
    cr_assert_eq(way.n_marks, 8);
    static const bool expected[] = {false, true, true, false, true, true, true, true};
    size_t n_bytes = 0;
    for (size_t i = 0; i < 8; i++) {
        cr_assert_eq(way.ids[i], way.story.ids[i]);
        cr_assert_eq(way.drafted[i], expected[i], "token %zu", i);
        cr_assert(way.pieces[i] > 0, "token %zu", i);
        n_bytes += way.pieces[i];
    }
    cr_assert_eq(n_bytes, way.n_text);
    /* A first word may bring the space that stands before it. */
    size_t skip = way.text[0] == ' ';
    cr_assert(way.n_text - skip >= 8 && strncmp(way.text + skip, STORY, way.n_text - skip) == 0);
    expect_report(&way, "length");
    close_way(&way);
}

Test(generate, a_replica_without_a_drafter_marks_nothing) {
    struct way way;
    struct script script;
    open_way(&way);
    ask(&way, NULL, "off", 0);
    submitted(&way, "plain", 0);
    script_finish(&way, script_step(&way, &script, 0, 2, 0),
                  TANDEM__V1__FINISH_REASON__FINISH_LENGTH);
    script.step.n_accepted_counts = script.step.n_spec_reports = 0;
    tell_step(&way, &script);
    cr_assert_eq(read_end(&way), STATUS_OK);
    cr_assert_eq(way.n_ids, 2);
    cr_assert_eq(way.n_marks, 0);
    const Tandem__V1__SpeculationReport *report = way.last->finish->speculation;
    cr_assert_str_eq(report->mode, "plain");
    cr_assert(report->mean_acceptance_length == 0 && report->draft_acceptance_rate == 0);
    cr_assert_eq(report->num_spec_steps + report->num_draft_tokens, 0);
    close_way(&way);
}

Test(generate, after_a_stop_string_the_finish_has_the_report) {
    struct way way;
    struct script script;
    open_way(&way);
    ask(&way, "upon a", "", 0);
    submitted(&way, "", 0);
    tell_step(&way, script_step(&way, &script, 0, 8, 7));
    cancelled(&way);
    tell_step(&way, script_finish(&way, script_step(&way, &script, 0, 0, 0),
                                  TANDEM__V1__FINISH_REASON__FINISH_CANCELLED));
    cr_assert_eq(read_end(&way), STATUS_OK);
    cr_assert(way.n_ids < 8);
    cr_assert_eq(way.n_marks, way.n_ids);
    way.text[way.n_text] = '\0';
    cr_assert(strstr(way.text, "Once ") && !strstr(way.text, "upon"), "%s", way.text);
    cr_assert(way.last->finish->stop_string.len == strlen("upon a"));
    expect_report(&way, "stop");
    close_way(&way);
}

Test(generate, a_stop_string_in_the_last_step_has_its_report) {
    struct way way;
    struct script script;
    open_way(&way);
    ask(&way, "upon a", "", 0);
    submitted(&way, "", 0);
    tell_step(&way, script_finish(&way, script_step(&way, &script, 0, 8, 7),
                                  TANDEM__V1__FINISH_REASON__FINISH_LENGTH));
    cr_assert_eq(read_end(&way), STATUS_OK);
    expect_report(&way, "stop");
    close_way(&way);
}

Test(generate, after_a_cancel_the_finish_has_the_report) {
    struct way way;
    struct script script;
    struct error err;
    ProtobufCMessage *response;
    Tandem__V1__CancelRequest request = TANDEM__V1__CANCEL_REQUEST__INIT;
    open_way(&way);
    ask(&way, NULL, "auto", SPEC_MAX_WINDOW);
    submitted(&way, "", SPEC_MAX_WINDOW);
    tell_step(&way, script_step(&way, &script, 0, 3, 1));
    read_tokens(&way, 3);
    request.request_id = "asked";
    cr_assert_eq(rpc_unary(way.up, "/tandem.v1.Generation/Cancel", &request.base,
                           &tandem__v1__cancel_response__descriptor, &response,
                           clock_now_ns() + PATIENCE_NS, NULL, 0, &err), STATUS_OK, "%s", err.text);
    cr_assert(((Tandem__V1__CancelResponse *)response)->found);
    rpc_message_free(response);
    cancelled(&way);
    tell_step(&way, script_finish(&way, script_step(&way, &script, 0, 0, 0),
                                  TANDEM__V1__FINISH_REASON__FINISH_CANCELLED));
    cr_assert_eq(read_end(&way), STATUS_OK);
    cr_assert_eq(way.n_ids, 3);
    expect_report(&way, "cancelled");
    close_way(&way);
}

Test(generate, a_finish_that_waits_comes_when_the_replica_is_lost) {
    struct way way;
    struct script script;
    open_way(&way);
    ask(&way, "upon a", "", 0);
    submitted(&way, "", 0);
    tell_step(&way, script_step(&way, &script, 0, 8, 7));
    cancelled(&way);
    rpc_stream_cancel(way.replica);
    cr_assert_eq(read_end(&way), STATUS_OK);
    cr_assert_not_null(way.last);
    cr_assert_str_eq(way.last->finish->reason, "stop");
    cr_assert_eq(way.last->finish->speculation->num_spec_steps, 0);
    close_way(&way);
}

/* Sends a step that contradicts itself; the replica is broken off with words that hold `words`. */
static void expect_broken_off(struct way *way, struct script *script, const char *words) {
    tell_step(way, script);
    Tandem__V1__ReplicaDown *down = told(way, TANDEM__V1__REPLICA_DOWN__KIND_REFUSAL);
    cr_assert(strstr(down->refusal->reason, words) != NULL, "%s", down->refusal->reason);
    rpc_message_free(&down->base);
    cr_assert_eq(read_end(way), STATUS_UNAVAILABLE);
    cr_assert_null(way->last);
    cr_assert_eq(way->n_ids, 0);
}

Test(generate, more_accepted_than_committed_is_a_contradiction) {
    struct way way;
    struct script script;
    open_way(&way);
    ask(&way, NULL, "", 0);
    submitted(&way, "", 0);
    expect_broken_off(&way, script_step(&way, &script, 0, 2, 3), "3 accepted tokens among the 2");
    close_way(&way);
}

Test(generate, accepted_counts_for_some_keys_are_a_contradiction) {
    struct way way;
    struct script script;
    uint32_t counts[] = {0, 0};
    open_way(&way);
    ask(&way, NULL, "", 0);
    submitted(&way, "", 0);
    script_step(&way, &script, 0, 2, 0);
    script.step.accepted_counts = counts;
    script.step.n_accepted_counts = 2;
    expect_broken_off(&way, &script, "2 accepted counts for 1 keys");
    close_way(&way);
}

Test(generate, a_report_that_contradicts_itself_ends_the_replica) {
    struct way way;
    struct script script;
    open_way(&way);
    ask(&way, NULL, "", 0);
    submitted(&way, "", 0);
    script_finish(&way, script_step(&way, &script, 0, 2, 0),
                  TANDEM__V1__FINISH_REASON__FINISH_LENGTH);
    script.report.drafts = 4;
    expect_broken_off(&way, &script, "histogram counts 3 rounds");
    close_way(&way);
}
