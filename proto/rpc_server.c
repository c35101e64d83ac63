/* The server: accepting, the method table, shutdown; and the calls' own functions. See rpc.h. */
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/log.h"
#include "proto/rpc_internal.h"

#define NS_PER_MS 1000000LL
#define LIFETIME_CHECK_MS 250

/* One queue thread, the one call it has asked the server for, and its live calls. */
struct server_loop {
    struct rpc_loop base;
    struct rpc_server *server;
    struct rpc_op accept_op;
    grpc_call *accepted;
    grpc_call_details details;
    grpc_metadata_array metadata;
    struct rpc_call *first;          /* calls whose lifetime is limited, this thread only */
    int64_t next_check_ns;
};

struct rpc_server {
    grpc_server *core;
    const struct rpc_service *services;
    size_t n_services;
    struct rpc_limits limits;
    struct server_loop *loops;
    int n_loops, port;
    bool stopped;
    struct rpc_op shutdown_op;
    pthread_mutex_t lock;            /* guards all below */
    pthread_cond_t changed;
    size_t n_live, n_foreground;     /* n_foreground of them hold the grace of stopping */
    bool shut_down;                  /* the core server accepts no more */
};

struct rpc_call {
    struct rpc_endpoint endpoint;
    struct rpc_server *server;
    const struct rpc_method *method; /* NULL: unknown to the table */
    void *user;
    _Atomic(void *) data;
    atomic_int refs;
    int cancelled_by_core;
    atomic_bool cancelled;
    bool began;                      /* a callback has seen it, so on_closed is owed */
    int64_t deadline_ns, lifetime_end_ns;
    char *metadata, *peer;
    struct rpc_call *previous, *next;   /* in the loop's list */
};

/* ---- references ------------------------------------------------------------------------------ */

struct rpc_call *rpc_call_ref(struct rpc_call *call) {
    atomic_fetch_add_explicit(&call->refs, 1, memory_order_relaxed);
    return call;
}

void rpc_call_unref(struct rpc_call *call) {
    if (atomic_fetch_sub_explicit(&call->refs, 1, memory_order_acq_rel) != 1) return;
    rpc_endpoint_fini(&call->endpoint);
    free(call->metadata);
    gpr_free(call->peer);
    free(call);
}

static struct rpc_call *call_of(struct rpc_endpoint *endpoint) {
    return (struct rpc_call *)endpoint;   /* its first member */
}

/* ---- the list of calls with a limited lifetime ----------------------------------------------- */

static struct server_loop *loop_of(struct rpc_call *call) {
    return (struct server_loop *)call->endpoint.loop;   /* its first member */
}

static void lifetime_begin(struct rpc_call *call) {
    if (call->method->lifetime_max_ms == 0) return;
    struct server_loop *loop = loop_of(call);
    call->lifetime_end_ns = clock_now_ns() + call->method->lifetime_max_ms * NS_PER_MS;
    if (call->deadline_ns == 0 || call->deadline_ns > call->lifetime_end_ns) {
        call->deadline_ns = call->lifetime_end_ns;
    }
    call->next = loop->first;
    if (loop->first != NULL) loop->first->previous = call;
    loop->first = call;
}

static void lifetime_end(struct rpc_call *call) {
    struct server_loop *loop = loop_of(call);
    if (call->lifetime_end_ns == 0) return;
    if (call->previous != NULL) call->previous->next = call->next;
    else loop->first = call->next;
    if (call->next != NULL) call->next->previous = call->previous;
}

static void lifetime_check(struct server_loop *loop) {
    int64_t now = clock_now_ns();
    if (loop->first == NULL || now < loop->next_check_ns) return;
    loop->next_check_ns = now + LIFETIME_CHECK_MS * NS_PER_MS;
    for (struct rpc_call *call = loop->first; call != NULL; call = call->next) {
        if (now < call->lifetime_end_ns) continue;
        rpc_call_abort(call, STATUS_DEADLINE_EXCEEDED, "the server's time limit is reached");
    }
}

/* ---- endpoint hooks: a call's life ----------------------------------------------------------- */

static bool call_message(struct rpc_endpoint *endpoint, ProtobufCMessage *message) {
    struct rpc_call *call = call_of(endpoint);
    call->began = true;
    call->method->on_message(call, message, call->user);
    return call->method->kind == RPC_REQUEST_STREAM;
}

