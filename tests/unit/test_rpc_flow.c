/* gRPC behind proto/rpc.h, over loopback: flow control, many streams and threads, and servers that come and
 * go. */
#include "tests/unit/rpc_pair.h"

/* ---- flow ------------------------------------------------------------------------------------ */

Test(rpc, slow_reader_holds_only_itself_back) {
    struct rpc_server_options options = rpc_server_options_default();
    options.backlog_messages_max = 64;
    struct pair pair = pair_create_with(&options);
    struct rpc_stream *slow = open_with(pair.channel, COUNT, 20000, 4096, 0);
    cr_assert(reaches(&seen.refused, 1));   /* its backlog is full */
    struct error end;
    for (int i = 0; i < 5; i++) {
        struct rpc_stream *quick = open_with(pair.channel, COUNT, 1000, 100, 0);
        cr_assert_eq(read_all(quick, &end), 1000);
        rpc_stream_destroy(quick);
    }
    cr_assert(atomic_load(&seen.accepted) < 5000 + 20000);   /* the slow one has not finished */
    cr_assert_eq(read_all(slow, &end), 20000);
    cr_assert_eq(end.status, STATUS_OK);
    rpc_stream_destroy(slow);
    pair_destroy(&pair);
}

Test(rpc, backlog_is_bounded_and_reported) {
    struct pair pair = pair_create();
    struct rpc_stream *stream;
    struct error err;
    /* In blocking mode nothing but rpc_stream_recv takes events, so writes pile up. */
    cr_assert_eq(rpc_stream_open(&stream, pair.channel, CHAT,
                                 &tandem__v1__tokenize_response__descriptor, 0, NULL, &err),
                 STATUS_OK);
    Tandem__V1__TokenizeRequest request = TANDEM__V1__TOKENIZE_REQUEST__INIT;
    for (int i = 0; i < 1024; i++) {
        cr_assert_eq(rpc_stream_backlog(stream), (size_t)i);
        cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_OK);
    }
    cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_RESOURCE_EXHAUSTED);
    ProtobufCMessage *message;
    for (int i = 0; i < 1024; i++) {
        cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_MESSAGE);
        rpc_message_free(message);
    }
    cr_assert_eq(rpc_stream_backlog(stream), 0u);
    cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_OK);
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, two_hundred_streams_at_once) {
    enum { N = 200, EACH = 200 };
    struct pair pair = pair_create();
    struct listener listener = {0};
    struct rpc_stream_callbacks callbacks = {listen_message, NULL, listen_closed, &listener};
    struct rpc_stream *streams[N];
    Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
    int32_t ids[2] = {EACH, 20};
    request.n_ids = 2;
    request.ids = ids;
    struct error err;
    for (int i = 0; i < N; i++) {
        cr_assert_eq(rpc_stream_open(&streams[i], pair.channel, COUNT,
                                     &tandem__v1__tokenize_response__descriptor, 0, &callbacks,
                                     &err), STATUS_OK);
        cr_assert_eq(rpc_stream_send(streams[i], &request.base), STATUS_OK);
        rpc_stream_half_close(streams[i]);
    }
    cr_assert(reaches(&listener.n_closed, N));
    cr_assert_eq(atomic_load(&listener.n_messages), N * EACH);
    for (int i = 0; i < N; i++) {
        cr_assert_eq(rpc_stream_end(streams[i], &err), STATUS_OK);
        rpc_stream_destroy(streams[i]);
    }
    rpc_message_free(atomic_load(&listener.last));
    cr_assert(reaches(&seen.n_closed, N));
    pair_destroy(&pair);
}

/* Foreign threads send on one call while it is being cancelled. */
static void *sender(void *argument) {
    struct rpc_call *call = argument;
    Tandem__V1__TokenizeResponse answer = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
    enum status status;
    do {
        status = rpc_call_send(call, &answer.base);
        if (status == STATUS_RESOURCE_EXHAUSTED) clock_sleep_ns(100000);
    } while (status != STATUS_CANCELLED);
    rpc_call_finish(call, STATUS_OK, NULL);
    rpc_call_unref(call);
    return NULL;
}

static void start_senders(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message;
    pthread_t *threads = user;
    for (int i = 0; i < 3; i++) {
        if (pthread_create(&threads[i], NULL, sender, rpc_call_ref(call)) != 0) abort();
    }
    atomic_fetch_add(&seen.n_open, 1);
}

