/* The RPC layer: a server and its clients in one process over loopback. */
#include "tests/unit/test.h"

#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/clock.h"
#include "proto/rpc.h"
#include "tandem/v1/generation.pb-c.h"

#define SECOND 1000000000LL
#define ECHO "/test.Rpc/Echo"
#define COUNT "/test.Rpc/Count"
#define HANG "/test.Rpc/Hang"
#define FAIL "/test.Rpc/Fail"
#define ABORT "/test.Rpc/Abort"
#define CHAT "/test.Rpc/Chat"
#define LIMITED "/test.Rpc/Limited"

/* What the server side of a test saw. */
static struct {
    atomic_int n_open, n_closed, n_cancelled, accepted, refused;
    _Atomic int64_t deadline_ns, closed_ns;
    char user_agent[64], peer[64];
} seen;

/* ---- the service under test ------------------------------------------------------------------ */

static void echo(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)user;
    const Tandem__V1__TokenizeRequest *request = (const void *)message;
    rpc_call_metadata(call, "user-agent", seen.user_agent, sizeof seen.user_agent);
    snprintf(seen.peer, sizeof seen.peer, "%s", rpc_call_peer(call));
    Tandem__V1__TokenizeResponse answer = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
    answer.text = request->text;
    rpc_call_reply(call, &answer.base);
}

/* Streams ids[0] answers of ids[1] bytes, as fast as the client reads. */
struct count {
    int left;
    size_t bytes;
    int next;
};

static void count_on(struct rpc_call *call, void *user) {
    (void)user;
    struct count *count = rpc_call_data(call);
    static const uint8_t padding[1 << 16];
    while (count->left > 0) {
        Tandem__V1__TokenizeResponse answer = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
        answer.n_ids = 1;
        answer.ids = &count->next;
        answer.text = (ProtobufCBinaryData){count->bytes, (uint8_t *)padding};
        enum status status = rpc_call_send(call, &answer.base);
        if (status == STATUS_RESOURCE_EXHAUSTED) atomic_fetch_add(&seen.refused, 1);
        if (status != STATUS_OK) return;
        atomic_fetch_add(&seen.accepted, 1);
        count->left--;
        count->next++;
    }
    rpc_call_finish(call, STATUS_OK, NULL);
}

static void count_begin(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    const Tandem__V1__DetokenizeRequest *request = (const void *)message;
    struct count *count = xcalloc(1, sizeof *count);
    count->left = request->ids[0];
    count->bytes = (size_t)request->ids[1];
    rpc_call_set_data(call, count);
    atomic_fetch_add(&seen.n_open, 1);
    count_on(call, user);
}

static void closed(struct rpc_call *call, bool cancelled, void *user) {
    (void)user;
    free(rpc_call_data(call));
    atomic_store(&seen.closed_ns, clock_now_ns());
    if (cancelled) atomic_fetch_add(&seen.n_cancelled, 1);
    if (cancelled != rpc_call_cancelled(call)) abort();
    atomic_fetch_add(&seen.n_closed, 1);
}

static void hang(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message, (void)user;
    atomic_store(&seen.deadline_ns, rpc_call_deadline_ns(call));
    atomic_fetch_add(&seen.n_open, 1);
}

static void fail(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message, (void)user;
    rpc_call_trailer(call, "retry-after-ms", "250");
    rpc_call_finish(call, STATUS_RESOURCE_EXHAUSTED, "the queue is full");
    rpc_call_finish(call, STATUS_OK, "only the first finish counts");
}

static void abort_call(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message, (void)user;
    rpc_call_abort(call, STATUS_ABORTED, "enough");
    Tandem__V1__TokenizeResponse answer = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
    if (rpc_call_send(call, &answer.base) != STATUS_CANCELLED) abort();
}

static void chat(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)user;
    const Tandem__V1__TokenizeRequest *request = (const void *)message;
    Tandem__V1__TokenizeResponse answer = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
    answer.text = request->text;
    rpc_call_send(call, &answer.base);
}

static void chat_open(struct rpc_call *call, void *user) {
    (void)call, (void)user;
    atomic_fetch_add(&seen.n_open, 1);
}

static void chat_half_close(struct rpc_call *call, void *user) {
    (void)user;
    rpc_call_finish(call, STATUS_OK, "bye");
}

static const struct rpc_method methods[] = {
    {.path = ECHO, .request = &tandem__v1__tokenize_request__descriptor, .on_message = echo},
    {.path = COUNT, .request = &tandem__v1__detokenize_request__descriptor,
     .on_message = count_begin, .on_drained = count_on, .on_closed = closed},
    {.path = HANG, .request = &tandem__v1__detokenize_request__descriptor, .on_message = hang,
     .on_closed = closed},
    {.path = FAIL, .request = &tandem__v1__detokenize_request__descriptor, .on_message = fail},
    {.path = ABORT, .request = &tandem__v1__detokenize_request__descriptor,
     .on_message = abort_call},
    {.path = CHAT, .kind = RPC_REQUEST_STREAM, .on_open = chat_open, .on_message = chat,
     .on_half_close = chat_half_close, .on_closed = closed,
     .request = &tandem__v1__tokenize_request__descriptor},
    {.path = LIMITED, .request = &tandem__v1__detokenize_request__descriptor, .on_message = hang,
     .on_closed = closed, .lifetime_max_ms = 300},
};
static const struct rpc_service service = {methods, sizeof methods / sizeof methods[0], NULL};

