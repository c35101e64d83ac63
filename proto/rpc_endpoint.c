/* The half of a call that is the same on both sides: send queue, receive loop, lifetime. */
#include <stdlib.h>

#include "proto/rpc_internal.h"

static void start_batch(struct rpc_endpoint *e, const grpc_op *ops, size_t n, struct rpc_op *tag) {
    grpc_call *core = e->core;   /* `e` may be gone once the event can come */
    RPC_HAND_OVER(tag);
    grpc_call_error error = grpc_call_start_batch(core, ops, n, tag, NULL);
    CHECK(error == GRPC_CALL_OK);
}

/* An operation is over; the last one lets go of the core call. */
static void op_end(struct rpc_endpoint *e) {
    pthread_mutex_lock(&e->lock);
    bool last = --e->n_ops == 0;
    pthread_mutex_unlock(&e->lock);
    if (!last) return;
    grpc_call_unref(e->core);
    e->hooks->released(e);
}

static void packed_free(struct rpc_packed *packed) {
    if (packed == NULL) return;
    grpc_byte_buffer_destroy(packed->buffer);
    free(packed);
}

/* Takes the whole queue out, for the caller to free without the lock. */
static struct rpc_packed *queue_take(struct rpc_endpoint *e) {
    struct rpc_packed *all = e->queue;
    for (struct rpc_packed *at = all; at != NULL; at = at->next) {
        e->n_queued--;
        e->queued_bytes -= at->bytes;
    }
    e->queue = NULL;
    e->queue_end = &e->queue;
    return all;
}

static void queue_free(struct rpc_packed *packed) {
    for (struct rpc_packed *next; packed != NULL; packed = next) {
        next = packed->next;
        packed_free(packed);
    }
}

/* ---- writing --------------------------------------------------------------------------------- */

/* Under the lock: claims the next write for the caller. False: nothing to write, or one under
 * way. */
static bool write_claim(struct rpc_endpoint *e) {
    if (e->write_busy || e->closed || e->end_started) return false;
    if (e->queue == NULL && !e->end_wanted) return false;
    e->writing = e->queue;
    if (e->queue != NULL) {
        e->queue = e->queue->next;
        if (e->queue == NULL) e->queue_end = &e->queue;
    }
    e->write_ends = e->end_wanted && e->queue == NULL;
    e->end_started = e->write_ends;
    e->write_busy = true;
    e->n_ops++;
    return true;
}

static void write_start(struct rpc_endpoint *e) {
    grpc_op ops[3] = {0};
    size_t n = 0;
    if (!e->metadata_sent) ops[n++].op = GRPC_OP_SEND_INITIAL_METADATA;
    e->metadata_sent = true;
    if (e->writing != NULL) {
        ops[n].data.send_message.send_message = e->writing->buffer;
        ops[n++].op = GRPC_OP_SEND_MESSAGE;
    }
    if (e->write_ends && e->is_client) ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    if (e->write_ends && !e->is_client) {
        ops[n].data.send_status_from_server.status = (grpc_status_code)e->end_status;
        ops[n].data.send_status_from_server.status_details = &e->end_text;
        ops[n].data.send_status_from_server.trailing_metadata = e->trailers;
        ops[n].data.send_status_from_server.trailing_metadata_count = e->n_trailers;
        ops[n++].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
    }
    start_batch(e, ops, n, &e->write_op);
}

static void write_done(struct rpc_op *op, bool ok) {
    struct rpc_endpoint *e = op->owner;
    struct rpc_packed *written = e->writing, *dropped = NULL;
    e->writing = NULL;
    pthread_mutex_lock(&e->lock);
    e->write_busy = false;
    if (written != NULL) {
        e->n_queued--;
        e->queued_bytes -= written->bytes;
    }
    if (!ok) {   /* the call is broken; its end is on the way */
        dropped = queue_take(e);
        e->end_started = true;
    }
    bool more = write_claim(e);
    bool drained = !more && !e->closed && !e->end_started;
    pthread_mutex_unlock(&e->lock);
    packed_free(written);
    queue_free(dropped);
    if (more) write_start(e);
    if (drained) e->hooks->drained(e);
    op_end(e);
}

enum status rpc_endpoint_send(struct rpc_endpoint *e, const ProtobufCMessage *message,
                              bool then_end) {
    size_t bytes = protobuf_c_message_get_packed_size(message);
    if (bytes > e->limits->message_bytes_max) return STATUS_RESOURCE_EXHAUSTED;
    struct rpc_packed *packed = xmalloc(sizeof *packed);
    *packed = (struct rpc_packed){.buffer = rpc_buffer_pack(message, bytes), .bytes = bytes};
    enum status status = STATUS_OK;
    pthread_mutex_lock(&e->lock);
    if (e->closed || e->end_wanted || e->end_started) {
        status = STATUS_CANCELLED;
    } else if (e->n_queued >= e->limits->backlog_messages_max ||
               (e->n_queued > 0 && e->queued_bytes + bytes > e->limits->backlog_bytes_max)) {
        status = STATUS_RESOURCE_EXHAUSTED;
    } else {
        *e->queue_end = packed;
        e->queue_end = &packed->next;
        e->n_queued++;
        e->queued_bytes += bytes;
        e->end_wanted = then_end;
    }
    bool write = status == STATUS_OK && write_claim(e);
    pthread_mutex_unlock(&e->lock);
    if (status != STATUS_OK) packed_free(packed);
    if (write) write_start(e);
    return status;
}

