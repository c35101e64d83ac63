/* gRPC for this house: servers, calls, channels and streams of protobuf-c messages, over the gRPC
 * core C API. rpc_*.c are the only files that include grpc/; docs/grpc-core.md lists the sixteen
 * pitfalls of that API and where each is handled.
 *
 * Threads. A server has `n_threads` queue threads (one by default), a channel has one, started with
 * its first stream in callback mode. They move events and call the callbacks below. A callback must
 * be short and must not block: decode, hand over, return. All callbacks of one call or stream come
 * one after the other on one thread. Every rpc_call_* and rpc_stream_* function may be used from
 * any thread, callbacks included, unless its comment says otherwise.
 *
 * Messages given to callbacks and returned by receive functions live in one block of memory each;
 * see rpc_message_keep and rpc_message_free.
 *
 * Never fork after the first server or channel exists (gRPC's threads do not survive it); fork and
 * exec is fine. */
#pragma once
#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"

/* ---- messages -------------------------------------------------------------------------------- */

/* Parses `n_bytes` wire bytes into `*message`, which the caller frees with rpc_message_free. At
 * most `unpacked_max` bytes are allocated for it. INVALID_ARGUMENT when the bytes are not such a
 * message, or when it would unpack to more than that. */
enum status rpc_message_unpack(ProtobufCMessage **message, const ProtobufCMessageDescriptor *type,
                               const void *bytes, size_t n_bytes, size_t unpacked_max,
                               struct error *err);

/* Inside on_message only: the message outlives the callback and the caller frees it, once for each
 * keep, on any thread, even before the callback returns. Returns it. */
ProtobufCMessage *rpc_message_keep(const ProtobufCMessage *message);

/* Frees a kept, received or unpacked message and everything in it (NULL is fine). Not for messages
 * the caller built. */
void rpc_message_free(ProtobufCMessage *message);

/* ---- server ---------------------------------------------------------------------------------- */

struct rpc_server;
struct rpc_call;

enum rpc_kind {
    RPC_ONE_REQUEST,      /* the client sends one message; the answer is one or a stream */
    RPC_REQUEST_STREAM,   /* the client sends a stream of messages (bidirectional) */
};

/* One row of a service's table. Callbacks may be NULL where their comment says so. */
struct rpc_method {
    const char *path;     /* "/tandem.v1.Generation/Generate" */
    enum rpc_kind kind;
    const ProtobufCMessageDescriptor *request;
    /* RPC_REQUEST_STREAM only, may be NULL: the call has begun, no message yet. */
    void (*on_open)(struct rpc_call *call, void *user);
    /* A message arrived; valid until this returns, unless kept. RPC_ONE_REQUEST: exactly once. */
    void (*on_message)(struct rpc_call *call, const ProtobufCMessage *message, void *user);
    /* RPC_REQUEST_STREAM only, may be NULL: the client sends no more. NULL: finished with OK. */
    void (*on_half_close)(struct rpc_call *call, void *user);
    /* May be NULL: everything sent so far has left (see rpc_call_backlog). */
    void (*on_drained)(struct rpc_call *call, void *user);
    /* May be NULL: the last callback of a call that has seen one. `cancelled`: the client went
     * away, cancelled or ran past its deadline, or the call was aborted; nothing needs finishing
     * then. After this the call is only memory, gone with its last reference. */
    void (*on_closed)(struct rpc_call *call, bool cancelled, void *user);
    /* The longest a call may live, 0: as long as it likes. Past it: DEADLINE_EXCEEDED. Checked four
     * times a second; rpc_call_deadline_ns counts it in. */
    int64_t lifetime_max_ms;
    /* The grace of rpc_server_stop does not wait for such calls (watchers, standing streams). */
    bool background;
};

/* Borrowed by the server until rpc_server_destroy. `user` is given to every callback. */
struct rpc_service {
    const struct rpc_method *methods;
    size_t n_methods;
    void *user;
};

struct rpc_server_options {
    const char *address;             /* "127.0.0.1:50051", "[::]:50051"; port 0: any free one */
    int n_threads;                   /* queue threads */
    size_t message_bytes_max;        /* both directions */
    size_t unpacked_bytes_max;       /* memory one received message may take */
    size_t backlog_messages_max;     /* per call: queued and not yet written */
    size_t backlog_bytes_max;
    int keepalive_ms;                /* ping an idle connection this often … */
    int keepalive_timeout_ms;        /* … and drop it when no answer came in this time */
    int client_keepalive_min_ms;     /* clients may ping this often without being thrown out */
};