/* ---- fixture --------------------------------------------------------------------------------- */

struct pair {
    struct rpc_server *server;
    struct rpc_channel *channel;
};

static struct rpc_channel *dial(int port) {
    char target[32];
    snprintf(target, sizeof target, "127.0.0.1:%d", port);
    struct rpc_channel_options options = rpc_channel_options_default();
    struct rpc_channel *channel;
    struct error err;
    return rpc_channel_create(&channel, target, &options, &err) == STATUS_OK ? channel : NULL;
}

static struct pair pair_create_with(const struct rpc_server_options *options) {
    struct pair pair = {0};
    struct error err;
    memset(&seen, 0, sizeof seen);
    if (rpc_server_create(&pair.server, options, &service, 1, &err) != STATUS_OK) {
        printf("server: %s\n", err.text);
        abort();
    }
    pair.channel = dial(rpc_server_port(pair.server));
    return pair;
}

static struct pair pair_create(void) {
    struct rpc_server_options options = rpc_server_options_default();
    return pair_create_with(&options);
}

static void pair_destroy(struct pair *pair) {
    rpc_channel_destroy(pair->channel);
    rpc_server_destroy(pair->server);
}

/* Waits up to ten seconds until a counter reaches `n`. */
static bool reaches(atomic_int *counter, int n) {
    for (int i = 0; i < 10000 && atomic_load(counter) < n; i++) clock_sleep_ns(1000000);
    return atomic_load(counter) >= n;
}

static bool echo_once(struct rpc_channel *channel, const char *text) {
    Tandem__V1__TokenizeRequest request = TANDEM__V1__TOKENIZE_REQUEST__INIT;
    request.input_case = TANDEM__V1__TOKENIZE_REQUEST__INPUT_TEXT;
    request.text = (ProtobufCBinaryData){strlen(text), (uint8_t *)text};
    ProtobufCMessage *message;
    struct error err;
    if (rpc_unary(channel, ECHO, &request.base, &tandem__v1__tokenize_response__descriptor, &message,
                  clock_now_ns() + 20 * SECOND, NULL, 0, &err) != STATUS_OK) {
        printf("echo: %s %s\n", status_name(err.status), err.text);
        return false;
    }
    const Tandem__V1__TokenizeResponse *answer = (const void *)message;
    bool same = answer->text.len == strlen(text) &&
                (text[0] == '\0' || memcmp(answer->text.data, text, strlen(text)) == 0);
    rpc_message_free(message);
    return same;
}

/* Opens one of the DetokenizeRequest methods in blocking mode. */
static struct rpc_stream *open_with(struct rpc_channel *channel, const char *path, int a, int b,
                                    int64_t deadline_ns) {
    Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
    int32_t ids[2] = {a, b};
    request.n_ids = 2;
    request.ids = ids;
    struct rpc_stream *stream;
    struct error err;
    if (rpc_stream_open(&stream, channel, path, &tandem__v1__tokenize_response__descriptor,
                        deadline_ns, NULL, &err) != STATUS_OK ||
        rpc_stream_send(stream, &request.base) != STATUS_OK) {
        abort();
    }
    rpc_stream_half_close(stream);
    return stream;
}

/* Reads numbered answers to the end; returns how many, -1 when one is out of order. */
static int read_all(struct rpc_stream *stream, struct error *end) {
    ProtobufCMessage *message;
    int n = 0;
    enum rpc_event event;
    while ((event = rpc_stream_recv(stream, &message, 20 * SECOND)) == RPC_MESSAGE) {
        const Tandem__V1__TokenizeResponse *answer = (const void *)message;
        bool in_order = answer->n_ids == 1 && answer->ids[0] == n;
        rpc_message_free(message);
        if (!in_order) return -1;
        n++;
    }
    if (event != RPC_CLOSED) return -1;
    rpc_stream_end(stream, end);
    return n;
}

/* ---- calls ----------------------------------------------------------------------------------- */

Test(rpc, unary_answers_and_shows_peer_and_metadata) {
    struct pair pair = pair_create();
    cr_assert(echo_once(pair.channel, "hello"));
    cr_assert(echo_once(pair.channel, ""));
    cr_assert(strncmp(seen.peer, "ipv4:127.0.0.1:", 15) == 0);
    cr_assert(strstr(seen.user_agent, "grpc") != NULL);
    pair_destroy(&pair);
}

