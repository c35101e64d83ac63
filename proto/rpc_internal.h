/* What rpc_*.c share: the event loop over a completion queue, and the endpoint, the half of a call
 * that is the same on the server and on the client (send queue, receive loop, lifetime). Only
 * rpc_*.c include this; it is the one door to grpc/. */
#pragma once
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <stdatomic.h>

#include "proto/rpc.h"

/* libgrpc is not instrumented: ThreadSanitizer is told that what was written before an operation
 * started is seen by whoever takes its event from the queue. */
#ifdef __SANITIZE_THREAD__
void __tsan_acquire(void *address);
void __tsan_release(void *address);
#define RPC_HAND_OVER(tag) __tsan_release(tag)
#define RPC_TAKE_OVER(tag) __tsan_acquire(tag)
#else
#define RPC_HAND_OVER(tag) ((void)(tag))
#define RPC_TAKE_OVER(tag) ((void)(tag))
#endif

/* ---- loop ------------------------------------------------------------------------------------ */

/* Something started on a queue; its address is the tag. */
struct rpc_op {
    void (*done)(struct rpc_op *op, bool ok);   /* its event */
    void *owner;
};

/* A completion queue and the thread that empties it. A queue hands out ready events without looking
 * at the sockets, so while writes are started as fast as their events are handled, cancels and new
 * calls would wait for ever. Every RPC_LOOP_EVENTS events the loop therefore looks at the sockets
 * by asking a second queue, which is always empty: that polls once and returns. */
#define RPC_LOOP_EVENTS 16

struct rpc_loop {
    grpc_completion_queue *queue, *empty_queue;
    pthread_t thread;             /* who runs it, where that is a thread of ours */
    int events_left;              /* until the next look */
};

void rpc_loop_init(struct rpc_loop *loop);

enum rpc_loop_event { RPC_LOOP_WORKED, RPC_LOOP_TIMEOUT, RPC_LOOP_SHUT_DOWN };

/* Handles one event; waits for it until `deadline`. */
enum rpc_loop_event rpc_loop_step(struct rpc_loop *loop, gpr_timespec deadline);

/* After the queue was shut down and emptied. */
void rpc_loop_destroy(struct rpc_loop *loop);

/* ---- endpoint -------------------------------------------------------------------------------- */

struct rpc_limits {
    size_t message_bytes_max, unpacked_bytes_max, backlog_messages_max, backlog_bytes_max;
};

struct rpc_packed {
    struct rpc_packed *next;
    grpc_byte_buffer *buffer;
    size_t bytes;
};

struct rpc_endpoint;

/* Called on the loop's thread. */
struct rpc_endpoint_hooks {
    /* Returns whether to read on. The message is freed afterwards unless kept. */
    bool (*message)(struct rpc_endpoint *endpoint, ProtobufCMessage *message);
    void (*malformed)(struct rpc_endpoint *endpoint, const struct error *err);
    void (*read_end)(struct rpc_endpoint *endpoint);
    void (*drained)(struct rpc_endpoint *endpoint);
    /* The peer's last word (RECV_CLOSE_ON_SERVER, RECV_STATUS_ON_CLIENT) has come. */
    void (*closed)(struct rpc_endpoint *endpoint);
    /* On whatever thread ended the last operation: the core call is gone. */
    void (*released)(struct rpc_endpoint *endpoint);
};

/* Lifetime: `n_ops` counts operations in flight. Opening starts the one that waits for the peer's
 * last word, so n_ops reaches 0 once, after `closed`; the core call is released then. Core
 * functions are called without the lock, while n_ops keeps the core call alive. */
struct rpc_endpoint {
    const struct rpc_endpoint_hooks *hooks;
    const struct rpc_limits *limits;
    const ProtobufCMessageDescriptor *incoming_type;
    struct rpc_loop *loop;
    grpc_call *core;
    bool is_client;
    struct rpc_op close_op, read_op, write_op;

    /* the reader's, loop thread only */
    grpc_byte_buffer *incoming;
    bool reading, close_seen;

    /* the writer's: whoever set write_busy, until the event */
    struct rpc_packed *writing;
    bool metadata_sent, write_ends;

    pthread_mutex_t lock;   /* guards all below */
    int n_ops;
    bool closed, write_busy, end_wanted, end_started;
    struct rpc_packed *queue, **queue_end;
    size_t n_queued, queued_bytes;     /* the message being written included */
    enum status end_status;            /* server */
    grpc_slice end_text;
    grpc_metadata trailers[RPC_TRAILERS_MAX];
    size_t n_trailers;
};

/* The caller fills hooks, limits, incoming_type, loop, core, is_client before. */
void rpc_endpoint_init(struct rpc_endpoint *endpoint);

/* Starts the operation that waits for the peer's last word: ops [n_ops_in_batch], tag close_op;
 * and, if `read`, reading. */
void rpc_endpoint_open(struct rpc_endpoint *endpoint, const grpc_op *ops, size_t n_ops_in_batch,
                       bool read);

/* On the loop's thread, when not reading: reads the next message. */
void rpc_endpoint_read(struct rpc_endpoint *endpoint);

enum status rpc_endpoint_send(struct rpc_endpoint *endpoint, const ProtobufCMessage *message,
                              bool then_end);
size_t rpc_endpoint_backlog(struct rpc_endpoint *endpoint);

/* Asks for the end: SEND_STATUS with `status` and `text` on a server, half-close on a client. */
void rpc_endpoint_end(struct rpc_endpoint *endpoint, enum status status, const char *text);

/* Cancels the core call, if it is still open. */
void rpc_endpoint_cancel(struct rpc_endpoint *endpoint, enum status status, const char *text);

/* After `released`, when the last user is gone. */
void rpc_endpoint_fini(struct rpc_endpoint *endpoint);

/* ---- small things ---------------------------------------------------------------------------- */

/* Unpacks a received buffer. */
enum status rpc_buffer_unpack(ProtobufCMessage **message, const ProtobufCMessageDescriptor *type,
                              grpc_byte_buffer *buffer, size_t unpacked_max, struct error *err);

/* Packs into one slice, without a second copy. `n_bytes` = its packed size. */
grpc_byte_buffer *rpc_buffer_pack(const ProtobufCMessage *message, size_t n_bytes);

/* Copies metadata (whose elements die with the core call) into one block "key\0value\0…\0". */
char *rpc_metadata_copy(const grpc_metadata_array *metadata);

/* Looks up `key` in such a block (NULL: empty). */
bool rpc_metadata_find(const char *block, const char *key, char *value, size_t size);

/* clock_now_ns's clock to gRPC's and back; 0 is no deadline. */
gpr_timespec rpc_deadline_to_core(int64_t deadline_ns);
int64_t rpc_deadline_from_core(gpr_timespec deadline);

grpc_arg rpc_arg_int(const char *key, int value);
