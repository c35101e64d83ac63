/* The preparing thread: checks requests and turns prompts into token ids, so that a long prompt holds
 * neither the network nor the running streams back. Touches only immutable parts of the coordinator. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "coordinator/coordinator.h"

static uint64_t draw(void) {
    uint64_t value;
    CHECK(getrandom(&value, sizeof value, 0) == (ssize_t)sizeof value);
    return value;
}

static enum status check_bytes(const struct coordinator *c, size_t n_bytes, struct error *err) {
    if (n_bytes <= c->model.prompt_bytes_max) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "the prompt has %zu bytes; expected at most %zu, more never fits a context of "
                     "%" PRIu32 " tokens",
                     n_bytes, c->model.prompt_bytes_max, c->model.context);
}

/* The chat as one text, malloc'd for the caller. */
static enum status render(const struct coordinator *c, const Tandem__V1__ChatMessages *chat,
                          char **text, struct error *err) {
    size_t total = 0;
    if (chat->n_messages == 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "chat has 0 messages; expected at least 1");
    }
    for (size_t i = 0; i < chat->n_messages; i++) {
        const ProtobufCBinaryData *content = &chat->messages[i]->content;
        total += content->len + 1;
        if (content->len > 0 && memchr(content->data, 0, content->len) != NULL) {
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "chat.messages[%zu].content has a NUL byte; expected text", i);
        }
    }
    TRY(check_bytes(c, total + 16 * chat->n_messages, err));
    struct chat_message *messages = xcalloc(chat->n_messages, sizeof *messages);
    char *contents = xmalloc(total), *at = contents;
    for (size_t i = 0; i < chat->n_messages; i++) {
        const ProtobufCBinaryData *content = &chat->messages[i]->content;
        messages[i] = (struct chat_message){chat->messages[i]->role, at};
        if (content->len > 0) memcpy(at, content->data, content->len);
        at += content->len;
        *at++ = '\0';
    }
    enum status status = chat_render(c->model.chat, messages, chat->n_messages, true, text, err);
    free(contents);
    free(messages);
    return status;
}

static enum status encode_chat(const struct coordinator *c, struct token_list *out,
                               const Tandem__V1__ChatMessages *chat, char **text,
                               struct error *err) {
    TRY(render(c, chat, text, err));
    return tokenizer_encode(c->model.tokenizer, out, *text, strlen(*text), false, err);
}

static enum status encode_text(const struct coordinator *c, struct token_list *out,
                               const ProtobufCBinaryData *text, bool add_special,
                               struct error *err) {
    TRY(check_bytes(c, text->len, err));
    const char *bytes = text->len > 0 ? (const char *)text->data : "";
    return tokenizer_encode(c->model.tokenizer, out, bytes, text->len, add_special, err);
}

static enum status encode_prompt(const struct coordinator *c, struct token_list *out,
                                 const Tandem__V1__GenerateRequest *request, struct error *err) {
    char *text = NULL;
    enum status status;
    switch (request->input_case) {
    case TANDEM__V1__GENERATE_REQUEST__INPUT_TEXT:
        return encode_text(c, out, &request->text, true, err);
    case TANDEM__V1__GENERATE_REQUEST__INPUT_CHAT:
        status = encode_chat(c, out, request->chat, &text, err);
        free(text);
        return status;
    case TANDEM__V1__GENERATE_REQUEST__INPUT_TOKENS:
        TRY(params_check_tokens(request->tokens->ids, request->tokens->n_ids, c->model.config.vocab,
                                err));
        for (size_t i = 0; i < request->tokens->n_ids; i++) {
            token_list_push(out, request->tokens->ids[i]);
        }
        return STATUS_OK;
    default:
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "the request has no input; expected text, tokens or chat");
    }
}

static struct stream *open_stream(const struct coordinator *c, const struct params *params) {
    struct stream_options options = {
        .n_stops = params->n_stops,
        .min_tokens = params->min_tokens,
        .include_stop = params->include_stop,
        .skip_special = params->skip_special,
    };
    for (size_t i = 0; i < params->n_stops; i++) {
        options.stops[i] = (struct stream_stop){(const char *)params->stops[i].data,
                                                params->stops[i].len};
    }
    return stream_create(c->model.tokenizer, &options);
}

static enum status prepare(struct coordinator *c, struct session *session, struct error *err) {
    const Tandem__V1__GenerateRequest *request = session->request;
    struct params *params = &session->params;
    TRY(params_resolve(params, request, c->model.config.vocab, c->topology.policy.modes, err));
    TRY(encode_prompt(c, &session->prompt, request, err));
    TRY(params_fit_context(params, session->prompt.n, atomic_load(&c->context), err));
    if (!params->has_seed) params->seed = draw();
    if (request->request_id[0] != '\0') {
        snprintf(session->id, sizeof session->id, "%s", request->request_id);
    } else {
        snprintf(session->id, sizeof session->id, "req-%016" PRIx64, draw());
    }
    session->entry.prompt_tokens = (uint32_t)session->prompt.n;
    session->entry.deadline_ns = rpc_call_deadline_ns(session->call);
    session->stream = open_stream(c, params);
    return STATUS_OK;
}