Test(rpc, stream_arrives_whole_and_in_order) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, COUNT, 5000, 10, 0);
    struct error end;
    cr_assert_eq(read_all(stream, &end), 5000);
    cr_assert_eq(end.status, STATUS_OK);
    rpc_stream_destroy(stream);
    cr_assert(reaches(&seen.n_closed, 1));
    cr_assert_eq(atomic_load(&seen.n_cancelled), 0);
    pair_destroy(&pair);
}

Test(rpc, messages_before_the_end_are_not_lost_on_a_late_reader) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, COUNT, 100, 10, 0);
    cr_assert(reaches(&seen.n_closed, 1));   /* the server has finished before the first read */
    struct error end;
    cr_assert_eq(read_all(stream, &end), 100);
    cr_assert_eq(end.status, STATUS_OK);
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, bidirectional_ping_pong_and_half_close) {
    struct pair pair = pair_create();
    struct rpc_stream *stream;
    struct error err;
    cr_assert_eq(rpc_stream_open(&stream, pair.channel, CHAT,
                                 &tandem__v1__tokenize_response__descriptor, 0, NULL, &err),
                 STATUS_OK);
    ProtobufCMessage *message;
    for (int i = 0; i < 200; i++) {
        char text[16];
        int length = snprintf(text, sizeof text, "ping %d", i);
        Tandem__V1__TokenizeRequest request = TANDEM__V1__TOKENIZE_REQUEST__INIT;
        request.input_case = TANDEM__V1__TOKENIZE_REQUEST__INPUT_TEXT;
        request.text = (ProtobufCBinaryData){(size_t)length, (uint8_t *)text};
        cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_OK);
        cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_MESSAGE);
        const Tandem__V1__TokenizeResponse *answer = (const void *)message;
        cr_assert_eq(answer->text.len, (size_t)length);
        cr_assert_arr_eq(answer->text.data, text, (size_t)length);
        rpc_message_free(message);
    }
    cr_assert_eq(rpc_stream_recv(stream, &message, SECOND / 100), RPC_TIMEOUT);
    rpc_stream_half_close(stream);
    cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_CLOSED);
    cr_assert_eq(rpc_stream_end(stream, &err), STATUS_OK);
    cr_assert_str_eq(err.text, "bye");
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

/* Callback mode: counts what comes, keeps the last message. */
struct listener {
    atomic_int n_messages, n_closed;
    _Atomic(ProtobufCMessage *) last;
    struct error end;
};

static void listen_message(struct rpc_stream *stream, const ProtobufCMessage *message, void *user) {
    (void)stream;
    struct listener *listener = user;
    rpc_message_free(atomic_exchange(&listener->last, rpc_message_keep(message)));
    /* Freed before the callback returns, as another thread may do. */
    rpc_message_free(rpc_message_keep(message));
    atomic_fetch_add(&listener->n_messages, 1);
}

static void listen_closed(struct rpc_stream *stream, const struct error *end, void *user) {
    (void)stream;
    struct listener *listener = user;
    listener->end = *end;
    atomic_fetch_add(&listener->n_closed, 1);
}

Test(rpc, callback_stream_delivers_and_closes_once) {
    struct pair pair = pair_create();
    struct listener listener = {0};
    struct rpc_stream_callbacks callbacks = {listen_message, NULL, listen_closed, &listener};
    struct rpc_stream *stream;
    struct error err;
    cr_assert_eq(rpc_stream_open(&stream, pair.channel, CHAT,
                                 &tandem__v1__tokenize_response__descriptor, 0, &callbacks, &err),
                 STATUS_OK);
    Tandem__V1__TokenizeRequest request = TANDEM__V1__TOKENIZE_REQUEST__INIT;
    request.input_case = TANDEM__V1__TOKENIZE_REQUEST__INPUT_TEXT;
    request.text = (ProtobufCBinaryData){4, (uint8_t *)"kept"};
    for (int i = 0; i < 100; i++) cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_OK);
    cr_assert(reaches(&listener.n_messages, 100));
    rpc_stream_half_close(stream);
    cr_assert(reaches(&listener.n_closed, 1));
    cr_assert_eq(listener.end.status, STATUS_OK);
    cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_CANCELLED);
    rpc_stream_destroy(stream);
    ProtobufCMessage *last = atomic_load(&listener.last);
    cr_assert_arr_eq(((Tandem__V1__TokenizeResponse *)(void *)last)->text.data, "kept", 4);
    rpc_message_free(last);
    pair_destroy(&pair);
    cr_assert_eq(atomic_load(&listener.n_closed), 1);
}

