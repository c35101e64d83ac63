#include "worker/link.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "common/clock.h"
#include "common/log.h"
#include "proto/rpc.h"

struct letter {
    struct letter *next;
    Tandem__V1__ReplicaDown *message;
};

struct link {
    struct rpc_channel *channel;
    struct rpc_stream *stream;
    Tandem__V1__ReplicaDown *first; /* holds the plan that link_dial handed out */
    pthread_mutex_t mutex;          /* guards what follows */
    pthread_cond_t arrived;
    struct letter *head, **tail;
    bool closed;
    struct error end;
};

static void on_message(struct rpc_stream *stream, const ProtobufCMessage *message, void *user) {
    (void)stream;
    struct link *link = user;
    struct letter *letter = xmalloc(sizeof *letter);
    *letter = (struct letter){NULL, (Tandem__V1__ReplicaDown *)rpc_message_keep(message)};
    pthread_mutex_lock(&link->mutex);
    *link->tail = letter;
    link->tail = &letter->next;
    pthread_cond_signal(&link->arrived);
    pthread_mutex_unlock(&link->mutex);
}

static void on_closed(struct rpc_stream *stream, const struct error *end, void *user) {
    (void)stream;
    struct link *link = user;
    pthread_mutex_lock(&link->mutex);
    link->closed = true;
    link->end = *end;
    pthread_cond_signal(&link->arrived);
    pthread_mutex_unlock(&link->mutex);
}

static struct timespec deadline_in(int64_t wait_ns) {
    int64_t at = clock_now_ns() + wait_ns;
    return (struct timespec){at / 1000000000, at % 1000000000};
}

enum status link_take(struct link *link, Tandem__V1__ReplicaDown **message, int64_t wait_ns,
                      struct error *err) {
    enum status status = STATUS_OK;
    *message = NULL;
    pthread_mutex_lock(&link->mutex);
    if (wait_ns > 0) {
        struct timespec until = deadline_in(wait_ns);
        while (link->head == NULL && !link->closed) {
            if (pthread_cond_timedwait(&link->arrived, &link->mutex, &until) != 0) break;
        }
    }
    struct letter *letter = link->head;
    if (letter != NULL) {
        link->head = letter->next;
        if (link->head == NULL) link->tail = &link->head;
        *message = letter->message;
    } else if (link->closed) {
        status = error_set(err, STATUS_UNAVAILABLE, "the coordinator is gone: %s",
                           link->end.text[0] ? link->end.text : status_name(link->end.status));
    }
    pthread_mutex_unlock(&link->mutex);
    free(letter);
    return status;
}

void link_free_message(Tandem__V1__ReplicaDown *message) {
    if (message != NULL) rpc_message_free(&message->base);
}

static void send_up(struct link *link, Tandem__V1__ReplicaUp *up) {
    enum status status = rpc_stream_send(link->stream, &up->base);
    if (status != STATUS_OK && status != STATUS_CANCELLED) {
        log_error("cannot tell the coordinator: %s", status_name(status));
        rpc_stream_cancel(link->stream); /* a step that is not told breaks every stream in it */
    }
}

static enum status await_plan(struct link *link, Tandem__V1__Plan **plan, const char *target,
                              int64_t patience_ns, struct error *err) {
    Tandem__V1__ReplicaDown *down;
    TRY(link_take(link, &down, patience_ns, err));
    if (down == NULL) {
        return error_set(err, STATUS_UNAVAILABLE,
                         "no coordinator answered at %s within %.0f s; is tandem-coordinator running "
                         "there?",
                         target, (double)patience_ns / 1e9);
    }
    link->first = down;
    if (down->kind_case == TANDEM__V1__REPLICA_DOWN__KIND_REFUSAL) {
        return error_set(err, STATUS_FAILED_PRECONDITION, "the coordinator refused this replica: %s",
                         down->refusal->reason);
    }
    if (down->kind_case != TANDEM__V1__REPLICA_DOWN__KIND_PLAN) {
        return error_set(err, STATUS_INTERNAL,
                         "the coordinator's first message is of kind %d, expected a plan",
                         (int)down->kind_case);
    }
    *plan = down->plan;
    return STATUS_OK;
}

enum status link_dial(struct link **out, Tandem__V1__Plan **plan, const char *target,
                      const Tandem__V1__Hello *hello, int64_t patience_ns, struct error *err) {
    enum status status;
    struct link *link = xcalloc(1, sizeof *link);
    link->tail = &link->head;
    pthread_mutex_init(&link->mutex, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&link->arrived, &attributes);
    pthread_condattr_destroy(&attributes);

    struct rpc_channel_options options = rpc_channel_options_default();
    options.wait_for_ready = true;
    TRY_OR_FAIL(rpc_channel_create(&link->channel, target, &options, err));
    struct rpc_stream_callbacks callbacks = {
        .on_message = on_message, .on_closed = on_closed, .user = link};
    TRY_OR_FAIL(rpc_stream_open(&link->stream, link->channel, "/tandem.v1.Replica/Attach",
                                &tandem__v1__replica_down__descriptor, 0, &callbacks, err));
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_HELLO;
    up.hello = (Tandem__V1__Hello *)hello;
    send_up(link, &up);
    TRY_OR_FAIL(await_plan(link, plan, target, patience_ns, err));
    *out = link;
    return STATUS_OK;

fail:
    link_close(link);
    return status;
}

void link_close(struct link *link) {
    if (link == NULL) return;
    rpc_stream_destroy(link->stream);
    rpc_channel_destroy(link->channel);
    while (link->head != NULL) {
        struct letter *letter = link->head;
        link->head = letter->next;
        link_free_message(letter->message);
        free(letter);
    }
    link_free_message(link->first);
    pthread_cond_destroy(&link->arrived);
    pthread_mutex_destroy(&link->mutex);
    free(link);
}

void link_send_progress(struct link *link, uint64_t bytes_done, uint64_t bytes_total) {
    Tandem__V1__LoadProgress progress = TANDEM__V1__LOAD_PROGRESS__INIT;
    progress.bytes_done = bytes_done;
    progress.bytes_total = bytes_total;
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_PROGRESS;
    up.progress = &progress;
    send_up(link, &up);
}

void link_send_ready(struct link *link, Tandem__V1__Ready *ready) {
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_READY;
    up.ready = ready;
    send_up(link, &up);
}

void link_send_step(struct link *link, Tandem__V1__Step *step) {
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_STEP;
    up.step = step;
    send_up(link, &up);
}

void link_send_fatal(struct link *link, const char *reason) {
    Tandem__V1__Refusal fatal = TANDEM__V1__REFUSAL__INIT;
    fatal.reason = (char *)reason;
    Tandem__V1__ReplicaUp up = TANDEM__V1__REPLICA_UP__INIT;
    up.kind_case = TANDEM__V1__REPLICA_UP__KIND_FATAL;
    up.fatal = &fatal;
    send_up(link, &up);
    for (int i = 0; i < 100 && rpc_stream_backlog(link->stream) > 0; i++) {
        clock_sleep_ns(5 * 1000 * 1000);
    }
}