size_t rpc_endpoint_backlog(struct rpc_endpoint *e) {
    pthread_mutex_lock(&e->lock);
    size_t n = e->n_queued;
    pthread_mutex_unlock(&e->lock);
    return n;
}

void rpc_endpoint_end(struct rpc_endpoint *e, enum status status, const char *text) {
    pthread_mutex_lock(&e->lock);
    bool write = false;
    if (!e->end_wanted && !e->end_started && !e->closed) {
        e->end_wanted = true;
        e->end_status = status;
        if (text != NULL) e->end_text = grpc_slice_from_copied_string(text);
        write = write_claim(e);
    }
    pthread_mutex_unlock(&e->lock);
    if (write) write_start(e);
}

void rpc_endpoint_cancel(struct rpc_endpoint *e, enum status status, const char *text) {
    pthread_mutex_lock(&e->lock);
    bool open = !e->closed;
    struct rpc_packed *dropped = open ? queue_take(e) : NULL;
    if (open) {
        e->end_started = true;   /* nothing further is sent */
        e->n_ops++;
    }
    pthread_mutex_unlock(&e->lock);
    queue_free(dropped);
    if (!open) return;
    grpc_call_cancel_with_status(e->core, (grpc_status_code)status, text, NULL);
    op_end(e);
}

/* ---- reading and closing --------------------------------------------------------------------- */

/* A client's call is closed when its status has come and the messages before it are delivered. */
static void close_if_over(struct rpc_endpoint *e) {
    if (!e->close_seen || (e->is_client && e->reading)) return;
    pthread_mutex_lock(&e->lock);
    bool first = !e->closed;
    e->closed = true;
    struct rpc_packed *dropped = queue_take(e);
    pthread_mutex_unlock(&e->lock);
    queue_free(dropped);
    if (first) e->hooks->closed(e);
}

static void read_start(struct rpc_endpoint *e) {
    grpc_op read = {.op = GRPC_OP_RECV_MESSAGE};
    read.data.recv_message.recv_message = &e->incoming;
    start_batch(e, &read, 1, &e->read_op);
}

/* Delivers e->incoming; returns whether to read on. */
static bool deliver(struct rpc_endpoint *e) {
    ProtobufCMessage *message;
    struct error err;
    enum status status = rpc_buffer_unpack(&message, e->incoming_type, e->incoming,
                                           e->limits->unpacked_bytes_max, &err);
    if (status != STATUS_OK) {
        e->hooks->malformed(e, &err);
        return false;
    }
    bool more = e->hooks->message(e, message);
    rpc_message_free(message);   /* whoever kept it still has it */
    return more;
}

static void read_done(struct rpc_op *op, bool ok) {
    struct rpc_endpoint *e = op->owner;
    bool over = !e->is_client && e->close_seen;   /* a server's on_closed was the last callback */
    bool more = false;
    if (e->incoming != NULL) {
        if (ok && !over) more = deliver(e);
        grpc_byte_buffer_destroy(e->incoming);
        e->incoming = NULL;
    } else if (!over) {
        e->hooks->read_end(e);
    }
    if (more) {
        read_start(e);
        return;
    }
    e->reading = false;
    close_if_over(e);
    op_end(e);
}

void rpc_endpoint_read(struct rpc_endpoint *e) {
    pthread_mutex_lock(&e->lock);
    e->n_ops++;
    pthread_mutex_unlock(&e->lock);
    e->reading = true;
    read_start(e);
}

static void close_done(struct rpc_op *op, bool ok) {
    (void)ok;
    struct rpc_endpoint *e = op->owner;
    e->close_seen = true;
    close_if_over(e);
    op_end(e);
}

void rpc_endpoint_open(struct rpc_endpoint *e, const grpc_op *ops, size_t n_ops_in_batch,
                       bool read) {
    e->n_ops = 1 + read;   /* both before the first event can come on another thread */
    e->reading = read;
    start_batch(e, ops, n_ops_in_batch, &e->close_op);
    if (read) read_start(e);
}

void rpc_endpoint_init(struct rpc_endpoint *e) {
    e->close_op = (struct rpc_op){.done = close_done, .owner = e};
    e->read_op = (struct rpc_op){.done = read_done, .owner = e};
    e->write_op = (struct rpc_op){.done = write_done, .owner = e};
    e->queue_end = &e->queue;
    e->metadata_sent = e->is_client;   /* its opening batch sends it */
    e->end_text = grpc_empty_slice();
    pthread_mutex_init(&e->lock, NULL);
}

void rpc_endpoint_fini(struct rpc_endpoint *e) {
    grpc_slice_unref(e->end_text);
    for (size_t i = 0; i < e->n_trailers; i++) {
        grpc_slice_unref(e->trailers[i].key);
        grpc_slice_unref(e->trailers[i].value);
    }
    pthread_mutex_destroy(&e->lock);
}