Test(rpc, destroyed_callback_stream_is_silent) {
    struct pair pair = pair_create();
    for (int i = 0; i < 50; i++) {
        struct listener *listener = xcalloc(1, sizeof *listener);
        struct rpc_stream_callbacks callbacks = {listen_message, NULL, listen_closed, listener};
        struct rpc_stream *stream;
        struct error err;
        cr_assert_eq(rpc_stream_open(&stream, pair.channel, COUNT,
                                     &tandem__v1__tokenize_response__descriptor, 0, &callbacks,
                                     &err), STATUS_OK);
        Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
        int32_t ids[2] = {100000, 10};
        request.n_ids = 2;
        request.ids = ids;
        rpc_stream_send(stream, &request.base);
        if (i % 2 == 0) reaches(&listener->n_messages, 10);
        rpc_stream_destroy(stream);
        rpc_message_free(atomic_load(&listener->last));
        free(listener);   /* a callback after this would be seen by the sanitizers */
    }
    pair_destroy(&pair);
}

/* ---- ends: cancel, deadline, failures -------------------------------------------------------- */

Test(rpc, cancel_by_the_client_reaches_the_server) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, HANG, 0, 0, 0);
    ProtobufCMessage *message;
    cr_assert_eq(rpc_stream_recv(stream, &message, SECOND / 20), RPC_TIMEOUT);
    cr_assert(reaches(&seen.n_open, 1));
    int64_t begin = clock_now_ns();
    rpc_stream_cancel(stream);
    cr_assert(reaches(&seen.n_cancelled, 1));
    printf("cancel was seen after %.2f ms\n",
           (double)(atomic_load(&seen.closed_ns) - begin) * 1e-6);
    cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_CLOSED);
    struct error end;
    cr_assert_eq(rpc_stream_end(stream, &end), STATUS_CANCELLED);
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, cancel_is_seen_while_a_stream_floods_the_queue) {
    struct pair pair = pair_create();
    struct rpc_channel *other = dial(rpc_server_port(pair.server));
    struct listener listener = {0};
    struct rpc_stream_callbacks callbacks = {listen_message, NULL, listen_closed, &listener};
    struct rpc_stream *flood;
    struct error err;
    cr_assert_eq(rpc_stream_open(&flood, other, COUNT, &tandem__v1__tokenize_response__descriptor, 0,
                                 &callbacks, &err), STATUS_OK);
    Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
    int32_t ids[2] = {100000000, 0};
    request.n_ids = 2;
    request.ids = ids;
    rpc_stream_send(flood, &request.base);
    cr_assert(reaches(&listener.n_messages, 1000));
    for (int i = 0; i < 10; i++) {
        struct rpc_stream *stream = open_with(pair.channel, HANG, 0, 0, 0);
        cr_assert(reaches(&seen.n_open, i + 2));
        rpc_stream_destroy(stream);
        cr_assert(reaches(&seen.n_cancelled, i + 1));
    }
    cr_assert_eq(atomic_load(&listener.n_closed), 0);
    rpc_stream_destroy(flood);
    rpc_message_free(atomic_load(&listener.last));
    rpc_channel_destroy(other);
    pair_destroy(&pair);
}

Test(rpc, deadline_ends_the_call_on_both_sides) {
    struct pair pair = pair_create();
    int64_t deadline = clock_now_ns() + SECOND / 5;
    struct rpc_stream *stream = open_with(pair.channel, HANG, 0, 0, deadline);
    struct error end;
    cr_assert_eq(read_all(stream, &end), 0);
    cr_assert_eq(end.status, STATUS_DEADLINE_EXCEEDED);
    cr_assert(reaches(&seen.n_cancelled, 1));
    int64_t difference = atomic_load(&seen.deadline_ns) - deadline;
    cr_assert(difference > -SECOND && difference < SECOND);
    rpc_stream_destroy(stream);
    stream = open_with(pair.channel, HANG, 0, 0, 0);
    ProtobufCMessage *message;
    rpc_stream_recv(stream, &message, SECOND / 100);
    cr_assert(reaches(&seen.n_open, 2));
    cr_assert_eq(atomic_load(&seen.deadline_ns), 0);   /* none given, none invented */
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, server_limits_a_calls_lifetime) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, LIMITED, 0, 0, 0);
    struct error end;
    cr_assert_eq(read_all(stream, &end), 0);
    cr_assert_eq(end.status, STATUS_DEADLINE_EXCEEDED);
    cr_assert(atomic_load(&seen.deadline_ns) != 0);
    rpc_stream_destroy(stream);
    cr_assert(reaches(&seen.n_cancelled, 1));
    pair_destroy(&pair);
}

