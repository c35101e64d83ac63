/* The health and reflection services, asked over loopback. */
#include "tests/unit/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "grpc/health/v1/health.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"
#include "proto/health.h"
#include "proto/reflection.h"
#include "proto/rpc.h"

#define SECOND 1000000000LL

struct pair {
    struct rpc_server *server;
    struct rpc_channel *channel;
};

static struct pair pair_create(const struct rpc_service *service) {
    struct rpc_server_options server_options = rpc_server_options_default();
    struct rpc_channel_options channel_options = rpc_channel_options_default();
    struct pair pair;
    struct error err;
    char target[32];
    if (rpc_server_create(&pair.server, &server_options, service, 1, &err) != STATUS_OK) abort();
    snprintf(target, sizeof target, "127.0.0.1:%d", rpc_server_port(pair.server));
    if (rpc_channel_create(&pair.channel, target, &channel_options, &err) != STATUS_OK) abort();
    return pair;
}

static void pair_destroy(struct pair *pair) {
    rpc_channel_destroy(pair->channel);
    rpc_server_destroy(pair->server);
}

/* ---- health ---------------------------------------------------------------------------------- */

#define HEALTH "/grpc.health.v1.Health/"

struct health_pair {
    struct health *health;
    struct rpc_service table;
    struct pair pair;
};

static struct health_pair *health_pair_create(void) {
    struct health_pair *made = xcalloc(1, sizeof *made);
    made->health = health_create();
    made->table = health_service(made->health);
    made->pair = pair_create(&made->table);
    return made;
}

static void health_pair_destroy(struct health_pair *made) {
    pair_destroy(&made->pair);
    health_destroy(made->health);
    free(made);
}

/* The serving status that Check gives, or minus the RPC's status. */
static int health_check(struct rpc_channel *channel, const char *name) {
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)name;
    ProtobufCMessage *message;
    struct error err;
    enum status status = rpc_unary(channel, HEALTH "Check", &request.base,
                                   &grpc__health__v1__health_check_response__descriptor, &message,
                                   0, NULL, 0, &err);
    if (status != STATUS_OK) return -(int)status;
    int state = (int)((Grpc__Health__V1__HealthCheckResponse *)(void *)message)->status;
    rpc_message_free(message);
    return state;
}

static int next_state(struct rpc_stream *stream, int64_t timeout_ns) {
    ProtobufCMessage *message;
    if (rpc_stream_recv(stream, &message, timeout_ns) != RPC_MESSAGE) return -1;
    int state = (int)((Grpc__Health__V1__HealthCheckResponse *)(void *)message)->status;
    rpc_message_free(message);
    return state;
}

enum { SERVING = 1, NOT_SERVING = 2, SERVICE_UNKNOWN = 3 };

Test(health, check_answers_for_known_names) {
    struct health_pair *made = health_pair_create();
    struct rpc_channel *channel = made->pair.channel;
    cr_assert_eq(health_check(channel, ""), -(int)STATUS_NOT_FOUND);
    health_set(made->health, "", true);
    health_set(made->health, "tandem.v1.Generation", false);
    cr_assert_eq(health_check(channel, ""), SERVING);
    cr_assert_eq(health_check(channel, "tandem.v1.Generation"), NOT_SERVING);
    cr_assert_eq(health_check(channel, "nobody"), -(int)STATUS_NOT_FOUND);
    health_pair_destroy(made);
}

Test(health, list_gives_all) {
    struct health_pair *made = health_pair_create();
    health_set(made->health, "a", true);
    health_set(made->health, "b", false);
    Grpc__Health__V1__HealthListRequest request = GRPC__HEALTH__V1__HEALTH_LIST_REQUEST__INIT;
    ProtobufCMessage *message;
    struct error err;
    cr_assert_eq(rpc_unary(made->pair.channel, HEALTH "List", &request.base,
                           &grpc__health__v1__health_list_response__descriptor, &message, 0, NULL, 0,
                           &err), STATUS_OK);
    const Grpc__Health__V1__HealthListResponse *list = (const void *)message;
    cr_assert_eq(list->n_statuses, 2u);
    cr_assert_str_eq(list->statuses[0]->key, "a");
    cr_assert_eq((int)list->statuses[0]->value->status, SERVING);
    cr_assert_str_eq(list->statuses[1]->key, "b");
    cr_assert_eq((int)list->statuses[1]->value->status, NOT_SERVING);
    rpc_message_free(message);
    health_pair_destroy(made);
}

