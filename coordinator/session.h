/* One client request from arrival to its last event, and the tables of live ones.
 *
 *   PREPARING ──▶ QUEUED ──▶ RUNNING ──▶ DONE        (any state may go to DONE)
 *
 * Owner: created on an RPC thread, handed to the preparing thread, then to the coordinator's thread,
 * which frees it once it is DONE, its call has closed, and the replica has forgotten its key. */
#pragma once
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/error.h"
#include "coordinator/admission.h"
#include "coordinator/bytes.h"
#include "coordinator/fleet.h"
#include "coordinator/params.h"
#include "coordinator/spec_report.h"
#include "coordinator/stream.h"
#include "model/tokenizer.h"
#include "proto/rpc.h"
#include "tandem/v1/replica.pb-c.h"

enum session_state { SESSION_PREPARING, SESSION_QUEUED, SESSION_RUNNING, SESSION_DONE };

/* Output not yet given to the RPC layer: grows while the client reads slowly; at most what
 * max_tokens tokens need. The logprob columns are filled only when asked for. */
struct session_output {
    struct bytes text;
    struct token_list ids;
    struct bytes logprobs;      /* float, one per id */
    struct bytes n_top;         /* uint32_t, one per id */
    struct token_list top_ids;
    struct bytes top_logprobs;  /* float */
    struct bytes drafted;       /* protobuf_c_boolean, one per id */
    struct bytes text_ends;     /* uint32_t, one per id: bytes of text up to and with it */
};

struct session {
    struct admission_entry entry;    /* first member: see session_of_entry */
    struct session *next_by_key, *next_by_id;
    struct rpc_call *call;           /* a reference */
    Tandem__V1__GenerateRequest *request;
    char id[136];
    uint64_t key;
    enum session_state state;
    struct params params;
    struct token_list prompt;
    struct error refused;            /* OK, or why preparing failed */
    bool prepared, call_closed, listed;

    struct replica *replica;         /* where its key is known, NULL: nowhere */
    bool cancel_sent;
    struct stream *stream;
    struct session_output output;
    bool has_drafter;                /* its replica says which tokens were drafted */
    bool reported;                   /* the replica has ended it and said what drafting did */
    struct spec_report report;
    int32_t last_token;
    uint32_t n_tokens, n_cached;
    uint32_t step_finish;            /* reason this step gives, while the step is handled */
    bool ending;                     /* the finish goes out when the output has */
    const char *reason;              /* of the finish, when ending */
    atomic_bool wants_drain;

    int64_t arrived_ns, started_ns, first_token_ns, last_token_ns, done_ns;
};

struct session *session_create(struct rpc_call *call, Tandem__V1__GenerateRequest *request,
                               int64_t now_ns);
void session_free(struct session *session);

static inline struct session *session_of_entry(struct admission_entry *entry) {
    return (struct session *)entry;
}

enum { SESSION_BUCKETS = 4096 };

/* Live sessions, by the key on the replica's stream and by the client's request id. */
struct session_table {
    struct session *by_key[SESSION_BUCKETS];
    struct session *by_id[SESSION_BUCKETS];
    uint64_t last_key;
    size_t n;
};

/* Gives the session its key and lists it. ALREADY_EXISTS when a live one has its id. */
enum status session_table_add(struct session_table *table, struct session *session,
                              struct error *err);
/* The id becomes free for others; the key stays known. Idempotent. */
void session_table_forget_id(struct session_table *table, struct session *session);
void session_table_remove(struct session_table *table, struct session *session);
struct session *session_by_key(const struct session_table *table, uint64_t key);
struct session *session_by_id(const struct session_table *table, const char *id);