static void prepare_session(struct coordinator *c, struct session *session) {
    session->refused.status = STATUS_OK;
    /* A client that has gone is not worth the work. */
    if (rpc_call_cancelled(session->call)) {
        error_set(&session->refused, STATUS_CANCELLED, "the client went away");
    } else {
        prepare(c, session, &session->refused);
    }
    mailbox_post(&c->inbox, &(struct event){.kind = EVENT_PREPARED, .session = session});
}

static void tokenize(struct coordinator *c, struct rpc_call *call,
                     const Tandem__V1__TokenizeRequest *request) {
    struct token_list ids = {0};
    char *rendered = NULL;
    struct error err;
    enum status status;
    Tandem__V1__TokenizeResponse response = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
    if (request->input_case == TANDEM__V1__TOKENIZE_REQUEST__INPUT_CHAT) {
        status = encode_chat(c, &ids, request->chat, &rendered, &err);
        response.text.data = (uint8_t *)rendered;
        response.text.len = rendered != NULL ? strlen(rendered) : 0;
    } else if (request->input_case == TANDEM__V1__TOKENIZE_REQUEST__INPUT_TEXT) {
        status = encode_text(c, &ids, &request->text, !request->no_special_tokens, &err);
        response.text = request->text;
    } else {
        status = error_set(&err, STATUS_INVALID_ARGUMENT,
                           "the request has no input; expected text or chat");
    }
    response.n_ids = ids.n;
    response.ids = ids.ids;
    if (status == STATUS_OK) rpc_call_reply(call, &response.base);
    else rpc_call_fail(call, &err);
    token_list_free(&ids);
    free(rendered);
}

static enum status check_known(const struct tokenizer *tokenizer, const int32_t *ids, size_t n_ids,
                               struct error *err) {
    TRY(params_check_tokens(ids, n_ids, tokenizer_size(tokenizer), err));
    for (size_t i = 0; i < n_ids; i++) {
        if (tokenizer_has(tokenizer, ids[i])) continue;
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "tokens[%zu] is token id %" PRId32 ", which the tokenizer does not have", i,
                         ids[i]);
    }
    return STATUS_OK;
}

static void detokenize(struct coordinator *c, struct rpc_call *call,
                       const Tandem__V1__DetokenizeRequest *request) {
    struct error err;
    if (check_known(c->model.tokenizer, request->ids, request->n_ids, &err) != STATUS_OK) {
        rpc_call_fail(call, &err);
        return;
    }
    struct stream_options options = {.skip_special = request->skip_special_tokens};
    struct stream *stream = stream_create(c->model.tokenizer, &options);
    struct bytes text = {0};
    for (size_t i = 0; i < request->n_ids; i++) stream_push(stream, &text, request->ids[i]);
    stream_end(stream, &text);
    Tandem__V1__DetokenizeResponse response = TANDEM__V1__DETOKENIZE_RESPONSE__INIT;
    response.text = (ProtobufCBinaryData){text.n, (uint8_t *)text.data};
    if (rpc_call_reply(call, &response.base) == STATUS_RESOURCE_EXHAUSTED) {
        error_set(&err, STATUS_RESOURCE_EXHAUSTED, "the text has %zu bytes, too many for a message",
                  text.n);
        rpc_call_fail(call, &err);
    }
    stream_destroy(stream);
    bytes_free(&text);
}

/* False: nothing else will come. */
static bool handle(struct coordinator *c, struct event *event) {
    switch (event->kind) {
    case EVENT_PREPARE:
        prepare_session(c, event->session);
        break;
    case EVENT_TOKENIZE:
        tokenize(c, event->call, (const Tandem__V1__TokenizeRequest *)event->message);
        break;
    case EVENT_DETOKENIZE:
        detokenize(c, event->call, (const Tandem__V1__DetokenizeRequest *)event->message);
        break;
    default:
        CHECK(event->kind == EVENT_EXIT);
        return false;
    }
    rpc_message_free(event->message);
    if (event->call != NULL) rpc_call_unref(event->call);
    return true;
}

void *prepare_main(void *coordinator) {
    struct coordinator *c = coordinator;
    bool more = true;
    while (more) {
        struct event *events = mailbox_take(&c->to_prepare, 1000000000);
        for (struct event *next; events != NULL; events = next) {
            next = events->next;
            more &= handle(c, events);
            free(events);
        }
    }
    return NULL;
}
