/* The RPC layer: a server and its clients in one process over loopback. */
#include "tests/unit/rpc_pair.h"

/* ---- calls ----------------------------------------------------------------------------------- */

Test(rpc, unary_answers_and_shows_peer_and_metadata) {
    struct pair pair = pair_create();
    cr_assert(echo_once(pair.channel, "hello"));
    cr_assert(echo_once(pair.channel, ""));
    cr_assert(strncmp(seen.peer, "ipv4:127.0.0.1:", 15) == 0);
    cr_assert(strstr(seen.user_agent, "grpc") != NULL);
    pair_destroy(&pair);
}

Test(rpc, stream_arrives_whole_and_in_order) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, COUNT, 5000, 10, 0);
    struct error end;
    cr_assert_eq(read_all(stream, &end), 5000);
    cr_assert_eq(end.status, STATUS_OK);
    rpc_stream_destroy(stream);
    cr_assert(reaches(&seen.n_closed, 1));
    cr_assert_eq(atomic_load(&seen.n_cancelled), 0);
    pair_destroy(&pair);
}

Test(rpc, messages_before_the_end_are_not_lost_on_a_late_reader) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, COUNT, 100, 10, 0);
    cr_assert(reaches(&seen.n_closed, 1));   /* the server has finished before the first read */
    struct error end;
    cr_assert_eq(read_all(stream, &end), 100);
    cr_assert_eq(end.status, STATUS_OK);
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, bidirectional_ping_pong_and_half_close) {
    struct pair pair = pair_create();
    struct rpc_stream *stream;
    struct error err;
    cr_assert_eq(rpc_stream_open(&stream, pair.channel, CHAT,
                                 &tandem__v1__tokenize_response__descriptor, 0, NULL, &err),
                 STATUS_OK);
    ProtobufCMessage *message;
    for (int i = 0; i < 200; i++) {
        char text[16];
        int length = snprintf(text, sizeof text, "ping %d", i);
        Tandem__V1__TokenizeRequest request = TANDEM__V1__TOKENIZE_REQUEST__INIT;
        request.input_case = TANDEM__V1__TOKENIZE_REQUEST__INPUT_TEXT;
        request.text = (ProtobufCBinaryData){(size_t)length, (uint8_t *)text};
        cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_OK);
        cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_MESSAGE);
        const Tandem__V1__TokenizeResponse *answer = (const void *)message;
        cr_assert_eq(answer->text.len, (size_t)length);
        cr_assert_arr_eq(answer->text.data, text, (size_t)length);
        rpc_message_free(message);
    }
    cr_assert_eq(rpc_stream_recv(stream, &message, SECOND / 100), RPC_TIMEOUT);
    rpc_stream_half_close(stream);
    cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_CLOSED);
    cr_assert_eq(rpc_stream_end(stream, &err), STATUS_OK);
    cr_assert_str_eq(err.text, "bye");
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, callback_stream_delivers_and_closes_once) {
    struct pair pair = pair_create();
    struct listener listener = {0};
    struct rpc_stream_callbacks callbacks = {listen_message, NULL, listen_closed, &listener};
    struct rpc_stream *stream;
    struct error err;
    cr_assert_eq(rpc_stream_open(&stream, pair.channel, CHAT,
                                 &tandem__v1__tokenize_response__descriptor, 0, &callbacks, &err),
                 STATUS_OK);
    Tandem__V1__TokenizeRequest request = TANDEM__V1__TOKENIZE_REQUEST__INIT;
    request.input_case = TANDEM__V1__TOKENIZE_REQUEST__INPUT_TEXT;
    request.text = (ProtobufCBinaryData){4, (uint8_t *)"kept"};
    for (int i = 0; i < 100; i++) cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_OK);
    cr_assert(reaches(&listener.n_messages, 100));
    rpc_stream_half_close(stream);
    cr_assert(reaches(&listener.n_closed, 1));
    cr_assert_eq(listener.end.status, STATUS_OK);
    cr_assert_eq(rpc_stream_send(stream, &request.base), STATUS_CANCELLED);
    rpc_stream_destroy(stream);
    ProtobufCMessage *last = atomic_load(&listener.last);
    cr_assert_arr_eq(((Tandem__V1__TokenizeResponse *)(void *)last)->text.data, "kept", 4);
    rpc_message_free(last);
    pair_destroy(&pair);
    cr_assert_eq(atomic_load(&listener.n_closed), 1);
}