Test(rpc, failure_carries_status_text_and_trailers) {
    struct pair pair = pair_create();
    Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
    struct rpc_trailer trailers[2] = {{.key = "retry-after-ms"}, {.key = "absent"}};
    ProtobufCMessage *message;
    struct error err;
    cr_assert_eq(rpc_unary(pair.channel, FAIL, &request.base,
                           &tandem__v1__tokenize_response__descriptor, &message, 0, trailers, 2,
                           &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert_null(message);
    cr_assert_str_eq(err.text, "the queue is full");
    cr_assert_str_eq(trailers[0].value, "250");
    cr_assert_str_eq(trailers[1].value, "");

    struct rpc_stream *stream = open_with(pair.channel, FAIL, 0, 0, 0);
    cr_assert_eq(read_all(stream, &err), 0);
    cr_assert_eq(err.status, STATUS_RESOURCE_EXHAUSTED);
    cr_assert(rpc_stream_trailer(stream, &trailers[0]));
    cr_assert_str_eq(trailers[0].value, "250");
    cr_assert_not(rpc_stream_trailer(stream, &trailers[1]));
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, abort_gives_the_client_its_status) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, ABORT, 0, 0, 0);
    struct error end;
    cr_assert_eq(read_all(stream, &end), 0);
    cr_assert_eq(end.status, STATUS_ABORTED);
    cr_assert_str_eq(end.text, "enough");
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, unknown_method_is_refused_by_name) {
    struct pair pair = pair_create();
    Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
    ProtobufCMessage *message;
    struct error err;
    cr_assert_eq(rpc_unary(pair.channel, "/test.Rpc/Nothing", &request.base,
                           &tandem__v1__tokenize_response__descriptor, &message, 0, NULL, 0, &err),
                 STATUS_UNIMPLEMENTED);
    cr_assert(strstr(err.text, "/test.Rpc/Nothing") != NULL);
    pair_destroy(&pair);
}

/* ---- hostile input --------------------------------------------------------------------------- */

static enum status send_bytes(struct rpc_channel *channel, const char *path, const void *bytes,
                              size_t n, struct error *err) {
    Tandem__V1__TokenizeRequest request = TANDEM__V1__TOKENIZE_REQUEST__INIT;
    request.input_case = TANDEM__V1__TOKENIZE_REQUEST__INPUT_TEXT;
    request.text = (ProtobufCBinaryData){n, (uint8_t *)bytes};
    ProtobufCMessage *message = NULL;
    enum status status = rpc_unary(channel, path, &request.base,
                                   &tandem__v1__tokenize_response__descriptor, &message,
                                   clock_now_ns() + 20 * SECOND, NULL, 0, err);
    rpc_message_free(message);
    return status;
}

Test(rpc, malformed_request_is_an_invalid_argument) {
    struct pair pair = pair_create();
    struct error err;
    /* Field 1 of a DetokenizeRequest holds packed varints; these never end. */
    cr_assert_eq(send_bytes(pair.channel, HANG, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 11,
                            &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "DetokenizeRequest") != NULL);
    cr_assert_eq(atomic_load(&seen.n_open), 0);
    cr_assert(echo_once(pair.channel, "still serving"));
    pair_destroy(&pair);
}

Test(rpc, oversize_messages_are_refused_on_both_ends) {
    struct rpc_server_options options = rpc_server_options_default();
    options.message_bytes_max = 64 << 10;
    struct pair pair = pair_create_with(&options);
    char *bytes = xcalloc(1, 17u << 20);
    struct error err;
    cr_assert_eq(send_bytes(pair.channel, ECHO, bytes, 65 << 10, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.text, "65536") != NULL);                      /* the server's limit */
    cr_assert_eq(send_bytes(pair.channel, ECHO, bytes, 17u << 20, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.text, "the request has") != NULL);            /* the channel's */
    cr_assert_eq(send_bytes(pair.channel, ECHO, bytes, 60 << 10, &err), STATUS_OK);
    free(bytes);
    pair_destroy(&pair);
}

Test(rpc, unpacking_is_bounded) {
    /* 2 bytes of wire are a ChatMessage of over 60 bytes in memory. */
    enum { N = 20000 };
    uint8_t *wire = xcalloc(N, 2);
    for (int i = 0; i < N; i++) wire[2 * i] = 0x0a;
    ProtobufCMessage *message;
    struct error err;
    const ProtobufCMessageDescriptor *type = &tandem__v1__chat_messages__descriptor;
    cr_assert_eq(rpc_message_unpack(&message, type, wire, 2 * N, 8u << 20, &err), STATUS_OK);
    cr_assert_eq(((Tandem__V1__ChatMessages *)(void *)message)->n_messages, (size_t)N);
    rpc_message_free(message);
    for (size_t limit = 0; limit < (1u << 20); limit = limit * 2 + 1) {
        cr_assert_eq(rpc_message_unpack(&message, type, wire, 2 * N, limit, &err),
                     STATUS_INVALID_ARGUMENT);
        cr_assert_null(message);
    }
    cr_assert_eq(rpc_message_unpack(&message, type, wire, 2 * N - 1, 8u << 20, &err),
                 STATUS_INVALID_ARGUMENT);   /* cut in the middle */
    cr_assert_eq(rpc_message_unpack(&message, type, "", 0, 0, &err), STATUS_OK);
    rpc_message_free(message);
    free(wire);

    struct rpc_server_options options = rpc_server_options_default();
    options.unpacked_bytes_max = 4096;
    struct pair pair = pair_create_with(&options);
    char text[8192] = {0};
    cr_assert_eq(send_bytes(pair.channel, ECHO, text, sizeof text, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "4096") != NULL);
    pair_destroy(&pair);
}

