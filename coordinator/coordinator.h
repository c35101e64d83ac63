/* The coordinator: the control plane between clients and replicas.
 *
 * Threads. RPC queue threads decode and post. One *preparing* thread checks, renders and tokenizes
 * (prepare.c). One *coordinator's* thread owns requests, fleet, queue and router, and starts all
 * writes (coordinator.c, generate.c, attach.c, status.c). HTTP has a thread of its own that reads
 * atomics. */
#pragma once
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/error.h"
#include "coordinator/admission.h"
#include "coordinator/facts.h"
#include "coordinator/fleet.h"
#include "coordinator/mailbox.h"
#include "coordinator/session.h"
#include "coordinator/topology.h"
#include "model/chat.h"
#include "model/config.h"
#include "model/tokenizer.h"
#include "proto/health.h"
#include "proto/reflection.h"
#include "proto/rpc.h"
#include "tandem/v1/operations.pb-c.h"

struct coordinator_options {
    const char *model_dir;
    const char *weights;           /* "bf16", "int8" or "fp8" */
    const char *draft;             /* a folder, "ngram", NULL: none */
    int mode;                      /* enum spec_mode; -1: auto */
    uint32_t target_ranks, draft_ranks, n_ranks; /* 0: chosen (topology.h) */
    uint32_t layer_width, window;  /* 0: chosen, measured */
    uint32_t max_window;
    const char *sampling_rule;     /* "coupled" or "rejection" */
    struct planner_machine machine; /* what is declared */
    const char *host;
    int port, http_port;           /* 0: any free one */
    const char *ready_file, *ports_file; /* NULL: none */
    uint32_t max_queue_requests;
    uint64_t max_queue_tokens;
    uint32_t max_sequences, max_step_tokens;
    uint32_t max_context;          /* 0: the model's */
    uint64_t kv_budget_bytes;      /* 0: what is free */
    bool prefix_cache_off;
};

struct coordinator_options coordinator_options_default(void);

/* Everything about the model that the control plane knows. Immutable after starting. */
struct coordinator_model {
    char dir[4096];                /* absolute */
    struct model_config config;
    struct tokenizer *tokenizer;
    struct chat *chat;
    uint64_t parameters, checkpoint_fingerprint;
    uint32_t context;              /* the model's, or the option's where smaller */
    size_t prompt_bytes_max;       /* no longer text can fit the context */
};

struct coordinator {
    struct coordinator_options options;
    struct coordinator_model model;
    struct topology topology;      /* of every replica */
    struct facts facts;
    struct mailbox inbox, to_prepare;
    pthread_t thread, prepare_thread;
    struct health *health;
    struct reflection *reflection;
    struct rpc_service services[5];
    struct rpc_server *server;
    struct http *http;
    atomic_bool serving;           /* some replica is */
    atomic_uint context;           /* tokens a request may have on any serving replica */
    atomic_uint n_lines;           /* open streams to replicas */

    /* the coordinator's thread only */
    struct fleet fleet;
    struct policy_wish policy_wish; /* of replicas that come */
    struct session_table sessions;
    struct admission admission;
    int64_t started_ns, ticked_ns, rated_ns;
    double finished_per_second;    /* smoothed over some seconds */
    uint64_t finished, finished_rated;
    bool shutting_down, ready_written;
};

/* Opens the model, binds both ports, starts the threads. Any failure: nothing is left running. */
enum status coordinator_start(struct coordinator **out, const struct coordinator_options *options,
                              struct error *err);

/* Opens the models and prints what the planner thinks of them; starts nothing. */
enum status coordinator_explain(const struct coordinator_options *options, FILE *out,
                                struct error *err);
int coordinator_port(const struct coordinator *c);
int coordinator_http_port(const struct coordinator *c);

/* Ends live requests with UNAVAILABLE "shutting down", tells replicas to stop, frees everything. */
void coordinator_stop(struct coordinator *c);

/* Writes ports, pid and the ranks of a replica as one JSON object, atomically (under a temporary name,
 * then renamed). */
enum status coordinator_write_ports(const struct coordinator *c, const char *path,
                                    struct error *err);

/* ---- between the files of this folder -------------------------------------------------------- */

/* api.c: the method tables. */
struct rpc_service api_generation(struct coordinator *c);
struct rpc_service api_operations(struct coordinator *c);
struct rpc_service api_replica(struct coordinator *c);

/* prepare.c */
void *prepare_main(void *coordinator);

/* generate.c: on the coordinator's thread. */
void generate_prepared(struct coordinator *c, struct session *session);
void generate_drained(struct session *session);
void generate_closed(struct coordinator *c, struct session *session);
bool generate_cancel(struct coordinator *c, const char *id);
/* One step's tokens and ends, to their requests. False: the step contradicts itself; *err says how. */
bool generate_step(struct coordinator *c, struct replica *replica, const Tandem__V1__Step *step,
                   struct error *err);
/* Ends with an error what is queued and past its deadline. */
void generate_expire(struct coordinator *c, int64_t now_ns);
/* Ends every request on this replica (NULL: every request of all, queued ones too). */
void generate_fail_all(struct coordinator *c, const struct replica *replica,
                       const struct error *err);
/* Ends every request that is still queued. */
void generate_fail_queued(struct coordinator *c, const struct error *err);
/* Gives queued requests to replicas with room. */
void generate_route(struct coordinator *c);

/* attach.c: on the coordinator's thread. */
struct line *line_create(struct coordinator *c, struct rpc_call *call);   /* any thread */
void line_message(struct coordinator *c, struct line *line, const Tandem__V1__ReplicaUp *message);
void line_closed(struct coordinator *c, struct line *line);
void line_submit(struct replica *replica, struct session *session);
void line_cancel(struct replica *replica, uint64_t key);
/* Tells the replica its policy. */
void line_policy(struct replica *replica);
/* Sends what line_submit and line_cancel gathered. */
void attach_flush(struct coordinator *c);
void attach_stop_all(struct coordinator *c);

/* status.c: on the coordinator's thread. */
void status_reply(struct coordinator *c, struct rpc_call *call);
void status_reply_plan(struct coordinator *c, struct rpc_call *call);
void status_set_policy(struct coordinator *c, struct rpc_call *call,
                       const Tandem__V1__SetPolicyRequest *request);