Test(rpc, destroyed_callback_stream_is_silent) {
    struct pair pair = pair_create();
    for (int i = 0; i < 50; i++) {
        struct listener *listener = xcalloc(1, sizeof *listener);
        struct rpc_stream_callbacks callbacks = {listen_message, NULL, listen_closed, listener};
        struct rpc_stream *stream;
        struct error err;
        cr_assert_eq(rpc_stream_open(&stream, pair.channel, COUNT,
                                     &tandem__v1__tokenize_response__descriptor, 0, &callbacks,
                                     &err), STATUS_OK);
        Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
        int32_t ids[2] = {100000, 10};
        request.n_ids = 2;
        request.ids = ids;
        rpc_stream_send(stream, &request.base);
        if (i % 2 == 0) reaches(&listener->n_messages, 10);
        rpc_stream_destroy(stream);
        rpc_message_free(atomic_load(&listener->last));
        free(listener);   /* a callback after this would be seen by the sanitizers */
    }
    pair_destroy(&pair);
}

/* ---- ends: cancel, deadline, failures -------------------------------------------------------- */

Test(rpc, cancel_by_the_client_reaches_the_server) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, HANG, 0, 0, 0);
    ProtobufCMessage *message;
    cr_assert_eq(rpc_stream_recv(stream, &message, SECOND / 20), RPC_TIMEOUT);
    cr_assert(reaches(&seen.n_open, 1));
    int64_t begin = clock_now_ns();
    rpc_stream_cancel(stream);
    cr_assert(reaches(&seen.n_cancelled, 1));
    printf("cancel was seen after %.2f ms\n",
           (double)(atomic_load(&seen.closed_ns) - begin) * 1e-6);
    cr_assert_eq(rpc_stream_recv(stream, &message, 20 * SECOND), RPC_CLOSED);
    struct error end;
    cr_assert_eq(rpc_stream_end(stream, &end), STATUS_CANCELLED);
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, cancel_is_seen_while_a_stream_floods_the_queue) {
    struct pair pair = pair_create();
    struct rpc_channel *other = dial(rpc_server_port(pair.server));
    struct listener listener = {0};
    struct rpc_stream_callbacks callbacks = {listen_message, NULL, listen_closed, &listener};
    struct rpc_stream *flood;
    struct error err;
    cr_assert_eq(rpc_stream_open(&flood, other, COUNT, &tandem__v1__tokenize_response__descriptor, 0,
                                 &callbacks, &err), STATUS_OK);
    Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
    int32_t ids[2] = {100000000, 0};
    request.n_ids = 2;
    request.ids = ids;
    rpc_stream_send(flood, &request.base);
    cr_assert(reaches(&listener.n_messages, 1000));
    for (int i = 0; i < 10; i++) {
        struct rpc_stream *stream = open_with(pair.channel, HANG, 0, 0, 0);
        cr_assert(reaches(&seen.n_open, i + 2));
        rpc_stream_destroy(stream);
        cr_assert(reaches(&seen.n_cancelled, i + 1));
    }
    cr_assert_eq(atomic_load(&listener.n_closed), 0);
    rpc_stream_destroy(flood);
    rpc_message_free(atomic_load(&listener.last));
    rpc_channel_destroy(other);
    pair_destroy(&pair);
}

Test(rpc, deadline_ends_the_call_on_both_sides) {
    struct pair pair = pair_create();
    int64_t deadline = clock_now_ns() + SECOND / 5;
    struct rpc_stream *stream = open_with(pair.channel, HANG, 0, 0, deadline);
    struct error end;
    cr_assert_eq(read_all(stream, &end), 0);
    cr_assert_eq(end.status, STATUS_DEADLINE_EXCEEDED);
    cr_assert(reaches(&seen.n_cancelled, 1));
    int64_t difference = atomic_load(&seen.deadline_ns) - deadline;
    cr_assert(difference > -SECOND && difference < SECOND);
    rpc_stream_destroy(stream);
    stream = open_with(pair.channel, HANG, 0, 0, 0);
    ProtobufCMessage *message;
    rpc_stream_recv(stream, &message, SECOND / 100);
    cr_assert(reaches(&seen.n_open, 2));
    cr_assert_eq(atomic_load(&seen.deadline_ns), 0);   /* none given, none invented */
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, server_limits_a_calls_lifetime) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, LIMITED, 0, 0, 0);
    struct error end;
    cr_assert_eq(read_all(stream, &end), 0);
    cr_assert_eq(end.status, STATUS_DEADLINE_EXCEEDED);
    cr_assert(atomic_load(&seen.deadline_ns) != 0);
    rpc_stream_destroy(stream);
    cr_assert(reaches(&seen.n_cancelled, 1));
    pair_destroy(&pair);
}

