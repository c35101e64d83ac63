/* The client: channels, unary calls, streams. See rpc.h. */
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "proto/rpc_internal.h"

struct rpc_channel {
    grpc_channel *core;
    struct rpc_limits limits;
    uint32_t initial_flags;          /* of every call's first operation */
    struct rpc_loop loop;            /* of the streams in callback mode */
    bool loop_runs;
    pthread_mutex_t lock;            /* guards loop_runs and the count */
    pthread_cond_t changed;
    size_t n_streams;
};

struct rpc_stream {
    struct rpc_endpoint endpoint;
    struct rpc_channel *channel;
    struct rpc_stream_callbacks callbacks;
    bool blocking;
    struct rpc_loop own_loop;        /* blocking mode: driven by rpc_stream_recv */
    ProtobufCMessage *received;      /* blocking mode: for rpc_stream_recv to return */
    bool read_over;
    atomic_int refs;                 /* the user's, and one while the core call lives */

    grpc_metadata_array initial, trailing;
    grpc_status_code core_status;
    grpc_slice core_text;
    struct error malformed;          /* status OK: every message could be read */

    struct error end;                /* set before `closed` */
    char *trailers;
    atomic_bool closed;

    pthread_mutex_t callback_lock;   /* guards the two below */
    pthread_cond_t callback_over;
    bool silenced, in_callback;
};

/* ---- channel --------------------------------------------------------------------------------- */

struct rpc_channel_options rpc_channel_options_default(void) {
    return (struct rpc_channel_options){
        .message_bytes_max = 16u << 20, .unpacked_bytes_max = 64u << 20,
        .backlog_messages_max = 1024, .backlog_bytes_max = 64u << 20,
        .keepalive_ms = 10000, .keepalive_timeout_ms = 5000,
        .reconnect_backoff_min_ms = 100, .reconnect_backoff_max_ms = 2000,
    };
}

static grpc_channel *core_create(const char *target, const struct rpc_channel_options *options) {
    grpc_arg args[] = {
        rpc_arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)options->message_bytes_max),
        rpc_arg_int(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, (int)options->message_bytes_max),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_TIME_MS, options->keepalive_ms),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, options->keepalive_timeout_ms),
        rpc_arg_int(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        rpc_arg_int(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, options->reconnect_backoff_min_ms),
        /* misnamed: the time one attempt to connect is given */
        rpc_arg_int(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, options->reconnect_backoff_max_ms),
        rpc_arg_int(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, options->reconnect_backoff_max_ms),
        rpc_arg_int(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1),   /* a connection of its own */
        rpc_arg_int(GRPC_ARG_ENABLE_RETRIES, 0),              /* who calls decides that */
        rpc_arg_int(GRPC_ARG_ENABLE_HTTP_PROXY, 0),           /* no hidden environment */
        rpc_arg_int(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
    };
    grpc_channel_args list = {sizeof args / sizeof args[0], args};
    grpc_channel_credentials *plain = grpc_insecure_credentials_create();
    grpc_channel *core = grpc_channel_create(target, plain, &list);
    grpc_channel_credentials_release(plain);
    return core;
}

enum status rpc_channel_create(struct rpc_channel **out, const char *target,
                               const struct rpc_channel_options *options, struct error *err) {
    *out = NULL;
    CHECK(options->message_bytes_max <= INT32_MAX);
    if (strrchr(target, ':') == NULL) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "'%s' is not of the form host:port", target);
    }
    grpc_init();
    struct rpc_channel *channel = xcalloc(1, sizeof *channel);
    channel->limits = (struct rpc_limits){
        options->message_bytes_max, options->unpacked_bytes_max, options->backlog_messages_max,
        options->backlog_bytes_max};
    if (options->wait_for_ready) {
        channel->initial_flags = GRPC_INITIAL_METADATA_WAIT_FOR_READY |
                                 GRPC_INITIAL_METADATA_WAIT_FOR_READY_EXPLICITLY_SET;
    }
    pthread_mutex_init(&channel->lock, NULL);
    pthread_cond_init(&channel->changed, NULL);
    channel->core = core_create(target, options);
    *out = channel;
    return STATUS_OK;
}