static struct rpc_stream *health_watch(struct rpc_channel *channel, const char *name) {
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    request.service = (char *)name;
    struct rpc_stream *stream;
    struct error err;
    if (rpc_stream_open(&stream, channel, HEALTH "Watch",
                        &grpc__health__v1__health_check_response__descriptor, 0, NULL, &err) !=
        STATUS_OK) abort();
    rpc_stream_send(stream, &request.base);
    rpc_stream_half_close(stream);
    return stream;
}

Test(health, watch_tells_changes_only) {
    struct health_pair *made = health_pair_create();
    struct rpc_stream *stream = health_watch(made->pair.channel, "svc");
    cr_assert_eq(next_state(stream, 20 * SECOND), SERVICE_UNKNOWN);
    health_set(made->health, "svc", false);
    cr_assert_eq(next_state(stream, 20 * SECOND), NOT_SERVING);
    health_set(made->health, "svc", false);
    health_set(made->health, "other", true);
    cr_assert_eq(next_state(stream, SECOND / 20), -1);
    health_set(made->health, "svc", true);
    cr_assert_eq(next_state(stream, 20 * SECOND), SERVING);
    for (int i = 0; i < 101; i++) health_set(made->health, "svc", i % 2 == 1);
    int state = SERVING, last;   /* some are skipped; the last one is not */
    while ((last = next_state(stream, SECOND / 5)) != -1) state = last;
    cr_assert_eq(state, NOT_SERVING);
    rpc_stream_destroy(stream);
    health_pair_destroy(made);
}

Test(health, watchers_are_bounded_freed_and_do_not_hold_a_stop) {
    struct health_pair *made = health_pair_create();
    health_set(made->health, "", true);
    static struct rpc_stream *streams[HEALTH_WATCHERS_MAX];
    for (int i = 0; i < HEALTH_WATCHERS_MAX; i++) {
        streams[i] = health_watch(made->pair.channel, "");
        cr_assert_eq(next_state(streams[i], 20 * SECOND), SERVING);
    }
    struct rpc_stream *extra = health_watch(made->pair.channel, "");
    struct error end;
    cr_assert_eq(next_state(extra, 20 * SECOND), -1);
    cr_assert_eq(rpc_stream_end(extra, &end), STATUS_RESOURCE_EXHAUSTED);
    rpc_stream_destroy(extra);
    rpc_stream_destroy(streams[0]);
    bool watched = false;
    for (int i = 0; i < 100 && !watched; i++) {   /* until the server has seen the cancel */
        extra = health_watch(made->pair.channel, "");
        watched = next_state(extra, 20 * SECOND) == SERVING;
        if (!watched) clock_sleep_ns(SECOND / 100);
        rpc_stream_destroy(extra);
    }
    cr_assert(watched);
    int64_t begin = clock_now_ns();
    rpc_server_stop(made->pair.server, 60000);
    cr_assert(clock_now_ns() - begin < 30 * SECOND);
    for (int i = 1; i < HEALTH_WATCHERS_MAX; i++) rpc_stream_destroy(streams[i]);
    health_pair_destroy(made);
}

/* ---- reflection ------------------------------------------------------------------------------ */

