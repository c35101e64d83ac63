#include "coordinator/session.h"

#include <string.h>

struct session *session_create(struct rpc_call *call, Tandem__V1__GenerateRequest *request,
                               int64_t now_ns) {
    struct session *session = xcalloc(1, sizeof *session);
    session->call = rpc_call_ref(call);
    session->request = request;
    session->arrived_ns = now_ns;
    session->last_token = -1;
    return session;
}

void session_free(struct session *session) {
    stream_destroy(session->stream);
    bytes_free(&session->output.text);
    token_list_free(&session->output.ids);
    bytes_free(&session->output.logprobs);
    bytes_free(&session->output.n_top);
    token_list_free(&session->output.top_ids);
    bytes_free(&session->output.top_logprobs);
    bytes_free(&session->output.drafted);
    bytes_free(&session->output.text_ends);
    token_list_free(&session->prompt);
    rpc_message_free(&session->request->base);
    rpc_call_unref(session->call);
    free(session);
}

/* FNV-1a: ids are short, and chosen by clients who may only slow themselves down. */
static size_t bucket_of_id(const char *id) {
    uint32_t hash = 2166136261u;
    for (; *id != '\0'; id++) hash = (hash ^ (unsigned char)*id) * 16777619u;
    return (hash ^ hash >> 15) % SESSION_BUCKETS;
}

struct session *session_by_key(const struct session_table *table, uint64_t key) {
    struct session *session = table->by_key[key % SESSION_BUCKETS];
    while (session != NULL && session->key != key) session = session->next_by_key;
    return session;
}

struct session *session_by_id(const struct session_table *table, const char *id) {
    struct session *session = table->by_id[bucket_of_id(id)];
    while (session != NULL && strcmp(session->id, id) != 0) session = session->next_by_id;
    return session;
}

enum status session_table_add(struct session_table *table, struct session *session,
                              struct error *err) {
    if (session_by_id(table, session->id) != NULL) {
        return error_set(err, STATUS_ALREADY_EXISTS,
                         "request_id is \"%s\", which a live request has; expected a new one",
                         session->id);
    }
    session->key = ++table->last_key;
    struct session **by_key = &table->by_key[session->key % SESSION_BUCKETS];
    struct session **by_id = &table->by_id[bucket_of_id(session->id)];
    session->next_by_key = *by_key;
    *by_key = session;
    session->next_by_id = *by_id;
    *by_id = session;
    session->listed = true;
    table->n++;
    return STATUS_OK;
}

void session_table_forget_id(struct session_table *table, struct session *session) {
    if (!session->listed) return;
    struct session **at = &table->by_id[bucket_of_id(session->id)];
    while (*at != session) at = &(*at)->next_by_id;
    *at = session->next_by_id;
    session->listed = false;
}

void session_table_remove(struct session_table *table, struct session *session) {
    if (session->key == 0) return;
    session_table_forget_id(table, session);
    struct session **at = &table->by_key[session->key % SESSION_BUCKETS];
    while (*at != session) at = &(*at)->next_by_key;
    *at = session->next_by_key;
    session->key = 0;
    table->n--;
}