Test(rpc, sends_from_many_threads_race_with_a_cancel) {
    pthread_t threads[3];
    struct rpc_method method = {.path = "/test.Rpc/Senders", .on_message = start_senders,
                                .request = &tandem__v1__detokenize_request__descriptor};
    struct rpc_service senders = {&method, 1, threads};
    struct rpc_server_options options = rpc_server_options_default();
    struct rpc_server *server;
    struct error err;
    memset(&seen, 0, sizeof seen);
    cr_assert_eq(rpc_server_create(&server, &options, &senders, 1, &err), STATUS_OK);
    struct rpc_channel *channel = dial(rpc_server_port(server));
    for (int i = 0; i < 20; i++) {
        struct rpc_stream *stream = open_with(channel, method.path, 0, 0, 0);
        ProtobufCMessage *message;
        for (int k = 0; k < 100; k++) {
            cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_MESSAGE);
            rpc_message_free(message);
        }
        rpc_stream_destroy(stream);
        for (int t = 0; t < 3; t++) pthread_join(threads[t], NULL);
    }
    rpc_channel_destroy(channel);
    rpc_server_destroy(server);
}

/* ---- coming and going ------------------------------------------------------------------------ */

Test(rpc, a_taken_port_is_refused_in_one_sentence) {
    struct pair pair = pair_create();
    struct rpc_server_options options = rpc_server_options_default();
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%d", rpc_server_port(pair.server));
    options.address = address;
    struct rpc_server *second;
    struct error err;
    cr_assert_eq(rpc_server_create(&second, &options, &service, 1, &err), STATUS_UNAVAILABLE);
    cr_assert_null(second);
    cr_assert(strstr(err.text, address) != NULL && strstr(err.text, "in use") != NULL);
    pair_destroy(&pair);
}

Test(rpc, bad_addresses_and_tables_are_refused) {
    const char *bad[] = {"", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:x",
                         "::1:50051", "no.such.host.invalid:1"};
    struct rpc_server_options options = rpc_server_options_default();
    struct rpc_server *server;
    struct error err;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        options.address = bad[i];
        cr_assert_eq(rpc_server_create(&server, &options, &service, 1, &err), STATUS_UNAVAILABLE);
        cr_assert(strncmp(err.text, "cannot listen on", 16) == 0);
    }
    options = rpc_server_options_default();
    struct rpc_method method = methods[0];
    method.path = "Echo";
    struct rpc_service broken = {&method, 1, NULL};
    cr_assert_eq(rpc_server_create(&server, &options, &broken, 1, &err), STATUS_INVALID_ARGUMENT);
    method = methods[0];
    method.on_half_close = chat_half_close;
    cr_assert_eq(rpc_server_create(&server, &options, &broken, 1, &err), STATUS_INVALID_ARGUMENT);
}

Test(rpc, no_server_is_unavailable_and_a_late_one_is_found) {
    struct pair pair = pair_create();
    int port = rpc_server_port(pair.server);
    pair_destroy(&pair);
    struct rpc_channel *channel = dial(port);
    struct error err;
    cr_assert_eq(send_bytes(channel, ECHO, "x", 1, &err), STATUS_UNAVAILABLE);
    struct rpc_server_options options = rpc_server_options_default();
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%d", port);
    options.address = address;
    struct rpc_server *server;
    cr_assert_eq(rpc_server_create(&server, &options, &service, 1, &err), STATUS_OK);
    bool found = false;
    for (int i = 0; i < 100 && !found; i++) {
        found = send_bytes(channel, ECHO, "x", 1, &err) == STATUS_OK;
        if (!found) clock_sleep_ns(SECOND / 10);
    }
    cr_assert(found);
    rpc_channel_destroy(channel);

    struct rpc_channel_options patient = rpc_channel_options_default();
    patient.wait_for_ready = true;
    rpc_server_destroy(server);
    cr_assert_eq(rpc_channel_create(&channel, address, &patient, &err), STATUS_OK);
    struct rpc_stream *stream = open_with(channel, COUNT, 10, 10, clock_now_ns() + 60 * SECOND);
    ProtobufCMessage *message;
    cr_assert_eq(rpc_stream_recv(stream, &message, SECOND / 5), RPC_TIMEOUT);
    cr_assert_eq(rpc_server_create(&server, &options, &service, 1, &err), STATUS_OK);
    cr_assert_eq(read_all(stream, &err), 10);
    rpc_stream_destroy(stream);
    rpc_channel_destroy(channel);
    rpc_server_destroy(server);
}

Test(rpc, stopping_cancels_live_calls) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, HANG, 0, 0, 0);
    ProtobufCMessage *message;
    rpc_stream_recv(stream, &message, SECOND / 20);
    cr_assert(reaches(&seen.n_open, 1));
    cr_assert_eq(rpc_server_live_calls(pair.server), 1u);
    rpc_server_stop(pair.server, 50);
    cr_assert_eq(atomic_load(&seen.n_cancelled), 1);
    cr_assert_eq(rpc_server_live_calls(pair.server), 0u);
    cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_CLOSED);
    struct error end;
    rpc_stream_end(stream, &end);
    cr_assert(end.status == STATUS_UNAVAILABLE || end.status == STATUS_CANCELLED);
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

static void *finish_later(void *argument) {
    struct rpc_call *call = argument;
    clock_sleep_ns(SECOND / 5);
    rpc_call_finish(call, STATUS_OK, "in time");
    rpc_call_unref(call);
    return NULL;
}

