/* The gRPC services' method tables. Everything here runs on RPC queue threads and only hands over:
 * to the preparing thread what needs the tokenizer, to the coordinator's thread the rest. */
#include <inttypes.h>

#include "common/clock.h"
#include "coordinator/coordinator.h"
#include "tandem/v1/operations.pb-c.h"

static void refuse_busy(struct rpc_call *call) {
    rpc_call_trailer(call, "retry-after-ms", "1000");
    rpc_call_finish(call, STATUS_RESOURCE_EXHAUSTED,
                    "too many requests wait to be tokenized; try again in 1000 ms");
}

/* ---- Generation ------------------------------------------------------------------------------ */

static void on_generate(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    struct coordinator *c = user;
    Tandem__V1__GenerateRequest *request =
        (Tandem__V1__GenerateRequest *)rpc_message_keep(message);
    struct session *session = session_create(call, request, clock_now_ns());
    struct event event = {.kind = EVENT_PREPARE, .session = session};
    if (!mailbox_offer(&c->to_prepare, &event)) {
        session_free(session);
        refuse_busy(call);
        return;
    }
    rpc_call_set_data(call, session);
}

static void on_generate_drained(struct rpc_call *call, void *user) {
    struct coordinator *c = user;
    struct session *session = rpc_call_data(call);
    if (session == NULL || !atomic_exchange(&session->wants_drain, false)) return;
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_DRAINED, .session = session});
}

static void on_generate_closed(struct rpc_call *call, bool cancelled, void *user) {
    (void)cancelled;
    struct coordinator *c = user;
    struct session *session = rpc_call_data(call);
    if (session == NULL) return;
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_CLOSED, .session = session});
}

static void on_cancel(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    struct coordinator *c = user;
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_CANCEL, .call = rpc_call_ref(call),
                                            .message = rpc_message_keep(message)});
}

static void hand_to_preparing(struct coordinator *c, enum event_kind kind, struct rpc_call *call,
                              const ProtobufCMessage *message) {
    struct event event = {.kind = kind, .call = rpc_call_ref(call),
                          .message = rpc_message_keep(message)};
    if (mailbox_offer(&c->to_prepare, &event)) return;
    rpc_message_free(event.message);
    refuse_busy(call);
    rpc_call_unref(call);
}

static void on_tokenize(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    hand_to_preparing(user, EVENT_TOKENIZE, call, message);
}

static void on_detokenize(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    hand_to_preparing(user, EVENT_DETOKENIZE, call, message);
}

static void on_get_model(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message;
    struct coordinator *c = user;
    const struct model_config *config = &c->model.config;
    int32_t eos[MODEL_MAX_EOS];
    for (int i = 0; i < config->n_eos; i++) eos[i] = config->eos[i];
    Tandem__V1__GetModelResponse response = TANDEM__V1__GET_MODEL_RESPONSE__INIT;
    response.name = (char *)config->name;
    response.family = (char *)model_family_name(config->family);
    response.vocab_size = (uint32_t)config->vocab;
    response.context_length = atomic_load(&c->context);
    response.parameters = c->model.parameters;
    response.weights = (char *)c->options.weights;
    response.chat_format = (char *)chat_format_name(chat_format(c->model.chat));
    response.n_eos_token_ids = (size_t)config->n_eos;
    response.eos_token_ids = eos;
    response.bos_token_id = config->bos;
    rpc_call_reply(call, &response.base);
}

struct rpc_service api_generation(struct coordinator *c) {
    static const struct rpc_method methods[] = {
        {.path = "/tandem.v1.Generation/Generate", .request = &tandem__v1__generate_request__descriptor,
         .on_message = on_generate, .on_drained = on_generate_drained,
         .on_closed = on_generate_closed},
        {.path = "/tandem.v1.Generation/Cancel", .request = &tandem__v1__cancel_request__descriptor,
         .on_message = on_cancel},
        {.path = "/tandem.v1.Generation/Tokenize",
         .request = &tandem__v1__tokenize_request__descriptor, .on_message = on_tokenize},
        {.path = "/tandem.v1.Generation/Detokenize",
         .request = &tandem__v1__detokenize_request__descriptor, .on_message = on_detokenize},
        {.path = "/tandem.v1.Generation/GetModel",
         .request = &tandem__v1__get_model_request__descriptor, .on_message = on_get_model},
    };
    return (struct rpc_service){methods, sizeof methods / sizeof *methods, c};
}

/* ---- Operations ------------------------------------------------------------------------------ */

static void on_get_status(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message;
    struct coordinator *c = user;
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_GET_STATUS, .call = rpc_call_ref(call)});
}

static void on_get_plan(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message;
    struct coordinator *c = user;
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_GET_PLAN, .call = rpc_call_ref(call)});
}

static void on_set_policy(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    struct coordinator *c = user;
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_SET_POLICY, .call = rpc_call_ref(call),
                                            .message = rpc_message_keep(message)});
}

struct rpc_service api_operations(struct coordinator *c) {
    static const struct rpc_method methods[] = {
        {.path = "/tandem.v1.Operations/GetStatus",
         .request = &tandem__v1__get_status_request__descriptor, .on_message = on_get_status},
        {.path = "/tandem.v1.Operations/GetPlan",
         .request = &tandem__v1__get_plan_request__descriptor, .on_message = on_get_plan},
        {.path = "/tandem.v1.Operations/SetPolicy",
         .request = &tandem__v1__set_policy_request__descriptor, .on_message = on_set_policy},
    };
    return (struct rpc_service){methods, sizeof methods / sizeof *methods, c};
}

/* ---- Replica --------------------------------------------------------------------------------- */

static void on_attach(struct rpc_call *call, void *user) {
    rpc_call_set_data(call, line_create(user, call));
}

static void on_attach_message(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    struct coordinator *c = user;
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_LINE_MESSAGE, .line = rpc_call_data(call),
                                            .message = rpc_message_keep(message)});
}

static void on_attach_closed(struct rpc_call *call, bool cancelled, void *user) {
    (void)cancelled;
    struct coordinator *c = user;
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_LINE_CLOSED, .line = rpc_call_data(call)});
}

struct rpc_service api_replica(struct coordinator *c) {
    static const struct rpc_method methods[] = {
        {.path = "/tandem.v1.Replica/Attach", .kind = RPC_REQUEST_STREAM,
         .request = &tandem__v1__replica_up__descriptor, .on_open = on_attach,
         .on_message = on_attach_message, .on_closed = on_attach_closed, .background = true},
    };
    return (struct rpc_service){methods, sizeof methods / sizeof *methods, c};
}
