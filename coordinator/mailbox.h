/* Events from one thread to another: a bounded queue in the order of arrival.
 *
 * RPC threads only post; the taking thread gets everything that waits at once, so that a busy
 * coordinator locks once per round and not once per event. */
#pragma once
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/rpc.h"

struct session;
struct line;
struct rpc_call;

enum event_kind {
    /* for the preparing thread */
    EVENT_PREPARE,          /* session: a request as it came */
    EVENT_TOKENIZE,         /* call, message */
    EVENT_DETOKENIZE,       /* call, message */
    /* for the coordinator's thread */
    EVENT_PREPARED,         /* session: checked and tokenized, or refused */
    EVENT_DRAINED,          /* session: its client has read everything */
    EVENT_CLOSED,           /* session: its call is over; the last event of a call */
    EVENT_CANCEL,           /* call, message */
    EVENT_GET_STATUS,       /* call */
    EVENT_GET_PLAN,         /* call */
    EVENT_SET_POLICY,       /* call, message */
    EVENT_LINE_MESSAGE,     /* line, message */
    EVENT_LINE_CLOSED,      /* line; its last event */
    EVENT_SHUT_DOWN,        /* end all work in words */
    /* for both */
    EVENT_EXIT,             /* nothing else will come */
};

struct event {
    struct event *next;
    enum event_kind kind;
    struct session *session;
    struct line *line;
    struct rpc_call *call;           /* a reference, the taker's */
    ProtobufCMessage *message;       /* kept, the taker's */
};

struct mailbox {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    struct event *first, **end;
    size_t n, n_max;
};

/* `n_max`: bound for mailbox_offer. */
void mailbox_init(struct mailbox *mailbox, size_t n_max);
void mailbox_fini(struct mailbox *mailbox);

/* Copies the event to the end. For events whose number is bounded elsewhere (by open calls, or by
 * what one stream delivers before its next read). */
void mailbox_post(struct mailbox *mailbox, const struct event *event);

/* The same, unless n_max events wait: then false and nothing happened. */
bool mailbox_offer(struct mailbox *mailbox, const struct event *event);

/* Everything that waits, oldest first, as a list whose events the caller frees; NULL when nothing
 * came within wait_ns. */
struct event *mailbox_take(struct mailbox *mailbox, int64_t wait_ns);
