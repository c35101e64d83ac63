#include "coordinator/coordinator.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/log.h"
#include "common/spec_mode.h"
#include "coordinator/http.h"
#include "model/checkpoint.h"

static const int64_t TICK_NS = 20 * 1000000LL;
static const int64_t RATE_NS = 1000 * 1000000LL;
static const int64_t GRACE_MS = 5000;

struct coordinator_options coordinator_options_default(void) {
    return (struct coordinator_options){
        .weights = "bf16",
        .mode = -1,
        .max_window = SPEC_MAX_WINDOW,
        .sampling_rule = "coupled",
        .machine = planner_machine_default(),
        .host = "127.0.0.1",
        .port = 50051,
        .http_port = 8080,
        .max_queue_requests = 1024,
        .max_queue_tokens = 1024 * 1024,
        .max_sequences = 256,
        .max_step_tokens = 512,
    };
}

/* ---- the model ------------------------------------------------------------------------------- */

/* How many bytes a prompt of `context` tokens has at most: the longest token, and 4 for what
 * normalisation may take away. A cheap bound before the expensive tokenizing. */
static size_t longest_prompt(const struct tokenizer *tokenizer, uint32_t context) {
    size_t longest = 1;
    for (int id = 0; id < tokenizer_size(tokenizer); id++) {
        const char *token = tokenizer_token(tokenizer, id);
        size_t n = token != NULL ? strlen(token) : 0;
        if (n > longest) longest = n;
    }
    return longest * 4 * context;
}

static enum status check_checkpoint(struct coordinator_model *model, const char *dir,
                                    struct error *err) {
    struct checkpoint *checkpoint;
    TRY(checkpoint_open(&checkpoint, dir, err));
    model->config = *checkpoint_config(checkpoint);
    model->parameters = checkpoint_parameters(checkpoint);
    model->checkpoint_fingerprint = checkpoint_fingerprint(checkpoint);
    checkpoint_close(checkpoint);
    return STATUS_OK;
}

static enum status open_model(struct coordinator_model *model,
                              const struct coordinator_options *options, struct error *err) {
    const char *dir = options->model_dir;
    if (realpath(dir, model->dir) == NULL) {
        return error_set(err, STATUS_NOT_FOUND, "--model %s: %s; expected a Hugging Face folder", dir,
                         strerror(errno));
    }
    TRY(check_checkpoint(model, model->dir, err));
    TRY(tokenizer_load(&model->tokenizer, model->dir, err));
    TRY(chat_load(&model->chat, model->dir, err));
    if (tokenizer_size(model->tokenizer) > model->config.vocab) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: the tokenizer has %d ids, config.json's vocab_size is %d; expected "
                         "the tokenizer to fit",
                         dir, tokenizer_size(model->tokenizer), model->config.vocab);
    }
    model->context = (uint32_t)model->config.max_position;
    if (options->max_context > model->context) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--max-context is %u; expected at most %u, the model's context",
                         options->max_context, model->context);
    }
    if (options->max_context != 0) model->context = options->max_context;
    model->prompt_bytes_max = longest_prompt(model->tokenizer, model->context);
    return STATUS_OK;
}

static void close_model(struct coordinator_model *model) {
    if (model->chat != NULL) chat_free(model->chat);
    if (model->tokenizer != NULL) tokenizer_free(model->tokenizer);
}

enum status coordinator_explain(const struct coordinator_options *options, FILE *out,
                                struct error *err) {
    struct coordinator_model *model = xcalloc(1, sizeof *model);
    struct topology *topology = xcalloc(1, sizeof *topology);
    enum status status = open_model(model, options, err);
    if (status == STATUS_OK) status = topology_make(topology, options, model, err);
    bool planned = topology->result.n_candidates > 0;
    if (status == STATUS_OK || planned) topology_print(topology, out);
    close_model(model);
    free(topology);
    free(model);
    return status;
}

/* ---- the coordinator's thread ---------------------------------------------------------------- */

static void shut_down(struct coordinator *c) {
    struct error err;
    c->shutting_down = true;
    error_set(&err, STATUS_UNAVAILABLE, "shutting down");
    generate_fail_all(c, NULL, &err);
    attach_flush(c);
    attach_stop_all(c);
}