static void call_malformed(struct rpc_endpoint *endpoint, const struct error *err) {
    rpc_call_fail(call_of(endpoint), err);
}

static void call_read_end(struct rpc_endpoint *endpoint) {
    struct rpc_call *call = call_of(endpoint);
    if (call->method->kind == RPC_ONE_REQUEST) {
        rpc_call_finish(call, STATUS_INVALID_ARGUMENT, "the call carries no request message");
    } else if (call->method->on_half_close != NULL) {
        call->method->on_half_close(call, call->user);
    } else {
        rpc_call_finish(call, STATUS_OK, NULL);
    }
}

static void call_drained(struct rpc_endpoint *endpoint) {
    struct rpc_call *call = call_of(endpoint);
    if (call->method->on_drained != NULL) call->method->on_drained(call, call->user);
}

static void call_closed(struct rpc_endpoint *endpoint) {
    struct rpc_call *call = call_of(endpoint);
    atomic_store(&call->cancelled, call->cancelled_by_core != 0);
    lifetime_end(call);
    if (call->began && call->method->on_closed != NULL) {
        call->method->on_closed(call, call->cancelled_by_core != 0, call->user);
    }
}

static bool is_foreground(const struct rpc_call *call) {
    return call->method != NULL && !call->method->background;
}

static void call_released(struct rpc_endpoint *endpoint) {
    struct rpc_server *server = call_of(endpoint)->server;
    bool foreground = is_foreground(call_of(endpoint));
    rpc_call_unref(call_of(endpoint));
    pthread_mutex_lock(&server->lock);
    server->n_live--;
    server->n_foreground -= foreground;
    if (server->n_foreground == 0) pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->lock);
}

static const struct rpc_endpoint_hooks call_hooks = {
    .message = call_message, .malformed = call_malformed, .read_end = call_read_end,
    .drained = call_drained, .closed = call_closed, .released = call_released,
};

/* ---- accepting ------------------------------------------------------------------------------- */

static void accept_next(struct server_loop *loop) {
    grpc_call_details_init(&loop->details);
    grpc_metadata_array_init(&loop->metadata);
    RPC_HAND_OVER(&loop->accept_op);
    grpc_call_error error =
        grpc_server_request_call(loop->server->core, &loop->accepted, &loop->details,
                                 &loop->metadata, loop->base.queue, loop->base.queue,
                                 &loop->accept_op);
    CHECK(error == GRPC_CALL_OK);
}

static const struct rpc_method *find_method(const struct rpc_server *server, grpc_slice path,
                                            void **user) {
    for (size_t s = 0; s < server->n_services; s++) {
        const struct rpc_service *service = &server->services[s];
        for (size_t m = 0; m < service->n_methods; m++) {
            if (grpc_slice_str_cmp(path, service->methods[m].path) != 0) continue;
            *user = service->user;
            return &service->methods[m];
        }
    }
    return NULL;
}

static struct rpc_call *call_create(struct server_loop *loop) {
    struct rpc_server *server = loop->server;
    struct rpc_call *call = xcalloc(1, sizeof *call);
    call->server = server;
    call->method = find_method(server, loop->details.method, &call->user);
    call->deadline_ns = rpc_deadline_from_core(loop->details.deadline);
    call->metadata = rpc_metadata_copy(&loop->metadata);
    call->peer = grpc_call_get_peer(loop->accepted);
    atomic_init(&call->refs, 1);
    call->endpoint.hooks = &call_hooks;
    call->endpoint.limits = &server->limits;
    call->endpoint.loop = &loop->base;
    call->endpoint.core = loop->accepted;
    if (call->method != NULL) call->endpoint.incoming_type = call->method->request;
    rpc_endpoint_init(&call->endpoint);
    pthread_mutex_lock(&server->lock);
    server->n_live++;
    server->n_foreground += is_foreground(call);
    pthread_mutex_unlock(&server->lock);
    return call;
}

static void refuse_unknown(struct rpc_call *call, grpc_slice path) {
    char text[256];
    snprintf(text, sizeof text, "this server has no method %.*s",
             (int)(GRPC_SLICE_LENGTH(path) < 200 ? GRPC_SLICE_LENGTH(path) : 200),
             (const char *)GRPC_SLICE_START_PTR(path));
    rpc_call_finish(call, STATUS_UNIMPLEMENTED, text);
}