/* 127.0.0.1:0, 1 thread, 16 MiB messages, 64 MiB unpacked, backlog 1024 messages or 8 MiB,
 * keepalive 10 s + 5 s, clients may ping every 500 ms. */
struct rpc_server_options rpc_server_options_default(void);

/* Binds, starts and serves. INVALID_ARGUMENT: a method table that contradicts itself; UNAVAILABLE:
 * the address cannot be bound (taken, not ours, malformed). */
enum status rpc_server_create(struct rpc_server **server, const struct rpc_server_options *options,
                              const struct rpc_service *services, size_t n_services,
                              struct error *err);

/* The port that was bound. */
int rpc_server_port(const struct rpc_server *server);

/* Calls that are open now. */
size_t rpc_server_live_calls(const struct rpc_server *server);

/* Stops: no new calls, at most `grace_ms` for the live ones to finish by themselves, then they are
 * cancelled (on_closed with cancelled = true; clients see UNAVAILABLE or CANCELLED). Returns when
 * the last callback has returned. Not from a callback. Idempotent. */
void rpc_server_stop(struct rpc_server *server, int64_t grace_ms);

/* Stops without grace if that was not done, and frees. Calls still referenced by their users remain
 * as memory until unreferenced. NULL is fine. */
void rpc_server_destroy(struct rpc_server *server);

/* ---- a call on the server -------------------------------------------------------------------- */

/* In a callback `call` is borrowed: it is valid until on_closed has returned. Whoever keeps it
 * longer, or uses it from another thread, takes a reference. */
struct rpc_call *rpc_call_ref(struct rpc_call *call);
void rpc_call_unref(struct rpc_call *call);

/* Room for the owner of the call; the library only stores it. Set it in on_open or on_message. */
void rpc_call_set_data(struct rpc_call *call, void *data);
void *rpc_call_data(const struct rpc_call *call);

/* Packs the message now and queues it; it leaves as fast as the client reads. At most one write is
 * under way per call, so a slow client holds only its own stream back.
 * RESOURCE_EXHAUSTED: the backlog is full or the message above message_bytes_max, nothing was
 * queued; CANCELLED: the call is closed, or finished. */
enum status rpc_call_send(struct rpc_call *call, const ProtobufCMessage *message);

/* Messages accepted by rpc_call_send and not yet written (the one under way included). An owner
 * that finds this above 0 can gather further output and send it as one when on_drained comes. */
size_t rpc_call_backlog(const struct rpc_call *call);

/* A trailing metadata entry, e.g. "retry-after-ms". Before finishing; at most RPC_TRAILERS_MAX.
 * Keys are lower case; values printable ASCII. */
#define RPC_TRAILERS_MAX 4
void rpc_call_trailer(struct rpc_call *call, const char *key, const char *value);

/* Ends the call once the queued messages are written. `text` may be NULL. Only the first finish
 * counts; without effect on a closed call. */
void rpc_call_finish(struct rpc_call *call, enum status status, const char *text);

/* The same with the words of an error: rpc_call_fail(call, &err). */
void rpc_call_fail(struct rpc_call *call, const struct error *err);

/* Sends and finishes with OK in one write: the answer of a unary method. */
enum status rpc_call_reply(struct rpc_call *call, const ProtobufCMessage *message);

/* Ends the call at once: queued messages are dropped, the client gets `status` and `text`. */
void rpc_call_abort(struct rpc_call *call, enum status status, const char *text);

/* When the client (or lifetime_max_ms) wants the call ended, on clock_now_ns's clock; 0: never. */
int64_t rpc_call_deadline_ns(const struct rpc_call *call);

/* Whether the call is closed because of cancellation, deadline or a lost client. */
bool rpc_call_cancelled(const struct rpc_call *call);

/* "ipv4:127.0.0.1:41234". Valid as long as the call. */
const char *rpc_call_peer(const struct rpc_call *call);

/* Copies the client's metadata value for `key` (lower case), cut to size - 1 bytes; false:
 * absent. */
bool rpc_call_metadata(const struct rpc_call *call, const char *key, char *value, size_t size);

/* ---- channel: the client side ---------------------------------------------------------------- */

struct rpc_channel;
struct rpc_stream;