Test(rpc, failure_carries_status_text_and_trailers) {
    struct pair pair = pair_create();
    Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
    struct rpc_trailer trailers[2] = {{.key = "retry-after-ms"}, {.key = "absent"}};
    ProtobufCMessage *message;
    struct error err;
    cr_assert_eq(rpc_unary(pair.channel, FAIL, &request.base,
                           &tandem__v1__tokenize_response__descriptor, &message, 0, trailers, 2,
                           &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert_null(message);
    cr_assert_str_eq(err.text, "the queue is full");
    cr_assert_str_eq(trailers[0].value, "250");
    cr_assert_str_eq(trailers[1].value, "");

    struct rpc_stream *stream = open_with(pair.channel, FAIL, 0, 0, 0);
    cr_assert_eq(read_all(stream, &err), 0);
    cr_assert_eq(err.status, STATUS_RESOURCE_EXHAUSTED);
    cr_assert(rpc_stream_trailer(stream, &trailers[0]));
    cr_assert_str_eq(trailers[0].value, "250");
    cr_assert_not(rpc_stream_trailer(stream, &trailers[1]));
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, abort_gives_the_client_its_status) {
    struct pair pair = pair_create();
    struct rpc_stream *stream = open_with(pair.channel, ABORT, 0, 0, 0);
    struct error end;
    cr_assert_eq(read_all(stream, &end), 0);
    cr_assert_eq(end.status, STATUS_ABORTED);
    cr_assert_str_eq(end.text, "enough");
    rpc_stream_destroy(stream);
    pair_destroy(&pair);
}

Test(rpc, unknown_method_is_refused_by_name) {
    struct pair pair = pair_create();
    Tandem__V1__DetokenizeRequest request = TANDEM__V1__DETOKENIZE_REQUEST__INIT;
    ProtobufCMessage *message;
    struct error err;
    cr_assert_eq(rpc_unary(pair.channel, "/test.Rpc/Nothing", &request.base,
                           &tandem__v1__tokenize_response__descriptor, &message, 0, NULL, 0, &err),
                 STATUS_UNIMPLEMENTED);
    cr_assert(strstr(err.text, "/test.Rpc/Nothing") != NULL);
    pair_destroy(&pair);
}

/* ---- hostile input --------------------------------------------------------------------------- */

Test(rpc, malformed_request_is_an_invalid_argument) {
    struct pair pair = pair_create();
    struct error err;
    /* Field 1 of a DetokenizeRequest holds packed varints; these never end. */
    cr_assert_eq(send_bytes(pair.channel, HANG, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 11,
                            &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "DetokenizeRequest") != NULL);
    cr_assert_eq(atomic_load(&seen.n_open), 0);
    cr_assert(echo_once(pair.channel, "still serving"));
    pair_destroy(&pair);
}

Test(rpc, oversize_messages_are_refused_on_both_ends) {
    struct rpc_server_options options = rpc_server_options_default();
    options.message_bytes_max = 64 << 10;
    struct pair pair = pair_create_with(&options);
    char *bytes = xcalloc(1, 17u << 20);
    struct error err;
    cr_assert_eq(send_bytes(pair.channel, ECHO, bytes, 65 << 10, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.text, "65536") != NULL);                      /* the server's limit */
    cr_assert_eq(send_bytes(pair.channel, ECHO, bytes, 17u << 20, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.text, "the request has") != NULL);            /* the channel's */
    cr_assert_eq(send_bytes(pair.channel, ECHO, bytes, 60 << 10, &err), STATUS_OK);
    free(bytes);
    pair_destroy(&pair);
}

Test(rpc, unpacking_is_bounded) {
    /* 2 bytes of wire are a ChatMessage of over 60 bytes in memory. */
    enum { N = 20000 };
    uint8_t *wire = xcalloc(N, 2);
    for (int i = 0; i < N; i++) wire[2 * i] = 0x0a;
    ProtobufCMessage *message;
    struct error err;
    const ProtobufCMessageDescriptor *type = &tandem__v1__chat_messages__descriptor;
    cr_assert_eq(rpc_message_unpack(&message, type, wire, 2 * N, 8u << 20, &err), STATUS_OK);
    cr_assert_eq(((Tandem__V1__ChatMessages *)(void *)message)->n_messages, (size_t)N);
    rpc_message_free(message);
    for (size_t limit = 0; limit < (1u << 20); limit = limit * 2 + 1) {
        cr_assert_eq(rpc_message_unpack(&message, type, wire, 2 * N, limit, &err),
                     STATUS_INVALID_ARGUMENT);
        cr_assert_null(message);
    }
    cr_assert_eq(rpc_message_unpack(&message, type, wire, 2 * N - 1, 8u << 20, &err),
                 STATUS_INVALID_ARGUMENT);   /* cut in the middle */
    cr_assert_eq(rpc_message_unpack(&message, type, "", 0, 0, &err), STATUS_OK);
    rpc_message_free(message);
    free(wire);

    struct rpc_server_options options = rpc_server_options_default();
    options.unpacked_bytes_max = 4096;
    struct pair pair = pair_create_with(&options);
    char text[8192] = {0};
    cr_assert_eq(send_bytes(pair.channel, ECHO, text, sizeof text, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "4096") != NULL);
    pair_destroy(&pair);
}