static void accept_done(struct rpc_op *op, bool ok) {
    struct server_loop *loop = op->owner;
    if (ok) {
        struct rpc_call *call = call_create(loop);
        grpc_op close = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER};
        close.data.recv_close_on_server.cancelled = &call->cancelled_by_core;
        rpc_endpoint_open(&call->endpoint, &close, 1, call->method != NULL);
        if (call->method == NULL) {
            refuse_unknown(call, loop->details.method);
        } else {
            lifetime_begin(call);
            call->began = call->method->kind == RPC_REQUEST_STREAM;
            if (call->began && call->method->on_open) call->method->on_open(call, call->user);
        }
    }
    grpc_call_details_destroy(&loop->details);
    grpc_metadata_array_destroy(&loop->metadata);
    if (ok) accept_next(loop);
}

static void *loop_main(void *argument) {
    struct server_loop *loop = argument;
    enum rpc_loop_event event;
    do {
        gpr_timespec deadline = loop->first == NULL
                                    ? gpr_inf_future(GPR_CLOCK_MONOTONIC)
                                    : rpc_deadline_to_core(clock_now_ns() +
                                                           LIFETIME_CHECK_MS * NS_PER_MS);
        event = rpc_loop_step(&loop->base, deadline);
        lifetime_check(loop);
    } while (event != RPC_LOOP_SHUT_DOWN);
    return NULL;
}

/* ---- creating -------------------------------------------------------------------------------- */

struct rpc_server_options rpc_server_options_default(void) {
    return (struct rpc_server_options){
        .address = "127.0.0.1:0", .n_threads = 1,
        .message_bytes_max = 16u << 20, .unpacked_bytes_max = 64u << 20,
        .backlog_messages_max = 1024, .backlog_bytes_max = 8u << 20,
        .keepalive_ms = 10000, .keepalive_timeout_ms = 5000, .client_keepalive_min_ms = 500,
    };
}

static enum status check_tables(const struct rpc_service *services, size_t n, struct error *err) {
    for (size_t s = 0; s < n; s++) {
        for (size_t m = 0; m < services[s].n_methods; m++) {
            const struct rpc_method *method = &services[s].methods[m];
            const char *path = method->path != NULL ? method->path : "(none)";
            if (method->path == NULL || path[0] != '/' || strchr(path + 1, '/') == NULL) {
                return error_set(err, STATUS_INVALID_ARGUMENT,
                                 "method path %s is not of the form /package.Service/Method", path);
            }
            if (method->request == NULL || method->on_message == NULL) {
                return error_set(err, STATUS_INVALID_ARGUMENT,
                                 "method %s lacks its request type or its on_message", path);
            }
            if (method->kind == RPC_ONE_REQUEST && (method->on_open || method->on_half_close)) {
                return error_set(err, STATUS_INVALID_ARGUMENT,
                                 "method %s takes one request; on_open and on_half_close belong to "
                                 "request streams", path);
            }
        }
    }
    return STATUS_OK;
}

/* "host:port", "[v6]:port" or ":port" in two parts. */
static bool split_address(const char *address, char host[256], char port[16]) {
    const char *colon = strrchr(address, ':');
    if (colon == NULL || colon[1] == '\0' || strlen(colon + 1) >= 16) return false;
    size_t length = (size_t)(colon - address);
    if (length >= 256) return false;
    bool bracketed = length >= 2 && address[0] == '[' && address[length - 1] == ']';
    if (!bracketed && memchr(address, ':', length) != NULL) return false;
    memcpy(host, address + bracketed, length - 2 * bracketed);
    host[length - 2 * bracketed] = '\0';
    memcpy(port, colon + 1, strlen(colon + 1) + 1);
    return true;
}

/* gRPC says only that binding failed. Trying it first with a plain socket gives the reason. */
static enum status probe_address(const char *address, struct error *err) {
    char host[256], port[16];
    char *rest;
    if (!split_address(address, host, port) || strtol(port, &rest, 10) > 65535 || *rest != '\0') {
        return error_set(err, STATUS_UNAVAILABLE,
                         "cannot listen on '%s': expected host:port with a port from 0 to 65535",
                         address);
    }
    struct addrinfo hints = {.ai_flags = AI_PASSIVE, .ai_socktype = SOCK_STREAM}, *found;
    int failure = getaddrinfo(host[0] != '\0' ? host : NULL, port, &hints, &found);
    if (failure != 0) {
        return error_set(err, STATUS_UNAVAILABLE, "cannot listen on %s: %s", address,
                         gai_strerror(failure));
    }
    int yes = 1, error = 0;
    int fd = socket(found->ai_family, found->ai_socktype | SOCK_CLOEXEC, 0);
    if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (fd < 0 || bind(fd, found->ai_addr, found->ai_addrlen) != 0 || listen(fd, 1) != 0) {
        error = errno;
    }
    if (fd >= 0) close(fd);
    freeaddrinfo(found);
    if (error == 0) return STATUS_OK;
    return error_set(err, STATUS_UNAVAILABLE, "cannot listen on %s: %s%s", address, strerror(error),
                     error == EADDRINUSE ? "; stop the other server or choose another port" : "");
}

