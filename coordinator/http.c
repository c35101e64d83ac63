#include "coordinator/http.h"

#include <errno.h>
#include <microhttpd.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct http {
    struct MHD_Daemon *daemon;
    const struct metrics *metrics;
    const atomic_bool *ready;
    int port;
};

static enum MHD_Result answer(struct MHD_Connection *connection, unsigned code, const char *type,
                              void *text, size_t n_bytes, enum MHD_ResponseMemoryMode memory) {
    struct MHD_Response *response = MHD_create_response_from_buffer(n_bytes, text, memory);
    if (response == NULL) return MHD_NO;
    MHD_add_response_header(response, "Content-Type", type);
    enum MHD_Result result = MHD_queue_response(connection, code, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result answer_text(struct MHD_Connection *connection, unsigned code,
                                   const char *text) {
    return answer(connection, code, "text/plain; charset=utf-8", (void *)text, strlen(text),
                  MHD_RESPMEM_PERSISTENT);
}

static enum MHD_Result on_request(void *user, struct MHD_Connection *connection, const char *url,
                                  const char *method, const char *version, const char *body,
                                  size_t *body_bytes, void **state) {
    (void)version;
    (void)body;
    (void)state;
    struct http *http = user;
    if (*body_bytes > 0) {   /* no answer needs one; it is read and dropped */
        *body_bytes = 0;
        return MHD_YES;
    }
    if (strcmp(method, "GET") != 0 && strcmp(method, "HEAD") != 0) {
        return answer_text(connection, 405, "only GET is served here\n");
    }
    if (strcmp(url, "/metrics") == 0) {
        size_t n_bytes;
        char *text = metrics_render(http->metrics, &n_bytes);
        return answer(connection, 200, "text/plain; version=0.0.4; charset=utf-8", text, n_bytes,
                      MHD_RESPMEM_MUST_FREE);
    }
    if (strcmp(url, "/healthz") == 0) return answer_text(connection, 200, "alive\n");
    if (strcmp(url, "/readyz") == 0) {
        bool ready = atomic_load(http->ready);
        return answer_text(connection, ready ? 200 : 503,
                           ready ? "ready\n" : "no replica is serving\n");
    }
    return answer_text(connection, 404, "not found; served here: /metrics /healthz /readyz\n");
}

enum status http_start(struct http **out, const char *host, int port, const struct metrics *metrics,
                       const atomic_bool *ready, struct error *err) {
    char service[16];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *address;
    snprintf(service, sizeof service, "%d", port);
    int code = getaddrinfo(host, service, &hints, &address);
    if (code != 0) {
        return error_set(err, STATUS_UNAVAILABLE, "HTTP: host \"%s\": %s", host, gai_strerror(code));
    }
    struct http *http = xcalloc(1, sizeof *http);
    http->metrics = metrics;
    http->ready = ready;
    unsigned flags = MHD_USE_INTERNAL_POLLING_THREAD;
    if (address->ai_family == AF_INET6) flags |= MHD_USE_IPv6;
    http->daemon = MHD_start_daemon(flags, (uint16_t)port, NULL, NULL, on_request, http,
                                    MHD_OPTION_SOCK_ADDR, address->ai_addr,
                                    MHD_OPTION_CONNECTION_LIMIT, 64u,
                                    MHD_OPTION_CONNECTION_TIMEOUT, 30u, MHD_OPTION_END);
    int reason = errno;
    freeaddrinfo(address);
    if (http->daemon == NULL) {
        free(http);
        return error_set(err, STATUS_UNAVAILABLE,
                         "HTTP: cannot listen on %s:%d: %s; choose another with --http-port", host,
                         port, strerror(reason));
    }
    http->port = MHD_get_daemon_info(http->daemon, MHD_DAEMON_INFO_BIND_PORT)->port;
    *out = http;
    return STATUS_OK;
}

int http_port(const struct http *http) {
    return http->port;
}

void http_stop(struct http *http) {
    if (http == NULL) return;
    MHD_stop_daemon(http->daemon);
    free(http);
}
