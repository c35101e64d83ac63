/* A service of every kind of call, its server and a client's channel, for the tests of proto/rpc.h. */
#pragma once
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

static inline void echo(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
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

static inline void count_on(struct rpc_call *call, void *user) {
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

static inline void count_begin(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    const Tandem__V1__DetokenizeRequest *request = (const void *)message;
    struct count *count = xcalloc(1, sizeof *count);
    count->left = request->ids[0];
    count->bytes = (size_t)request->ids[1];
    rpc_call_set_data(call, count);
    atomic_fetch_add(&seen.n_open, 1);
    count_on(call, user);
}

static inline void closed(struct rpc_call *call, bool cancelled, void *user) {
    (void)user;
    free(rpc_call_data(call));
    atomic_store(&seen.closed_ns, clock_now_ns());
    if (cancelled) atomic_fetch_add(&seen.n_cancelled, 1);
    if (cancelled != rpc_call_cancelled(call)) abort();
    atomic_fetch_add(&seen.n_closed, 1);
}

static inline void hang(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message, (void)user;
    atomic_store(&seen.deadline_ns, rpc_call_deadline_ns(call));
    atomic_fetch_add(&seen.n_open, 1);
}

static inline void fail(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message, (void)user;
    rpc_call_trailer(call, "retry-after-ms", "250");
    rpc_call_finish(call, STATUS_RESOURCE_EXHAUSTED, "the queue is full");
    rpc_call_finish(call, STATUS_OK, "only the first finish counts");
}

static inline void abort_call(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message, (void)user;
    rpc_call_abort(call, STATUS_ABORTED, "enough");
    Tandem__V1__TokenizeResponse answer = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
    if (rpc_call_send(call, &answer.base) != STATUS_CANCELLED) abort();
}

static inline void chat(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)user;
    const Tandem__V1__TokenizeRequest *request = (const void *)message;
    Tandem__V1__TokenizeResponse answer = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
    answer.text = request->text;
    rpc_call_send(call, &answer.base);
}

static inline void chat_open(struct rpc_call *call, void *user) {
    (void)call, (void)user;
    atomic_fetch_add(&seen.n_open, 1);
}

static inline void chat_half_close(struct rpc_call *call, void *user) {
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

static inline struct rpc_channel *dial(int port) {
    char target[32];
    snprintf(target, sizeof target, "127.0.0.1:%d", port);
    struct rpc_channel_options options = rpc_channel_options_default();
    struct rpc_channel *channel;
    struct error err;
    return rpc_channel_create(&channel, target, &options, &err) == STATUS_OK ? channel : NULL;
}

static inline struct pair pair_create_with(const struct rpc_server_options *options) {
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

static inline struct pair pair_create(void) {
    struct rpc_server_options options = rpc_server_options_default();
    return pair_create_with(&options);
}

static inline void pair_destroy(struct pair *pair) {
    rpc_channel_destroy(pair->channel);
    rpc_server_destroy(pair->server);
}

/* Waits up to ten seconds until a counter reaches `n`. */
static inline bool reaches(atomic_int *counter, int n) {
    for (int i = 0; i < 10000 && atomic_load(counter) < n; i++) clock_sleep_ns(1000000);
    return atomic_load(counter) >= n;
}

static inline bool echo_once(struct rpc_channel *channel, const char *text) {
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
static inline struct rpc_stream *open_with(struct rpc_channel *channel, const char *path, int a, int b,
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
static inline int read_all(struct rpc_stream *stream, struct error *end) {
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

/* Callback mode: counts what comes, keeps the last message. */
struct listener {
    atomic_int n_messages, n_closed;
    _Atomic(ProtobufCMessage *) last;
    struct error end;
};

static inline void listen_message(struct rpc_stream *stream, const ProtobufCMessage *message, void *user) {
    (void)stream;
    struct listener *listener = user;
    rpc_message_free(atomic_exchange(&listener->last, rpc_message_keep(message)));
    /* Freed before the callback returns, as another thread may do. */
    rpc_message_free(rpc_message_keep(message));
    atomic_fetch_add(&listener->n_messages, 1);
}

static inline void listen_closed(struct rpc_stream *stream, const struct error *end, void *user) {
    (void)stream;
    struct listener *listener = user;
    listener->end = *end;
    atomic_fetch_add(&listener->n_closed, 1);
}

static inline enum status send_bytes(struct rpc_channel *channel, const char *path, const void *bytes,
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