static void *loop_main(void *argument) {
    struct rpc_loop *loop = argument;
    gpr_timespec never = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    while (rpc_loop_step(loop, never) != RPC_LOOP_SHUT_DOWN) continue;
    return NULL;
}

void rpc_channel_destroy(struct rpc_channel *channel) {
    if (channel == NULL) return;
    pthread_mutex_lock(&channel->lock);   /* streams just destroyed are being cancelled */
    while (channel->n_streams > 0) pthread_cond_wait(&channel->changed, &channel->lock);
    pthread_mutex_unlock(&channel->lock);
    if (channel->loop_runs) {
        grpc_completion_queue_shutdown(channel->loop.queue);
        pthread_join(channel->loop.thread, NULL);
        rpc_loop_destroy(&channel->loop);
    }
    grpc_channel_destroy(channel->core);
    pthread_mutex_destroy(&channel->lock);
    pthread_cond_destroy(&channel->changed);
    free(channel);
    grpc_shutdown();
}

static grpc_call *core_call(struct rpc_channel *channel, grpc_completion_queue *queue,
                            const char *path, int64_t deadline_ns) {
    grpc_slice method = grpc_slice_from_copied_string(path);
    grpc_call *call = grpc_channel_create_call(channel->core, NULL, GRPC_PROPAGATE_DEFAULTS, queue,
                                               method, NULL, rpc_deadline_to_core(deadline_ns),
                                               NULL);
    grpc_slice_unref(method);
    return call;
}

/* A core status and text as an error; statuses beyond our list are UNKNOWN. */
static void error_from_core(struct error *err, grpc_status_code status, grpc_slice text) {
    enum status known = status >= GRPC_STATUS_OK && status <= GRPC_STATUS_UNAUTHENTICATED
                            ? (enum status)status : STATUS_UNKNOWN;
    error_set(err, known, "%.*s", (int)GRPC_SLICE_LENGTH(text),
              (const char *)GRPC_SLICE_START_PTR(text));
}

/* ---- unary ----------------------------------------------------------------------------------- */

/* What one unary call receives. */
struct answer {
    grpc_metadata_array initial, trailing;
    grpc_byte_buffer *message;
    grpc_status_code status;
    grpc_slice text;
};

/* Everything in one batch, waited for by plucking its only event from the call's own queue.
 * Metadata elements die with the core call, so the wanted trailers are filled here. */
static void unary_run(struct rpc_channel *channel, const char *path, grpc_byte_buffer *request,
                      int64_t deadline_ns, struct answer *answer, struct rpc_trailer *trailers,
                      size_t n_trailers) {
    grpc_completion_queue *queue = grpc_completion_queue_create_for_pluck(NULL);
    grpc_call *call = core_call(channel, queue, path, deadline_ns);
    grpc_op ops[6] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA, .flags = channel->initial_flags},
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = request},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA,
         .data.recv_initial_metadata.recv_initial_metadata = &answer->initial},
        {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &answer->message},
        {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
         .data.recv_status_on_client = {&answer->trailing, &answer->status, &answer->text, NULL}},
    };
    RPC_HAND_OVER(answer);
    CHECK(grpc_call_start_batch(call, ops, 6, answer, NULL) == GRPC_CALL_OK);
    gpr_timespec never = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    grpc_event event = grpc_completion_queue_pluck(queue, answer, never, NULL);
    CHECK(event.type == GRPC_OP_COMPLETE);
    RPC_TAKE_OVER(answer);
    char *metadata = n_trailers > 0 ? rpc_metadata_copy(&answer->trailing) : NULL;
    for (size_t i = 0; i < n_trailers; i++) {
        struct rpc_trailer *trailer = &trailers[i];
        trailer->value[0] = '\0';
        rpc_metadata_find(metadata, trailer->key, trailer->value, sizeof trailer->value);
    }
    free(metadata);
    grpc_call_unref(call);
    grpc_completion_queue_shutdown(queue);
    grpc_completion_queue_destroy(queue);
}