static const char *const served[] = {"tandem.v1.Generation", "tandem.v1.Operations",
                                     "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                                     "grpc.reflection.v1alpha.ServerReflection"};

typedef void (*ask_fn)(Grpc__Reflection__V1__ServerReflectionRequest *request, const char *name);

static void ask_symbol(Grpc__Reflection__V1__ServerReflectionRequest *request, const char *name) {
    request->message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL;
    request->file_containing_symbol = (char *)name;
}

static void ask_file(Grpc__Reflection__V1__ServerReflectionRequest *request, const char *name) {
    request->message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME;
    request->file_by_filename = (char *)name;
}

static void ask_services(Grpc__Reflection__V1__ServerReflectionRequest *request, const char *name) {
    request->message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES;
    request->list_services = (char *)name;
}

static void ask_extensions(Grpc__Reflection__V1__ServerReflectionRequest *request,
                           const char *name) {
    request->message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE;
    request->all_extension_numbers_of_type = (char *)name;
}

static Grpc__Reflection__V1__ServerReflectionResponse *ask(struct rpc_stream *stream, ask_fn fill,
                                                           const char *name) {
    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    fill(&request, name);
    ProtobufCMessage *message;
    if (rpc_stream_send(stream, &request.base) != STATUS_OK ||
        rpc_stream_recv(stream, &message, 20 * SECOND) != RPC_MESSAGE) {
        abort();
    }
    return (void *)message;
}

/* The error code of the answer; 0 and *found_text (whether the file names `text`) when a file
 * came. */
static int ask_for_file(struct rpc_stream *stream, ask_fn fill, const char *name, const char *text,
                        bool *found_text) {
    Grpc__Reflection__V1__ServerReflectionResponse *answer = ask(stream, fill, name);
    int code = 0;
    *found_text = false;
    if (answer->message_response_case ==
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE) {
        code = answer->error_response->error_code;
    } else {
        ProtobufCBinaryData file = answer->file_descriptor_response->file_descriptor_proto[0];
        *found_text = memmem(file.data, file.len, text, strlen(text)) != NULL;
    }
    rpc_message_free(&answer->base);
    return code;
}

static void reflection_speaks(const char *path) {
    struct reflection *reflection;
    struct error err;
    cr_assert_eq(reflection_create(&reflection, served, 5, &err), STATUS_OK);
    struct rpc_service table = reflection_service(reflection);
    struct pair pair = pair_create(&table);
    struct rpc_stream *stream;
    cr_assert_eq(rpc_stream_open(&stream, pair.channel, path,
                                 &grpc__reflection__v1__server_reflection_response__descriptor, 0,
                                 NULL, &err), STATUS_OK);

    Grpc__Reflection__V1__ServerReflectionResponse *answer = ask(stream, ask_services, "");
    cr_assert_eq(answer->list_services_response->n_service, 5u);
    cr_assert_str_eq(answer->list_services_response->service[0]->name, "tandem.v1.Generation");
    cr_assert_eq((int)answer->original_request->message_request_case,
                 (int)GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES);
    rpc_message_free(&answer->base);

    const char *known[] = {"tandem.v1.Generation", "tandem.v1.Generation.Generate",
                           "tandem.v1.SamplingParams", "tandem.v1.SamplingParams.top_p"};
    bool found;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        cr_assert_eq(ask_for_file(stream, ask_symbol, known[i], "SamplingParams", &found), 0);
        cr_assert(found);
    }
    cr_assert_eq(ask_for_file(stream, ask_symbol, "tandem.v1.FINISH_LENGTH", "", &found),
                 STATUS_NOT_FOUND);   /* enum values are scoped by their enum here */
    cr_assert_eq(ask_for_file(stream, ask_symbol, "tandem.v1.FinishReason", "StepStats", &found), 0);
    cr_assert(found);
    cr_assert_eq(ask_for_file(stream, ask_symbol,
                              "grpc.health.v1.HealthCheckResponse.ServingStatus", "List", &found), 0);
    cr_assert(found);
    cr_assert_eq(ask_for_file(stream, ask_file, "tandem/v1/operations.proto", "GetPlan", &found), 0);
    cr_assert(found);
    const char *unknown[] = {"", "tandem", "tandem.v1", "tandem.v1.Gen", "tandem.v1.Generation.",
                             "tandem.v1.Generation.None", "other.Service"};
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        cr_assert_eq(ask_for_file(stream, ask_symbol, unknown[i], "", &found), STATUS_NOT_FOUND);
    }
    cr_assert_eq(ask_for_file(stream, ask_file, "nothing.proto", "", &found), STATUS_NOT_FOUND);
    cr_assert_eq(ask_for_file(stream, ask_extensions, "x", "", &found), STATUS_UNIMPLEMENTED);
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
    reflection_destroy(reflection);
}

Test(reflection, v1_lists_and_finds) {
    reflection_speaks("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo");
}

Test(reflection, v1alpha_lists_and_finds) {
    reflection_speaks("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo");
}

Test(reflection, an_undescribed_service_is_refused) {
    static const char *const wrong[] = {"tandem.v1.Missing"};
    struct reflection *reflection;
    struct error err;
    cr_assert_eq(reflection_create(&reflection, wrong, 1, &err), STATUS_INTERNAL);
    cr_assert(strstr(err.text, "tandem.v1.Missing") != NULL);
}