/* ---- flow ------------------------------------------------------------------------------------ */

Test(rpc, slow_reader_holds_only_itself_back) {
    struct rpc_server_options options = rpc_server_options_default();
    options.backlog_messages_max = 64;
    struct pair pair = pair_create_with(&options);
    struct rpc_stream *slow = open_with(pair.channel, COUNT, 20000, 4096, 0);
    cr_assert(reaches(&seen.refused, 1));   /* its backlog is full */
    struct error end;
    for (int i = 0; i < 5; i++) {
        struct rpc_stream *quick = open_with(pair.channel, COUNT, 1000, 100, 0);
        cr_assert_eq(read_all(quick, &end), 1000);
        rpc_stream_destroy(quick);
    }
    cr_assert(atomic_load(&seen.accepted) < 5000 + 20000);   /* the slow one has not finished */
    cr_assert_eq(read_all(slow, &end), 20000);
    cr_assert_eq(end.status, STATUS_OK);
    rpc_stream_destroy(slow);
    pair_destroy(&pair);
}

Test(rpc, backlog_is_bounded_and_reported) {
    struct pair pair = pair_create();
    struct rpc_stream *stream;
    struct error err;
    /* In blocking mode nothing but rpc_stream_recv takes events, so writes pile up. */
    cr_assert_eq(rpc_stream_open(&stream, pair.channel, CHAT,
                                 &tandem__v1__tokenize_response__descriptor, 0, NULL, &err),
                 STATUS_OK);
    Tandem__V1__TokenizeRequest request = TANDEM__V1__TOKENIZE_REQUEST__INIT;
    for (int i = 0; i < 1024; i++) {
        cr_assert_eq(rpc_stream_backlog(stream), (size_t)i);
        cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_OK);
    }
    cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_RESOURCE_EXHAUSTED);
    ProtobufCMessage *message;
    for (int i = 0; i < 1024; i++) {
        cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_MESSAGE);
        rpc_message_free(message);
    }
    cr_assert_eq(rpc_stream_backlog(stream), 0u);
    cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_OK);
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, two_hundred_streams_at_once) {
    enum { N = 200, EACH = 200 };
    struct pair pair = pair_create();
    struct listener listener = {0};
    struct rpc_stream_callbacks callbacks = {listen_message, NULL, listen_closed, &listener};
    struct rpc_stream *streams[N];
    Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
    int32_t ids[2] = {EACH, 20};
    request.n_ids = 2;
    request.ids = ids;
    struct error err;
    for (int i = 0; i < N; i++) {
        cr_assert_eq(rpc_stream_open(&streams[i], pair.channel, COUNT,
                                     &tandem__v1__tokenize_response__descriptor, 0, &callbacks,
                                     &err), STATUS_OK);
        cr_assert_eq(rpc_stream_send(streams[i], &request.base), STATUS_OK);
        rpc_stream_half_close(streams[i]);
    }
    cr_assert(reaches(&listener.n_closed, N));
    cr_assert_eq(atomic_load(&listener.n_messages), N * EACH);
    for (int i = 0; i < N; i++) {
        cr_assert_eq(rpc_stream_end(streams[i], &err), STATUS_OK);
        rpc_stream_destroy(streams[i]);
    }
    rpc_message_free(atomic_load(&listener.last));
    cr_assert(reaches(&seen.n_closed, N));
    pair_destroy(&pair);
}

/* Foreign threads send on one call while it is being cancelled. */
static void *sender(void *argument) {
    struct rpc_call *call = argument;
    Tandem__V1__TokenizeResponse answer = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
    enum status status;
    do {
        status = rpc_call_send(call, &answer.base);
        if (status == STATUS_RESOURCE_EXHAUSTED) clock_sleep_ns(100000);
    } while (status != STATUS_CANCELLED);
    rpc_call_finish(call, STATUS_OK, NULL);
    rpc_call_unref(call);
    return NULL;
}

static void start_senders(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message;
    pthread_t *threads = user;
    for (int i = 0; i < 3; i++) {
        if (pthread_create(&threads[i], NULL, sender, rpc_call_ref(call)) != 0) abort();
    }
    atomic_fetch_add(&seen.n_open, 1);
}

Test(rpc, sends_from_many_threads_race_with_a_cancel) {
    pthread_t threads[3];
    struct rpc_method method = {.path = "/test.Rpc/Senders", .on_message = start_senders,
                                .request = &tandem__v1__detokenize_request__descriptor};
    struct rpc_service senders = {&method, 1, threads};
    struct rpc_server_options options = rpc_server_options_default();
    struct rpc_server *server;
    struct error err;
    memset(&seen, 0, sizeof seen);
    cr_assert_eq(rpc_server_create(&server, &options, &senders, 1, &err), STATUS_OK);
    struct rpc_channel *channel = dial(rpc_server_port(server));
    for (int i = 0; i < 20; i++) {
        struct rpc_stream *stream = open_with(channel, method.path, 0, 0, 0);
        ProtobufCMessage *message;
        for (int k = 0; k < 100; k++) {
            cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_MESSAGE);
            rpc_message_free(message);
        }
        rpc_stream_destroy(stream);
        for (int t = 0; t < 3; t++) pthread_join(threads[t], NULL);
    }
    rpc_channel_destroy(channel);
    rpc_server_destroy(server);
}