enum status rpc_unary(struct rpc_channel *channel, const char *path,
                      const ProtobufCMessage *request,
                      const ProtobufCMessageDescriptor *response_type, ProtobufCMessage **response,
                      int64_t deadline_ns, struct rpc_trailer *trailers, size_t n_trailers,
                      struct error *err) {
    *response = NULL;
    size_t bytes = protobuf_c_message_get_packed_size(request);
    if (bytes > channel->limits.message_bytes_max) {
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "the request has %zu bytes, the limit is %zu", bytes,
                         channel->limits.message_bytes_max);
    }
    struct answer answer = {.text = grpc_empty_slice()};
    grpc_byte_buffer *packed = rpc_buffer_pack(request, bytes);
    unary_run(channel, path, packed, deadline_ns, &answer, trailers, n_trailers);
    struct error end;
    error_from_core(&end, answer.status, answer.text);
    if (end.status == STATUS_OK && answer.message == NULL) {
        error_set(&end, STATUS_INTERNAL, "%s: the answer carries no message", path);
    } else if (end.status == STATUS_OK &&
               rpc_buffer_unpack(response, response_type, answer.message,
                                 channel->limits.unpacked_bytes_max, &end) != STATUS_OK) {
        end.status = STATUS_INTERNAL;
    }
    grpc_byte_buffer_destroy(packed);
    grpc_byte_buffer_destroy(answer.message);
    grpc_slice_unref(answer.text);
    grpc_metadata_array_destroy(&answer.initial);
    grpc_metadata_array_destroy(&answer.trailing);
    if (end.status != STATUS_OK && err != NULL) *err = end;
    return end.status;
}

/* ---- streams: lifetime ----------------------------------------------------------------------- */

static struct rpc_stream *stream_of(struct rpc_endpoint *endpoint) {
    return (struct rpc_stream *)endpoint;   /* its first member */
}

static void stream_unref(struct rpc_stream *stream) {
    if (atomic_fetch_sub(&stream->refs, 1) != 1) return;
    struct rpc_channel *channel = stream->channel;
    rpc_endpoint_fini(&stream->endpoint);
    grpc_metadata_array_destroy(&stream->initial);
    grpc_metadata_array_destroy(&stream->trailing);
    grpc_slice_unref(stream->core_text);
    pthread_mutex_destroy(&stream->callback_lock);
    pthread_cond_destroy(&stream->callback_over);
    rpc_message_free(stream->received);
    free(stream->trailers);
    free(stream);
    pthread_mutex_lock(&channel->lock);
    channel->n_streams--;
    pthread_cond_broadcast(&channel->changed);
    pthread_mutex_unlock(&channel->lock);
}

/* Whether a callback may run now; callback_end must follow then. */
static bool callback_begin(struct rpc_stream *stream) {
    pthread_mutex_lock(&stream->callback_lock);
    bool run = !stream->silenced && !stream->blocking;
    stream->in_callback = run;
    pthread_mutex_unlock(&stream->callback_lock);
    return run;
}

static void callback_end(struct rpc_stream *stream) {
    pthread_mutex_lock(&stream->callback_lock);
    stream->in_callback = false;
    pthread_cond_broadcast(&stream->callback_over);
    pthread_mutex_unlock(&stream->callback_lock);
}

/* ---- streams: endpoint hooks ----------------------------------------------------------------- */