static void cancel(struct coordinator *c, struct rpc_call *call, const Tandem__V1__CancelRequest *in) {
    Tandem__V1__CancelResponse response = TANDEM__V1__CANCEL_RESPONSE__INIT;
    response.found = generate_cancel(c, in->request_id);
    rpc_call_reply(call, &response.base);
}

/* False: nothing else will come. */
static bool handle(struct coordinator *c, const struct event *event) {
    switch (event->kind) {
    case EVENT_PREPARED: generate_prepared(c, event->session); break;
    case EVENT_DRAINED: generate_drained(event->session); break;
    case EVENT_CLOSED: generate_closed(c, event->session); break;
    case EVENT_CANCEL:
        cancel(c, event->call, (const Tandem__V1__CancelRequest *)event->message);
        break;
    case EVENT_GET_STATUS: status_reply(c, event->call); break;
    case EVENT_GET_PLAN: status_reply_plan(c, event->call); break;
    case EVENT_SET_POLICY:
        status_set_policy(c, event->call, (const Tandem__V1__SetPolicyRequest *)event->message);
        break;
    case EVENT_LINE_MESSAGE:
        line_message(c, event->line, (const Tandem__V1__ReplicaUp *)event->message);
        break;
    case EVENT_LINE_CLOSED: line_closed(c, event->line); break;
    case EVENT_SHUT_DOWN: shut_down(c); break;
    default: CHECK(event->kind == EVENT_EXIT); return false;
    }
    rpc_message_free(event->message);
    if (event->call != NULL) rpc_call_unref(event->call);
    return true;
}

static void measure_rate(struct coordinator *c, int64_t now_ns) {
    static const double weight = 0.3;   /* of the last second against those before */
    if (now_ns - c->rated_ns < RATE_NS) return;
    double seconds = (double)(now_ns - c->rated_ns) / 1e9;
    double rate = (double)(c->finished - c->finished_rated) / seconds;
    c->finished_per_second += weight * (rate - c->finished_per_second);
    c->finished_rated = c->finished;
    c->rated_ns = now_ns;
}

static void tick(struct coordinator *c) {
    int64_t now_ns = clock_now_ns();
    if (now_ns - c->ticked_ns < TICK_NS) return;
    c->ticked_ns = now_ns;
    generate_expire(c, now_ns);
    measure_rate(c, now_ns);
    facts_gauges(&c->facts, &c->fleet, c->admission.n_requests);
    facts_log(&c->facts, &c->fleet, c->admission.n_requests, now_ns);
}

static void *coordinator_main(void *coordinator) {
    struct coordinator *c = coordinator;
    bool more = true;
    while (more) {
        /* Idle, it wakes for the log and the gauges only. */
        struct event *events = mailbox_take(&c->inbox, c->sessions.n > 0 ? TICK_NS : RATE_NS / 4);
        for (struct event *next; events != NULL; events = next) {
            next = events->next;
            more &= handle(c, events);
            free(events);
        }
        attach_flush(c);
        tick(c);
    }
    return NULL;
}

/* ---- starting and stopping ------------------------------------------------------------------- */

static enum status listen_grpc(struct coordinator *c, struct error *err) {
    static const char *const names[] = {"tandem.v1.Generation", "tandem.v1.Operations",
                                        "tandem.v1.Replica", "grpc.health.v1.Health"};
    TRY(reflection_create(&c->reflection, names, sizeof names / sizeof *names, err));
    c->health = health_create();
    health_set(c->health, "", false);
    health_set(c->health, "tandem.v1.Generation", false);
    health_set(c->health, "tandem.v1.Operations", true);
    struct rpc_service services[] = {api_generation(c), api_operations(c), api_replica(c),
                                     health_service(c->health), reflection_service(c->reflection)};
    memcpy(c->services, services, sizeof services);
    char address[300];
    struct rpc_server_options options = rpc_server_options_default();
    bool is_v6 = strchr(c->options.host, ':') != NULL;
    snprintf(address, sizeof address, is_v6 ? "[%s]:%d" : "%s:%d", c->options.host, c->options.port);
    options.address = address;
    return rpc_server_create(&c->server, &options, c->services,
                             sizeof services / sizeof *services, err);
}