/* ---- coming and going ------------------------------------------------------------------------ */

Test(rpc, a_taken_port_is_refused_in_one_sentence) {
    struct pair pair = pair_create();
    struct rpc_server_options options = rpc_server_options_default();
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%d", rpc_server_port(pair.server));
    options.address = address;
    struct rpc_server *second;
    struct error err;
    cr_assert_eq(rpc_server_create(&second, &options, &service, 1, &err), STATUS_UNAVAILABLE);
    cr_assert_null(second);
    cr_assert(strstr(err.text, address) != NULL && strstr(err.text, "in use") != NULL);
    pair_destroy(&pair);
}

Test(rpc, bad_addresses_and_tables_are_refused) {
    const char *bad[] = {"", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:x",
                         "::1:50051", "no.such.host.invalid:1"};
    struct rpc_server_options options = rpc_server_options_default();
    struct rpc_server *server;
    struct error err;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        options.address = bad[i];
        cr_assert_eq(rpc_server_create(&server, &options, &service, 1, &err), STATUS_UNAVAILABLE);
        cr_assert(strncmp(err.text, "cannot listen on", 16) == 0);
    }
    options = rpc_server_options_default();
    struct rpc_method method = methods[0];
    method.path = "Echo";
    struct rpc_service broken = {&method, 1, NULL};
    cr_assert_eq(rpc_server_create(&server, &options, &broken, 1, &err), STATUS_INVALID_ARGUMENT);
    method = methods[0];
    method.on_half_close = chat_half_close;
    cr_assert_eq(rpc_server_create(&server, &options, &broken, 1, &err), STATUS_INVALID_ARGUMENT);
}

Test(rpc, no_server_is_unavailable_and_a_late_one_is_found) {
    struct pair pair = pair_create();
    int port = rpc_server_port(pair.server);
    pair_destroy(&pair);
    struct rpc_channel *channel = dial(port);
    struct error err;
    cr_assert_eq(send_bytes(channel, ECHO, "x", 1, &err), STATUS_UNAVAILABLE);
    struct rpc_server_options options = rpc_server_options_default();
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%d", port);
    options.address = address;
    struct rpc_server *server;
    cr_assert_eq(rpc_server_create(&server, &options, &service, 1, &err), STATUS_OK);
    bool found = false;
    for (int i = 0; i < 100 && !found; i++) {
        found = send_bytes(channel, ECHO, "x", 1, &err) == STATUS_OK;
        if (!found) clock_sleep_ns(SECOND / 10);
    }
    cr_assert(found);
    rpc_channel_destroy(channel);

    struct rpc_channel_options patient = rpc_channel_options_default();
    patient.wait_for_ready = true;
    rpc_server_destroy(server);
    cr_assert_eq(rpc_channel_create(&channel, address, &patient, &err), STATUS_OK);
    struct rpc_stream *stream = open_with(channel, COUNT, 10, 10, clock_now_ns() + 60 * SECOND);
    ProtobufCMessage *message;
    cr_assert_eq(rpc_stream_recv(stream, &message, SECOND / 5), RPC_TIMEOUT);
    cr_assert_eq(rpc_server_create(&server, &options, &service, 1, &err), STATUS_OK);
    cr_assert_eq(read_all(stream, &err), 10);
    rpc_stream_destroy(stream);
    rpc_channel_destroy(channel);
    rpc_server_destroy(server);
}

Test(rpc, stopping_cancels_live_calls) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, HANG, 0, 0, 0);
    ProtobufCMessage *message;
    rpc_stream_recv(stream, &message, SECOND / 20);
    cr_assert(reaches(&seen.n_open, 1));
    cr_assert_eq(rpc_server_live_calls(pair.server), 1u);
    rpc_server_stop(pair.server, 50);
    cr_assert_eq(atomic_load(&seen.n_cancelled), 1);
    cr_assert_eq(rpc_server_live_calls(pair.server), 0u);
    cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_CLOSED);
    struct error end;
    rpc_stream_end(stream, &end);
    cr_assert(end.status == STATUS_UNAVAILABLE || end.status == STATUS_CANCELLED);
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

static void *finish_later(void *argument) {
    struct rpc_call *call = argument;
    clock_sleep_ns(SECOND / 5);
    rpc_call_finish(call, STATUS_OK, "in time");
    rpc_call_unref(call);
    return NULL;
}

