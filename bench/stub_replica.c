#include "bench/stub_replica.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "tandem/v1/replica.pb-c.h"

struct stub_request {
    uint64_t key;
    uint32_t left;      /* tokens to make */
    bool started, cancelled;
};

struct stub_replica {
    struct stub_options options;
    struct rpc_stream *stream;
    pthread_t thread;
    pthread_mutex_t lock;              /* guards all below */
    pthread_cond_t changed;
    struct stub_request *requests;
    size_t n_requests, capacity;
    uint64_t checkpoint_fingerprint;
    bool planned, closed, stopping;
    struct error end;
    long made;
};

/* ---- messages from the coordinator ----------------------------------------------------------- */

static void add(struct stub_replica *stub, const Tandem__V1__Submit *submit) {
    if (stub->n_requests == stub->capacity) {
        stub->capacity = stub->capacity * 2 + 64;
        stub->requests = xrealloc(stub->requests, stub->capacity * sizeof *stub->requests);
    }
    stub->requests[stub->n_requests++] =
        (struct stub_request){.key = submit->key, .left = submit->max_tokens};
}

static void cancel(struct stub_replica *stub, uint64_t key) {
    for (size_t i = 0; i < stub->n_requests; i++) {
        if (stub->requests[i].key == key) stub->requests[i].cancelled = true;
    }
}

static void on_message(struct rpc_stream *stream, const ProtobufCMessage *message, void *user) {
    (void)stream;
    struct stub_replica *stub = user;
    const Tandem__V1__ReplicaDown *down = (const Tandem__V1__ReplicaDown *)message;
    pthread_mutex_lock(&stub->lock);
    if (down->kind_case == TANDEM__V1__REPLICA_DOWN__KIND_PLAN) {
        stub->checkpoint_fingerprint = down->plan->checkpoint_fingerprint;
        stub->planned = true;
    } else if (down->kind_case == TANDEM__V1__REPLICA_DOWN__KIND_WORK) {
        for (size_t i = 0; i < down->work->n_submits; i++) add(stub, down->work->submits[i]);
        for (size_t i = 0; i < down->work->n_cancels; i++) cancel(stub, down->work->cancels[i]);
    }
    pthread_cond_signal(&stub->changed);
    pthread_mutex_unlock(&stub->lock);
}

static void on_closed(struct rpc_stream *stream, const struct error *end, void *user) {
    (void)stream;
    struct stub_replica *stub = user;
    pthread_mutex_lock(&stub->lock);
    stub->closed = true;
    stub->end = *end;
    pthread_cond_signal(&stub->changed);
    pthread_mutex_unlock(&stub->lock);
}

/* ---- steps ----------------------------------------------------------------------------------- */

/* The columns of one step; large enough for `max` requests. */
struct stub_columns {
    uint64_t *keys, *finished, *started;
    uint32_t *counts, *reasons, *cached;
    int32_t *tokens;
    size_t max;
};

static void columns_reserve(struct stub_columns *columns, size_t n) {
    if (n <= columns->max) return;
    columns->max = n * 2;
    columns->keys = xrealloc(columns->keys, columns->max * sizeof *columns->keys);
    columns->finished = xrealloc(columns->finished, columns->max * sizeof *columns->finished);
    columns->started = xrealloc(columns->started, columns->max * sizeof *columns->started);
    columns->counts = xrealloc(columns->counts, columns->max * sizeof *columns->counts);
    columns->reasons = xrealloc(columns->reasons, columns->max * sizeof *columns->reasons);
    columns->cached = xrealloc(columns->cached, columns->max * sizeof *columns->cached);
    columns->tokens = xrealloc(columns->tokens, columns->max * sizeof *columns->tokens);
}

static void columns_free(struct stub_columns *columns) {
    free(columns->keys);
    free(columns->finished);
    free(columns->started);
    free(columns->counts);
    free(columns->reasons);
    free(columns->cached);
    free(columns->tokens);
}

/* One token for each request, under the lock; requests that are over leave. */
static void make_step(struct stub_replica *stub, struct stub_columns *columns,
                      Tandem__V1__Step *step) {
    size_t n_left = 0;
    columns_reserve(columns, stub->n_requests);
    step->keys = columns->keys;
    step->token_counts = columns->counts;
    step->tokens = columns->tokens;
    step->finished_keys = columns->finished;
    step->finish_reasons = columns->reasons;
    step->cached_tokens = columns->cached;
    step->started_keys = columns->started;
    for (size_t i = 0; i < stub->n_requests; i++) {
        struct stub_request *request = &stub->requests[i];
        if (!request->started) columns->started[step->n_started_keys++] = request->key;
        request->started = true;
        if (!request->cancelled) {
            columns->keys[step->n_keys] = request->key;
            columns->counts[step->n_keys] = 1;
            columns->tokens[step->n_keys++] = stub->options.token;
            request->left--;
        }
        if (request->cancelled || request->left == 0) {
            columns->finished[step->n_finished_keys] = request->key;
            columns->cached[step->n_finished_keys] = 0;
            columns->reasons[step->n_finished_keys++] =
                request->cancelled ? TANDEM__V1__FINISH_REASON__FINISH_CANCELLED
                                   : TANDEM__V1__FINISH_REASON__FINISH_LENGTH;
        } else {
            stub->requests[n_left++] = *request;
        }
    }
    stub->n_requests = n_left;
    step->n_token_counts = step->n_tokens = step->n_keys;
    step->n_finish_reasons = step->n_cached_tokens = step->n_finished_keys;
    stub->made += (long)step->n_tokens;
}

