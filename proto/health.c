/* grpc.health.v1.Health. See health.h. */
#include "proto/health.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"

enum serving {
    UNKNOWN = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__UNKNOWN,
    SERVING = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING,
    NOT_SERVING = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING,
    SERVICE_UNKNOWN = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN,
};

struct entry {
    char name[HEALTH_NAME_MAX];
    enum serving state;
};

/* A Watch call. Free when `call` is NULL. */
struct watcher {
    struct rpc_call *call;
    char name[HEALTH_NAME_MAX];
    enum serving told;   /* UNKNOWN: nothing yet; a watcher is never told UNKNOWN */
};

struct health {
    pthread_mutex_t lock;   /* guards all below */
    size_t n_entries;
    struct entry entries[HEALTH_SERVICES_MAX];
    struct watcher watchers[HEALTH_WATCHERS_MAX];
};

struct health *health_create(void) {
    struct health *health = xcalloc(1, sizeof *health);
    pthread_mutex_init(&health->lock, NULL);
    return health;
}

void health_destroy(struct health *health) {
    if (health == NULL) return;
    pthread_mutex_destroy(&health->lock);
    free(health);
}

/* The rest is called under the lock, unless it takes it. */

static struct entry *find_entry(struct health *health, const char *name) {
    for (size_t i = 0; i < health->n_entries; i++) {
        if (strcmp(health->entries[i].name, name) == 0) return &health->entries[i];
    }
    return NULL;
}

static struct watcher *find_watcher(struct health *health, const struct rpc_call *call) {
    for (size_t i = 0; i < HEALTH_WATCHERS_MAX; i++) {
        if (health->watchers[i].call == call) return &health->watchers[i];
    }
    return NULL;
}

/* Sends the state now, if the watcher has not been told and its client keeps up; else on_drained
 * comes here again, and states in between are skipped. */
static void tell(struct health *health, struct watcher *watcher) {
    const struct entry *entry = find_entry(health, watcher->name);
    enum serving state = entry != NULL ? entry->state : SERVICE_UNKNOWN;
    if (watcher->told == state || rpc_call_backlog(watcher->call) > 0) return;
    Grpc__Health__V1__HealthCheckResponse answer = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    answer.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)state;
    if (rpc_call_send(watcher->call, &answer.base) == STATUS_OK) watcher->told = state;
}

void health_set(struct health *health, const char *service, bool serving) {
    CHECK(strlen(service) < HEALTH_NAME_MAX);
    pthread_mutex_lock(&health->lock);
    struct entry *entry = find_entry(health, service);
    if (entry == NULL) {
        CHECK(health->n_entries < HEALTH_SERVICES_MAX);
        entry = &health->entries[health->n_entries++];
        memcpy(entry->name, service, strlen(service) + 1);
    }
    entry->state = serving ? SERVING : NOT_SERVING;
    for (size_t i = 0; i < HEALTH_WATCHERS_MAX; i++) {
        if (health->watchers[i].call != NULL) tell(health, &health->watchers[i]);
    }
    pthread_mutex_unlock(&health->lock);
}

/* ---- methods --------------------------------------------------------------------------------- */

static void check(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    const Grpc__Health__V1__HealthCheckRequest *request = (const void *)message;
    struct health *health = user;
    pthread_mutex_lock(&health->lock);
    const struct entry *entry = find_entry(health, request->service);
    enum serving state = entry != NULL ? entry->state : SERVICE_UNKNOWN;
    pthread_mutex_unlock(&health->lock);
    if (state == SERVICE_UNKNOWN) {
        struct error err;
        error_set(&err, STATUS_NOT_FOUND, "no service '%.80s'", request->service);
        rpc_call_fail(call, &err);
        return;
    }
    Grpc__Health__V1__HealthCheckResponse answer = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    answer.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)state;
    rpc_call_reply(call, &answer.base);
}

static void list(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message;
    struct health *health = user;
    Grpc__Health__V1__HealthCheckResponse states[HEALTH_SERVICES_MAX];
    Grpc__Health__V1__HealthListResponse__StatusesEntry pairs[HEALTH_SERVICES_MAX];
    Grpc__Health__V1__HealthListResponse__StatusesEntry *pointers[HEALTH_SERVICES_MAX];
    Grpc__Health__V1__HealthListResponse answer = GRPC__HEALTH__V1__HEALTH_LIST_RESPONSE__INIT;
    pthread_mutex_lock(&health->lock);
    for (size_t i = 0; i < health->n_entries; i++) {
        grpc__health__v1__health_check_response__init(&states[i]);
        grpc__health__v1__health_list_response__statuses_entry__init(&pairs[i]);
        states[i].status =
            (Grpc__Health__V1__HealthCheckResponse__ServingStatus)health->entries[i].state;
        pairs[i].key = health->entries[i].name;
        pairs[i].value = &states[i];
        pointers[i] = &pairs[i];
    }
    answer.n_statuses = health->n_entries;
    answer.statuses = pointers;
    rpc_call_reply(call, &answer.base);
    pthread_mutex_unlock(&health->lock);
}

static void watch(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    const Grpc__Health__V1__HealthCheckRequest *request = (const void *)message;
    struct health *health = user;
    if (strlen(request->service) >= HEALTH_NAME_MAX) {
        rpc_call_finish(call, STATUS_INVALID_ARGUMENT, "service: longer than any name served here");
        return;
    }
    pthread_mutex_lock(&health->lock);
    struct watcher *watcher = find_watcher(health, NULL);
    if (watcher != NULL) {
        watcher->call = call;
        watcher->told = UNKNOWN;
        memcpy(watcher->name, request->service, strlen(request->service) + 1);
        tell(health, watcher);
    }
    pthread_mutex_unlock(&health->lock);
    if (watcher == NULL) rpc_call_finish(call, STATUS_RESOURCE_EXHAUSTED, "too many watchers");
}

static void watch_drained(struct rpc_call *call, void *user) {
    struct health *health = user;
    pthread_mutex_lock(&health->lock);
    struct watcher *watcher = find_watcher(health, call);
    if (watcher != NULL) tell(health, watcher);
    pthread_mutex_unlock(&health->lock);
}

static void watch_closed(struct rpc_call *call, bool cancelled, void *user) {
    (void)cancelled;
    struct health *health = user;
    pthread_mutex_lock(&health->lock);
    struct watcher *watcher = find_watcher(health, call);
    if (watcher != NULL) watcher->call = NULL;
    pthread_mutex_unlock(&health->lock);
}

static const struct rpc_method methods[] = {
    {.path = "/grpc.health.v1.Health/Check", .on_message = check,
     .request = &grpc__health__v1__health_check_request__descriptor},
    {.path = "/grpc.health.v1.Health/List", .on_message = list,
     .request = &grpc__health__v1__health_list_request__descriptor},
    {.path = "/grpc.health.v1.Health/Watch", .on_message = watch, .on_drained = watch_drained,
     .on_closed = watch_closed, .request = &grpc__health__v1__health_check_request__descriptor,
     .background = true},
};

struct rpc_service health_service(struct health *health) {
    return (struct rpc_service){methods, sizeof methods / sizeof methods[0], health};
}