static void begin_finishing(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message;
    if (pthread_create(user, NULL, finish_later, rpc_call_ref(call)) != 0) abort();
    atomic_fetch_add(&seen.n_open, 1);
}

Test(rpc, stopping_gives_calls_their_grace) {
    pthread_t thread;
    struct rpc_method method = {.path = "/test.Rpc/Later", .on_message = begin_finishing,
                                .request = &tandem__v1__detokenize_request__descriptor};
    struct rpc_service later = {&method, 1, &thread};
    struct rpc_server_options options = rpc_server_options_default();
    struct rpc_server *server;
    struct error err;
    memset(&seen, 0, sizeof seen);
    cr_assert_eq(rpc_server_create(&server, &options, &later, 1, &err), STATUS_OK);
    struct rpc_channel *channel = dial(rpc_server_port(server));
    struct rpc_stream *stream = open_with(channel, method.path, 0, 0, 0);
    ProtobufCMessage *message;
    rpc_stream_recv(stream, &message, SECOND / 50);
    cr_assert(reaches(&seen.n_open, 1));
    rpc_server_stop(server, 20000);
    cr_assert_eq(read_all(stream, &err), 0);
    cr_assert_eq(err.status, STATUS_OK);
    cr_assert_str_eq(err.text, "in time");
    pthread_join(thread, NULL);
    rpc_stream_destroy(stream);
    rpc_channel_destroy(channel);
    rpc_server_destroy(server);
}

/* Run as `test_rpc --serve-for-a-test FD`: serves until killed. A process of its own, by spawn,
 * since forking with gRPC's threads around is not possible. */
__attribute__((constructor)) static void serve_when_asked(int argc, char **argv) {
    if (argc != 3 || strcmp(argv[1], "--serve-for-a-test") != 0) return;
    struct rpc_server_options options = rpc_server_options_default();
    struct rpc_server *server;
    struct error err;
    if (rpc_server_create(&server, &options, &service, 1, &err) != STATUS_OK) _exit(1);
    int port = rpc_server_port(server);
    if (write(atoi(argv[2]), &port, sizeof port) != sizeof port) _exit(1);
    sleep(60);   /* gone by then even if the test died */
    _exit(0);
}

static pid_t spawn_server(int *port) {
    int ends[2];
    char fd[16];
    if (pipe(ends) != 0) abort();
    snprintf(fd, sizeof fd, "%d", ends[1]);
    char *arguments[] = {(char *)"test_rpc", (char *)"--serve-for-a-test", fd, NULL};
    extern char **environ;
    pid_t child;
    if (posix_spawn(&child, "/proc/self/exe", NULL, NULL, arguments, environ) != 0) abort();
    close(ends[1]);
    if (read(ends[0], port, sizeof *port) != (ssize_t)sizeof *port) abort();
    close(ends[0]);
    return child;
}

/* Reads what is still to come; the status of the end, or STATUS_OK when none came. */
static enum status end_of(struct rpc_stream *stream) {
    ProtobufCMessage *message;
    enum rpc_event event;
    while ((event = rpc_stream_recv(stream, &message, 20 * SECOND)) == RPC_MESSAGE) {
        rpc_message_free(message);
    }
    struct error end;
    return event == RPC_CLOSED ? rpc_stream_end(stream, &end) : STATUS_OK;
}

Test(rpc, a_killed_server_is_unavailable) {
    int port;
    pid_t child = spawn_server(&port);
    struct rpc_channel *channel = dial(port);
    struct rpc_stream *stream = open_with(channel, COUNT, 1000000000, 100, 0);
    ProtobufCMessage *message;
    for (int i = 0; i < 100; i++) {
        cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_MESSAGE);
        rpc_message_free(message);
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    cr_assert_eq(end_of(stream), STATUS_UNAVAILABLE);
    rpc_stream_destroy(stream);
    rpc_channel_destroy(channel);
}

Test(rpc, keepalive_is_permitted_and_notices_a_hung_server) {
    int port;
    pid_t child = spawn_server(&port);
    struct rpc_channel_options options = rpc_channel_options_default();
    options.keepalive_ms = 700;
    options.keepalive_timeout_ms = 300;
    char target[32];
    snprintf(target, sizeof target, "127.0.0.1:%d", port);
    struct rpc_channel *channel;
    struct error err;
    cr_assert_eq(rpc_channel_create(&channel, target, &options, &err), STATUS_OK);
    struct rpc_stream *stream = open_with(channel, HANG, 0, 0, 0);
    ProtobufCMessage *message;
    /* Four pings on an idle stream: with gRPC's defaults the server ends it at the third. */
    cr_assert_eq(rpc_stream_recv(stream, &message, 3 * SECOND), RPC_TIMEOUT);
    kill(child, SIGSTOP);
    cr_assert_eq(end_of(stream), STATUS_UNAVAILABLE);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    rpc_stream_destroy(stream);
    rpc_channel_destroy(channel);
}