static void send_step(struct stub_replica *stub, Tandem__V1__Step *step) {
    Tandem__V1__StepStats stats = TANDEM__V1__STEP_STATS__INIT;
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    stats.running = stats.rows = (uint32_t)step->n_keys;
    step->stats = &stats;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_STEP;
    up.step = step;
    if (rpc_stream_send(stub->stream, &up.base) != STATUS_OK) rpc_stream_cancel(stub->stream);
}

static void *steps_main(void *user) {
    struct stub_replica *stub = user;
    struct stub_columns columns = {0};
    pthread_mutex_lock(&stub->lock);
    while (!stub->stopping && !stub->closed) {
        if (stub->n_requests == 0) {
            pthread_cond_wait(&stub->changed, &stub->lock);
            continue;
        }
        long ahead = (long)stub->n_requests * stub->options.ahead;
        if (stub->made - atomic_load(stub->options.received) > ahead) {
            pthread_mutex_unlock(&stub->lock);
            clock_sleep_ns(50000);
            pthread_mutex_lock(&stub->lock);
            continue;
        }
        Tandem__V1__Step step = TANDEM__V1__STEP__INIT;
        make_step(stub, &columns, &step);
        pthread_mutex_unlock(&stub->lock);
        send_step(stub, &step);
        pthread_mutex_lock(&stub->lock);
    }
    pthread_mutex_unlock(&stub->lock);
    columns_free(&columns);
    return NULL;
}

/* ---- joining --------------------------------------------------------------------------------- */

static enum status send_hello(struct stub_replica *stub) {
    Tandem__V1__RankHello rank = TANDEM__V1__RANK_HELLO__INIT, *ranks[] = {&rank};
    Tandem__V1__Hello hello = TANDEM__V1__HELLO__INIT;
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    rank.host = "stub";
    rank.device = "none";
    hello.protocol = 1;
    hello.replica_id = "stub";
    hello.n_ranks = 1;
    hello.ranks = ranks;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_HELLO;
    up.hello = &hello;
    return rpc_stream_send(stub->stream, &up.base);
}

static enum status send_ready(struct stub_replica *stub) {
    Tandem__V1__Ready ready = TANDEM__V1__READY__INIT;
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    ready.kv_blocks = 1 << 20;
    ready.max_sequences = stub->options.max_sequences;
    ready.max_context = 1 << 20;
    ready.checkpoint_fingerprint = stub->checkpoint_fingerprint;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_READY;
    up.ready = &ready;
    return rpc_stream_send(stub->stream, &up.base);
}

static enum status await_plan(struct stub_replica *stub, struct error *err) {
    pthread_mutex_lock(&stub->lock);
    while (!stub->planned && !stub->closed) pthread_cond_wait(&stub->changed, &stub->lock);
    enum status status = STATUS_OK;
    if (!stub->planned) {
        status = error_set(err, STATUS_UNAVAILABLE, "the coordinator took no replica: %s",
                           stub->end.text);
    }
    pthread_mutex_unlock(&stub->lock);
    return status;
}

enum status stub_start(struct stub_replica **out, struct rpc_channel *channel,
                       const struct stub_options *options, struct error *err) {
    struct stub_replica *stub = xcalloc(1, sizeof *stub);
    stub->options = *options;
    pthread_mutex_init(&stub->lock, NULL);
    pthread_cond_init(&stub->changed, NULL);
    struct rpc_stream_callbacks callbacks = {
        .on_message = on_message, .on_closed = on_closed, .user = stub};
    enum status status = rpc_stream_open(&stub->stream, channel, "/tandem.v1.Replica/Attach",
                                         &tandem__v1__replica_down__descriptor, 0, &callbacks, err);
    if (status == STATUS_OK) send_hello(stub);
    if (status == STATUS_OK) status = await_plan(stub, err);
    if (status == STATUS_OK) send_ready(stub);
    if (status == STATUS_OK) CHECK(pthread_create(&stub->thread, NULL, steps_main, stub) == 0);
    if (status == STATUS_OK) {
        *out = stub;
        return STATUS_OK;
    }
    rpc_stream_destroy(stub->stream);
    pthread_cond_destroy(&stub->changed);
    pthread_mutex_destroy(&stub->lock);
    free(stub);
    return status;
}

void stub_stop(struct stub_replica *stub) {
    if (stub == NULL) return;
    pthread_mutex_lock(&stub->lock);
    stub->stopping = true;
    pthread_cond_signal(&stub->changed);
    pthread_mutex_unlock(&stub->lock);
    pthread_join(stub->thread, NULL);
    rpc_stream_destroy(stub->stream);
    pthread_cond_destroy(&stub->changed);
    pthread_mutex_destroy(&stub->lock);
    free(stub->requests);
    free(stub);
}