static grpc_server *core_create(const struct rpc_server_options *options) {
    grpc_arg args[] = {
        rpc_arg_int(GRPC_ARG_ALLOW_REUSEPORT, 0),
        rpc_arg_int(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)options->message_bytes_max),
        rpc_arg_int(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, (int)options->message_bytes_max),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_TIME_MS, options->keepalive_ms),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, options->keepalive_timeout_ms),
        rpc_arg_int(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        rpc_arg_int(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        rpc_arg_int(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                    options->client_keepalive_min_ms),
    };
    grpc_channel_args list = {sizeof args / sizeof args[0], args};
    return grpc_server_create(&list, NULL);
}

static void shutdown_done(struct rpc_op *op, bool ok) {
    (void)ok;
    struct rpc_server *server = op->owner;
    pthread_mutex_lock(&server->lock);
    server->shut_down = true;
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->lock);
}

static struct rpc_server *server_alloc(const struct rpc_server_options *options,
                                       const struct rpc_service *services, size_t n_services) {
    struct rpc_server *server = xcalloc(1, sizeof *server);
    server->services = services;
    server->n_services = n_services;
    server->limits = (struct rpc_limits){
        options->message_bytes_max, options->unpacked_bytes_max, options->backlog_messages_max,
        options->backlog_bytes_max};
    server->n_loops = options->n_threads;
    server->loops = xcalloc((size_t)server->n_loops, sizeof *server->loops);
    server->shutdown_op = (struct rpc_op){.done = shutdown_done, .owner = server};
    pthread_mutex_init(&server->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&server->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    server->core = core_create(options);
    for (int i = 0; i < server->n_loops; i++) {
        struct server_loop *loop = &server->loops[i];
        rpc_loop_init(&loop->base);
        loop->server = server;
        loop->accept_op = (struct rpc_op){.done = accept_done, .owner = loop};
        grpc_server_register_completion_queue(server->core, loop->base.queue, NULL);
    }
    return server;
}

enum status rpc_server_create(struct rpc_server **out, const struct rpc_server_options *options,
                              const struct rpc_service *services, size_t n_services,
                              struct error *err) {
    *out = NULL;
    CHECK(options->n_threads >= 1 && options->message_bytes_max <= INT32_MAX);
    TRY(check_tables(services, n_services, err));
    TRY(probe_address(options->address, err));
    grpc_init();
    struct rpc_server *server = server_alloc(options, services, n_services);
    grpc_server_credentials *plain = grpc_insecure_server_credentials_create();
    server->port = grpc_server_add_http2_port(server->core, options->address, plain);
    grpc_server_credentials_release(plain);
    grpc_server_start(server->core);
    for (int i = 0; i < server->n_loops; i++) {
        struct rpc_loop *loop = &server->loops[i].base;
        accept_next(&server->loops[i]);
        CHECK(pthread_create(&loop->thread, NULL, loop_main, &server->loops[i]) == 0);
    }
    if (server->port == 0) {   /* taken between the probe and now */
        rpc_server_destroy(server);
        return error_set(err, STATUS_UNAVAILABLE, "cannot listen on %s: the port was just taken",
                         options->address);
    }
    *out = server;
    return STATUS_OK;
}

int rpc_server_port(const struct rpc_server *server) { return server->port; }

size_t rpc_server_live_calls(const struct rpc_server *server) {
    struct rpc_server *guarded = (struct rpc_server *)server;
    pthread_mutex_lock(&guarded->lock);
    size_t n = server->n_live;
    pthread_mutex_unlock(&guarded->lock);
    return n;
}

/* ---- stopping -------------------------------------------------------------------------------- */

/* Gives the calls in the foreground `grace_ms` to end by themselves. */
static void wait_for_grace(struct rpc_server *server, int64_t grace_ms) {
    int64_t until = clock_now_ns() + grace_ms * NS_PER_MS;
    struct timespec at = {until / 1000000000, until % 1000000000};
    int late = 0;
    pthread_mutex_lock(&server->lock);
    while (server->n_foreground > 0 && late == 0) {
        late = pthread_cond_timedwait(&server->changed, &server->lock, &at);
    }
    if (late != 0) log_debug("rpc: %zu calls are cancelled at shutdown", server->n_foreground);
    pthread_mutex_unlock(&server->lock);
}

static void wait_until_gone(struct rpc_server *server) {
    pthread_mutex_lock(&server->lock);
    while (server->n_live > 0 || !server->shut_down) {
        pthread_cond_wait(&server->changed, &server->lock);
    }
    pthread_mutex_unlock(&server->lock);
}

void rpc_server_stop(struct rpc_server *server, int64_t grace_ms) {
    if (server->stopped) return;
    server->stopped = true;
    RPC_HAND_OVER(&server->shutdown_op);
    grpc_server_shutdown_and_notify(server->core, server->loops[0].base.queue,
                                    &server->shutdown_op);
    wait_for_grace(server, grace_ms);
    grpc_server_cancel_all_calls(server->core);
    wait_until_gone(server);
    for (int i = 0; i < server->n_loops; i++) {
        grpc_completion_queue_shutdown(server->loops[i].base.queue);
    }
    for (int i = 0; i < server->n_loops; i++) pthread_join(server->loops[i].base.thread, NULL);
    grpc_server_destroy(server->core);
    for (int i = 0; i < server->n_loops; i++) rpc_loop_destroy(&server->loops[i].base);
    grpc_shutdown();
}

void rpc_server_destroy(struct rpc_server *server) {
    if (server == NULL) return;
    rpc_server_stop(server, 0);
    pthread_mutex_destroy(&server->lock);
    pthread_cond_destroy(&server->changed);
    free(server->loops);
    free(server);
}

/* ---- a call's functions ---------------------------------------------------------------------- */

void rpc_call_set_data(struct rpc_call *call, void *data) { atomic_store(&call->data, data); }

void *rpc_call_data(const struct rpc_call *call) { return atomic_load(&call->data); }

enum status rpc_call_send(struct rpc_call *call, const ProtobufCMessage *message) {
    return rpc_endpoint_send(&call->endpoint, message, false);
}

enum status rpc_call_reply(struct rpc_call *call, const ProtobufCMessage *message) {
    return rpc_endpoint_send(&call->endpoint, message, true);
}

size_t rpc_call_backlog(const struct rpc_call *call) {
    return rpc_endpoint_backlog(&((struct rpc_call *)call)->endpoint);
}

void rpc_call_trailer(struct rpc_call *call, const char *key, const char *value) {
    struct rpc_endpoint *e = &call->endpoint;
    pthread_mutex_lock(&e->lock);
    if (!e->end_wanted && !e->end_started && !e->closed) {
        CHECK(e->n_trailers < RPC_TRAILERS_MAX);
        grpc_metadata *trailer = &e->trailers[e->n_trailers++];
        trailer->key = grpc_slice_from_copied_string(key);
        trailer->value = grpc_slice_from_copied_string(value);
        CHECK(grpc_header_key_is_legal(trailer->key));
        CHECK(grpc_header_nonbin_value_is_legal(trailer->value));
    }
    pthread_mutex_unlock(&e->lock);
}

void rpc_call_finish(struct rpc_call *call, enum status status, const char *text) {
    rpc_endpoint_end(&call->endpoint, status, text);
}

void rpc_call_fail(struct rpc_call *call, const struct error *err) {
    rpc_endpoint_end(&call->endpoint, err->status, err->text);
}

void rpc_call_abort(struct rpc_call *call, enum status status, const char *text) {
    rpc_endpoint_cancel(&call->endpoint, status, text != NULL ? text : "");
}

int64_t rpc_call_deadline_ns(const struct rpc_call *call) { return call->deadline_ns; }

bool rpc_call_cancelled(const struct rpc_call *call) { return atomic_load(&call->cancelled); }

const char *rpc_call_peer(const struct rpc_call *call) { return call->peer; }

bool rpc_call_metadata(const struct rpc_call *call, const char *key, char *value, size_t size) {
    return rpc_metadata_find(call->metadata, key, value, size);
}