static void begin_finishing(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    (void)message;
    if (pthread_create(user, NULL, finish_later, rpc_call_ref(call)) != 0) abort();
    atomic_fetch_add(&seen.n_open, 1);
}

Test(rpc, stopping_gives_calls_their_grace) {
    pthread_t thread;
    struct rpc_method method = {.path = "/test.Rpc/Later", .on_message = begin_finishing,
                                .request = &tandem__v1__detokenize_request__descriptor};
    struct rpc_service later = {&method, 1, &thread};
    struct rpc_server_options options = rpc_server_options_default();
    struct rpc_server *server;
    struct error err;
    memset(&seen, 0, sizeof seen);
    cr_assert_eq(rpc_server_create(&server, &options, &later, 1, &err), STATUS_OK);
    struct rpc_channel *channel = dial(rpc_server_port(server));
    struct rpc_stream *stream = open_with(channel, method.path, 0, 0, 0);
    ProtobufCMessage *message;
    rpc_stream_recv(stream, &message, SECOND / 50);
    cr_assert(reaches(&seen.n_open, 1));
    rpc_server_stop(server, 20000);
    cr_assert_eq(read_all(stream, &err), 0);
    cr_assert_eq(err.status, STATUS_OK);
    cr_assert_str_eq(err.text, "in time");
    pthread_join(thread, NULL);
    rpc_stream_destroy(stream);
    rpc_channel_destroy(channel);
    rpc_server_destroy(server);
}

/* Run as `test_rpc --serve-for-a-test FD`: serves until killed. A process of its own, by spawn,
 * since forking with gRPC's threads around is not possible. */
__attribute__((constructor)) static void serve_when_asked(int argc, char **argv) {
    if (argc != 3 || strcmp(argv[1], "--serve-for-a-test") != 0) return;
    struct rpc_server_options options = rpc_server_options_default();
    struct rpc_server *server;
    struct error err;
    if (rpc_server_create(&server, &options, &service, 1, &err) != STATUS_OK) _exit(1);
    int port = rpc_server_port(server);
    if (write(atoi(argv[2]), &port, sizeof port) != sizeof port) _exit(1);
    sleep(60);   /* gone by then even if the test died */
    _exit(0);
}

static pid_t spawn_server(int *port) {
    int ends[2];
    char fd[16];
    if (pipe(ends) != 0) abort();
    snprintf(fd, sizeof fd, "%d", ends[1]);
    char *arguments[] = {(char *)"test_rpc", (char *)"--serve-for-a-test", fd, NULL};
    extern char **environ;
    pid_t child;
    if (posix_spawn(&child, "/proc/self/exe", NULL, NULL, arguments, environ) != 0) abort();
    close(ends[1]);
    if (read(ends[0], port, sizeof *port) != (ssize_t)sizeof *port) abort();
    close(ends[0]);
    return child;
}

/* Reads what is still to come; the status of the end, or STATUS_OK when none came. */
static enum status end_of(struct rpc_stream *stream) {
    ProtobufCMessage *message;
    enum rpc_event event;
    while ((event = rpc_stream_recv(stream, &message, 20 * SECOND)) == RPC_MESSAGE) {
        rpc_message_free(message);
    }
    struct error end;
    return event == RPC_CLOSED ? rpc_stream_end(stream, &end) : STATUS_OK;
}

Test(rpc, a_killed_server_is_unavailable) {
    int port;
    pid_t child = spawn_server(&port);
    struct rpc_channel *channel = dial(port);
    struct rpc_stream *stream = open_with(channel, COUNT, 1000000000, 100, 0);
    ProtobufCMessage *message;
    for (int i = 0; i < 100; i++) {
        cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_MESSAGE);
        rpc_message_free(message);
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    cr_assert_eq(end_of(stream), STATUS_UNAVAILABLE);
    rpc_stream_destroy(stream);
    rpc_channel_destroy(channel);
}

Test(rpc, keepalive_is_permitted_and_notices_a_hung_server) {
    int port;
    pid_t child = spawn_server(&port);
    struct rpc_channel_options options = rpc_channel_options_default();
    options.keepalive_ms = 700;
    options.keepalive_timeout_ms = 300;
    char target[32];
    snprintf(target, sizeof target, "127.0.0.1:%d", port);
    struct rpc_channel *channel;
    struct error err;
    cr_assert_eq(rpc_channel_create(&channel, target, &options, &err), STATUS_OK);
    struct rpc_stream *stream = open_with(channel, HANG, 0, 0, 0);
    ProtobufCMessage *message;
    /* Four pings on an idle stream: with gRPC's defaults the server ends it at the third. */
    cr_assert_eq(rpc_stream_recv(stream, &message, 3 * SECOND), RPC_TIMEOUT);
    kill(child, SIGSTOP);
    cr_assert_eq(end_of(stream), STATUS_UNAVAILABLE);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    rpc_stream_destroy(stream);
    rpc_channel_destroy(channel);
}