struct rpc_channel_options {
    size_t message_bytes_max;        /* both directions */
    size_t unpacked_bytes_max;
    size_t backlog_messages_max;     /* per stream */
    size_t backlog_bytes_max;
    int keepalive_ms;                /* as for the server; at least its client_keepalive_min_ms */
    int keepalive_timeout_ms;
    int reconnect_backoff_min_ms;    /* first pause before dialling again; doubles up to … */
    int reconnect_backoff_max_ms;
    bool wait_for_ready;             /* calls wait for a connection (until their deadline) instead
                                        of failing with UNAVAILABLE while there is none */
};

/* 16 MiB messages, 64 MiB unpacked, backlog 1024 messages or 64 MiB, keepalive 10 s + 5 s, backoff
 * 100 ms to 2 s, no waiting. */
struct rpc_channel_options rpc_channel_options_default(void);

/* Makes a channel to "host:port"; dials on first use and again after every loss. */
enum status rpc_channel_create(struct rpc_channel **channel, const char *target,
                               const struct rpc_channel_options *options, struct error *err);

/* Every stream must have been destroyed. Not from a callback. NULL is fine. */
void rpc_channel_destroy(struct rpc_channel *channel);

/* Trailing metadata wanted from a call: the caller sets `key`, the library fills `value` (empty:
 * the server sent none). */
struct rpc_trailer {
    const char *key;
    char value[128];
};

/* One request, one answer; blocks. `deadline_ns`: clock_now_ns's clock, 0: none. On STATUS_OK the
 * caller frees `*response`; otherwise it is NULL and `err` has the server's status and text.
 * `trailers` [n_trailers], may be NULL. */
enum status rpc_unary(struct rpc_channel *channel, const char *path,
                      const ProtobufCMessage *request,
                      const ProtobufCMessageDescriptor *response_type, ProtobufCMessage **response,
                      int64_t deadline_ns, struct rpc_trailer *trailers, size_t n_trailers,
                      struct error *err);

/* Callback mode: these run on the channel's queue thread. */
struct rpc_stream_callbacks {
    /* A message arrived; valid until this returns, unless kept. */
    void (*on_message)(struct rpc_stream *stream, const ProtobufCMessage *message, void *user);
    /* May be NULL: everything sent so far has left. */
    void (*on_drained)(struct rpc_stream *stream, void *user);
    /* Exactly once, last: how the call ended. `end` is borrowed. */
    void (*on_closed)(struct rpc_stream *stream, const struct error *end, void *user);
    void *user;
};

/* Begins a call with a stream in one or both directions. `callbacks` (copied) NULL: blocking mode,
 * where one thread reads with rpc_stream_recv, which also moves what was sent. Does not wait for
 * the server: a refused or failed call shows as its end. */
enum status rpc_stream_open(struct rpc_stream **stream, struct rpc_channel *channel,
                            const char *path, const ProtobufCMessageDescriptor *response_type,
                            int64_t deadline_ns, const struct rpc_stream_callbacks *callbacks,
                            struct error *err);

/* As rpc_call_send. */
enum status rpc_stream_send(struct rpc_stream *stream, const ProtobufCMessage *message);

/* As rpc_call_backlog. */
size_t rpc_stream_backlog(const struct rpc_stream *stream);

/* No more will be sent, once what is queued has left. Idempotent. */
void rpc_stream_half_close(struct rpc_stream *stream);

enum rpc_event {
    RPC_MESSAGE,      /* *message is the caller's to free */
    RPC_TIMEOUT,      /* nothing within the time */
    RPC_CLOSED,       /* the call has ended; rpc_stream_end says how */
};

/* Blocking mode, one thread at a time: waits at most `timeout_ns` (negative: without limit) for the
 * next message. */
enum rpc_event rpc_stream_recv(struct rpc_stream *stream, ProtobufCMessage **message,
                               int64_t timeout_ns);

/* How the call ended, status and text (which may be empty): after RPC_CLOSED or on_closed. Returns
 * end->status. */
enum status rpc_stream_end(const struct rpc_stream *stream, struct error *end);

/* Trailing metadata, after the end: fills trailer->value, false when the server sent none. */
bool rpc_stream_trailer(const struct rpc_stream *stream, struct rpc_trailer *trailer);

/* Ends the call from this side; the end is then CANCELLED, unless it had ended before. */
void rpc_stream_cancel(struct rpc_stream *stream);

/* Cancels if the call is still open, and frees. In callback mode no callback runs or begins after
 * this has returned (from the stream's own callback: after that callback). NULL is fine. */
void rpc_stream_destroy(struct rpc_stream *stream);