static void free_all(struct coordinator *c) {
    http_stop(c->http);
    rpc_server_destroy(c->server);
    health_destroy(c->health);
    reflection_destroy(c->reflection);
    fleet_free(&c->fleet);
    close_model(&c->model);
    if (c->facts.metrics != NULL) facts_fini(&c->facts);
    mailbox_fini(&c->inbox);
    mailbox_fini(&c->to_prepare);
    free(c);
}

static void start_threads(struct coordinator *c) {
    CHECK(pthread_create(&c->thread, NULL, coordinator_main, c) == 0);
    CHECK(pthread_create(&c->prepare_thread, NULL, prepare_main, c) == 0);
}

static void join_threads(struct coordinator *c) {
    mailbox_post(&c->to_prepare, &(struct event){.kind = EVENT_EXIT});
    pthread_join(c->prepare_thread, NULL);
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_EXIT});
    pthread_join(c->thread, NULL);
    CHECK(c->sessions.n == 0);
}

enum status coordinator_start(struct coordinator **out, const struct coordinator_options *options,
                              struct error *err) {
    enum status status;
    bool running = false;
    struct coordinator *c = xcalloc(1, sizeof *c);
    c->options = *options;
    mailbox_init(&c->inbox, SIZE_MAX);
    mailbox_init(&c->to_prepare, (size_t)options->max_queue_requests + 64);
    TRY_OR_FAIL(open_model(&c->model, options, err));
    TRY_OR_FAIL(topology_make(&c->topology, options, &c->model, err));
    c->policy_wish = c->topology.policy.wish;
    facts_init(&c->facts, c->model.config.name, options->weights);
    admission_init(&c->admission, &(struct admission_limits){options->max_queue_requests,
                                                             options->max_queue_tokens});
    atomic_store(&c->context, c->model.context);
    c->started_ns = c->rated_ns = clock_now_ns();
    TRY_OR_FAIL(http_start(&c->http, options->host, options->http_port, c->facts.metrics,
                           &c->serving, err));
    TRY_OR_FAIL(listen_grpc(c, err));
    /* What arrived meanwhile waits in the mailboxes; from here on both threads read `c`. */
    start_threads(c);
    running = true;
    if (options->ports_file != NULL) {
        TRY_OR_FAIL(coordinator_write_ports(c, options->ports_file, err));
    }
    *out = c;
    return STATUS_OK;

fail:
    if (c->server != NULL) rpc_server_stop(c->server, 0);
    if (running) join_threads(c);
    free_all(c);
    return status;
}

/* Gives the replicas time to read that they shall stop. */
static void wait_for_lines(const struct coordinator *c) {
    for (int i = 0; i < 400 && atomic_load(&c->n_lines) > 0; i++) clock_sleep_ns(5 * 1000000);
}

void coordinator_stop(struct coordinator *c) {
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_SHUT_DOWN});
    wait_for_lines(c);
    rpc_server_stop(c->server, GRACE_MS);
    join_threads(c);
    free_all(c);
}

int coordinator_port(const struct coordinator *c) {
    return rpc_server_port(c->server);
}

int coordinator_http_port(const struct coordinator *c) {
    return http_port(c->http);
}

enum status coordinator_write_ports(const struct coordinator *c, const char *path,
                                    struct error *err) {
    char temporary[4200];
    snprintf(temporary, sizeof temporary, "%s.%d.tmp", path, (int)getpid());
    FILE *file = fopen(temporary, "w");
    if (file == NULL) {
        return error_set(err, STATUS_UNAVAILABLE, "cannot write %s: %s", temporary, strerror(errno));
    }
    fprintf(file, "{\"grpc_port\":%d,\"http_port\":%d,\"pid\":%d,\"ranks\":%u}\n",
            coordinator_port(c), coordinator_http_port(c), (int)getpid(), c->topology.wish.n_ranks);
    if (fclose(file) == 0 && rename(temporary, path) == 0) return STATUS_OK;
    error_set(err, STATUS_UNAVAILABLE, "cannot write %s: %s", path, strerror(errno));
    unlink(temporary);
    return STATUS_UNAVAILABLE;
}