static bool stream_message(struct rpc_endpoint *endpoint, ProtobufCMessage *message) {
    struct rpc_stream *stream = stream_of(endpoint);
    if (stream->blocking) {
        stream->received = rpc_message_keep(message);
        return false;   /* rpc_stream_recv asks for the next */
    }
    if (callback_begin(stream)) {
        stream->callbacks.on_message(stream, message, stream->callbacks.user);
        callback_end(stream);
    }
    return true;
}

static void stream_malformed(struct rpc_endpoint *endpoint, const struct error *err) {
    struct rpc_stream *stream = stream_of(endpoint);
    stream->malformed = *err;
    stream->malformed.status = STATUS_INTERNAL;
    rpc_endpoint_cancel(endpoint, STATUS_INTERNAL, err->text);
}

static void stream_read_end(struct rpc_endpoint *endpoint) {
    stream_of(endpoint)->read_over = true;
}

static void stream_drained(struct rpc_endpoint *endpoint) {
    struct rpc_stream *stream = stream_of(endpoint);
    if (stream->callbacks.on_drained == NULL || !callback_begin(stream)) return;
    stream->callbacks.on_drained(stream, stream->callbacks.user);
    callback_end(stream);
}

static void stream_closed(struct rpc_endpoint *endpoint) {
    struct rpc_stream *stream = stream_of(endpoint);
    error_from_core(&stream->end, stream->core_status, stream->core_text);
    if (stream->malformed.status != STATUS_OK) stream->end = stream->malformed;
    stream->trailers = rpc_metadata_copy(&stream->trailing);
    atomic_store(&stream->closed, true);
    if (!callback_begin(stream)) return;
    stream->callbacks.on_closed(stream, &stream->end, stream->callbacks.user);
    callback_end(stream);
}

static void stream_released(struct rpc_endpoint *endpoint) { stream_unref(stream_of(endpoint)); }

static const struct rpc_endpoint_hooks stream_hooks = {
    .message = stream_message, .malformed = stream_malformed, .read_end = stream_read_end,
    .drained = stream_drained, .closed = stream_closed, .released = stream_released,
};

/* ---- streams: the user's side ---------------------------------------------------------------- */

/* The channel's queue thread starts with its first stream in callback mode. */
static void channel_add_stream(struct rpc_channel *channel, bool needs_loop) {
    pthread_mutex_lock(&channel->lock);
    channel->n_streams++;
    if (needs_loop && !channel->loop_runs) {
        rpc_loop_init(&channel->loop);
        CHECK(pthread_create(&channel->loop.thread, NULL, loop_main, &channel->loop) == 0);
        channel->loop_runs = true;
    }
    pthread_mutex_unlock(&channel->lock);
}

static void stream_begin(struct rpc_stream *stream, uint32_t initial_flags) {
    grpc_op ops[3] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA, .flags = initial_flags},
        {.op = GRPC_OP_RECV_INITIAL_METADATA,
         .data.recv_initial_metadata.recv_initial_metadata = &stream->initial},
        {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
         .data.recv_status_on_client = {&stream->trailing, &stream->core_status,
                                        &stream->core_text, NULL}},
    };
    rpc_endpoint_open(&stream->endpoint, ops, 3, true);
}

enum status rpc_stream_open(struct rpc_stream **out, struct rpc_channel *channel,
                            const char *path, const ProtobufCMessageDescriptor *response_type,
                            int64_t deadline_ns, const struct rpc_stream_callbacks *callbacks,
                            struct error *err) {
    *out = NULL;
    if (path[0] != '/' || strchr(path + 1, '/') == NULL) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "method path %s is not of the form /package.Service/Method", path);
    }
    struct rpc_stream *stream = xcalloc(1, sizeof *stream);
    stream->channel = channel;
    stream->blocking = callbacks == NULL;
    if (callbacks != NULL) stream->callbacks = *callbacks;
    channel_add_stream(channel, !stream->blocking);
    if (stream->blocking) rpc_loop_init(&stream->own_loop);
    atomic_init(&stream->refs, 2);
    stream->core_text = grpc_empty_slice();
    pthread_mutex_init(&stream->callback_lock, NULL);
    pthread_cond_init(&stream->callback_over, NULL);
    struct rpc_endpoint *e = &stream->endpoint;
    e->hooks = &stream_hooks;
    e->limits = &channel->limits;
    e->incoming_type = response_type;
    e->loop = stream->blocking ? &stream->own_loop : &channel->loop;
    e->core = core_call(channel, e->loop->queue, path, deadline_ns);
    e->is_client = true;
    rpc_endpoint_init(e);
    *out = stream;   /* callbacks may come from here on */
    stream_begin(stream, channel->initial_flags);
    return STATUS_OK;
}

enum status rpc_stream_send(struct rpc_stream *stream, const ProtobufCMessage *message) {
    return rpc_endpoint_send(&stream->endpoint, message, false);
}

size_t rpc_stream_backlog(const struct rpc_stream *stream) {
    return rpc_endpoint_backlog(&((struct rpc_stream *)stream)->endpoint);
}

void rpc_stream_half_close(struct rpc_stream *stream) {
    rpc_endpoint_end(&stream->endpoint, STATUS_OK, NULL);
}

enum rpc_event rpc_stream_recv(struct rpc_stream *stream, ProtobufCMessage **message,
                               int64_t timeout_ns) {
    CHECK(stream->blocking);
    gpr_timespec until = rpc_deadline_to_core(timeout_ns < 0 ? 0 : clock_now_ns() + timeout_ns);
    for (;;) {
        *message = stream->received;
        stream->received = NULL;
        if (*message != NULL) return RPC_MESSAGE;
        if (atomic_load(&stream->closed)) return RPC_CLOSED;
        if (!stream->endpoint.reading && !stream->read_over) rpc_endpoint_read(&stream->endpoint);
        if (rpc_loop_step(&stream->own_loop, until) == RPC_LOOP_TIMEOUT) return RPC_TIMEOUT;
    }
}

enum status rpc_stream_end(const struct rpc_stream *stream, struct error *end) {
    CHECK(atomic_load(&stream->closed));
    *end = stream->end;
    return end->status;
}

bool rpc_stream_trailer(const struct rpc_stream *stream, struct rpc_trailer *trailer) {
    CHECK(atomic_load(&stream->closed));
    trailer->value[0] = '\0';
    return rpc_metadata_find(stream->trailers, trailer->key, trailer->value,
                             sizeof trailer->value);
}

void rpc_stream_cancel(struct rpc_stream *stream) {
    rpc_endpoint_cancel(&stream->endpoint, STATUS_CANCELLED, "cancelled by the client");
}

/* Blocking mode: nobody else runs the stream's loop, so it is run here until the core call is
 * gone. */
static void drain_own_loop(struct rpc_stream *stream) {
    gpr_timespec never = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    while (atomic_load(&stream->refs) > 1) rpc_loop_step(&stream->own_loop, never);
    grpc_completion_queue_shutdown(stream->own_loop.queue);
    while (rpc_loop_step(&stream->own_loop, never) != RPC_LOOP_SHUT_DOWN) continue;
    rpc_loop_destroy(&stream->own_loop);
}

void rpc_stream_destroy(struct rpc_stream *stream) {
    if (stream == NULL) return;
    bool inside = !stream->blocking &&
                  pthread_equal(pthread_self(), stream->channel->loop.thread);
    pthread_mutex_lock(&stream->callback_lock);
    stream->silenced = true;
    while (stream->in_callback && !inside) {
        pthread_cond_wait(&stream->callback_over, &stream->callback_lock);
    }
    pthread_mutex_unlock(&stream->callback_lock);
    rpc_stream_cancel(stream);
    if (stream->blocking) drain_own_loop(stream);
    stream_unref(stream);
}
