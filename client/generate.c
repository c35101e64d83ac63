#include "client/generate.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "client/shade.h"
#include "common/clock.h"
#include "common/options.h"
#include "proto/rpc.h"
#include "tandem/v1/generation.pb-c.h"

#define SECOND_NS INT64_C(1000000000)
#define PROMPT_BYTES_MAX (64 << 20)

/* Parameters have no range here: the server knows it, and its words name the field. */
static const struct options_row rows[] = {
    {.name = "server", .type = OPTIONS_TEXT, .group = "Server", .value = "HOST:PORT",
     .help = "where the coordinator listens", .initial = "127.0.0.1:50051"},
    {.name = "deadline", .type = OPTIONS_REAL, .group = "Server", .value = "SECONDS",
     .help = "gives up after this time", .low = 0.001, .high = 1e6},
    {.name = "request-id", .type = OPTIONS_TEXT, .group = "Server", .value = "ID",
     .help = "names the request; drawn by the server without it"},
    {.name = "prompt", .type = OPTIONS_TEXT, .group = "Input (one of these)", .value = "TEXT",
     .help = "text to continue"},
    {.name = "prompt-file", .type = OPTIONS_TEXT, .group = "Input (one of these)", .value = "FILE",
     .help = "the same from a file; - is stdin"},
    {.name = "chat", .type = OPTIONS_TEXT, .group = "Input (one of these)", .value = "TEXT",
     .help = "a message to answer, through the model's chat format"},
    {.name = "tokens", .type = OPTIONS_TEXT, .group = "Input (one of these)", .value = "1,2,3",
     .help = "token ids to continue, as they are"},
    {.name = "system", .type = OPTIONS_TEXT, .group = "Input (one of these)", .value = "TEXT",
     .help = "with --chat: the system message"},
    {.name = "max-tokens", .type = OPTIONS_COUNT, .group = "Sampling", .value = "N",
     .help = "tokens to generate at most; without it, what the context holds"},
    {.name = "min-tokens", .type = OPTIONS_COUNT, .group = "Sampling", .value = "N",
     .help = "no end before this many tokens"},
    {.name = "temperature", .type = OPTIONS_REAL, .group = "Sampling", .value = "T",
     .help = "0 is greedy; without it 1"},
    {.name = "top-p", .type = OPTIONS_REAL, .group = "Sampling", .value = "P",
     .help = "smallest set of tokens with this probability; without it 1"},
    {.name = "top-k", .type = OPTIONS_REAL, .group = "Sampling", .value = "K",
     .help = "the K likeliest tokens; without it, or 0 or -1, all"},
    {.name = "min-p", .type = OPTIONS_REAL, .group = "Sampling", .value = "P",
     .help = "tokens at least P times as likely as the likeliest; without it 0"},
    {.name = "seed", .type = OPTIONS_TEXT, .group = "Sampling", .value = "S",
     .help = "64-bit number; drawn and shown without it"},
    {.name = "repetition-penalty", .type = OPTIONS_REAL, .group = "Sampling", .value = "X",
     .help = "divides the logits of tokens seen in prompt or answer; without it 1"},
    {.name = "presence-penalty", .type = OPTIONS_REAL, .group = "Sampling", .value = "X",
     .help = "subtracted from tokens that the answer holds; without it 0"},
    {.name = "frequency-penalty", .type = OPTIONS_REAL, .group = "Sampling", .value = "X",
     .help = "subtracted as often as the answer holds the token; without it 0"},
    {.name = "logit-bias", .type = OPTIONS_LIST, .group = "Sampling", .value = "ID=B",
     .help = "added to a token's logit"},
    {.name = "speculation", .type = OPTIONS_TEXT, .group = "Speculation", .value = "MODE",
     .help = "auto, off, or a mode that the server can run (plain, sd, easyspec, pearl, pearl+lp); "
             "without it auto"},
    {.name = "num-speculative-tokens", .type = OPTIONS_COUNT, .group = "Speculation", .value = "N",
     .help = "tokens drafted in a round at most; without it, or 0, what the server chooses"},
    {.name = "stop", .type = OPTIONS_LIST, .group = "Ending", .value = "TEXT",
     .help = "ends before this text"},
    {.name = "stop-token-ids", .type = OPTIONS_TEXT, .group = "Ending", .value = "1,2",
     .help = "ends with one of these tokens"},
    {.name = "ignore-eos", .type = OPTIONS_FLAG, .group = "Ending",
     .help = "goes on past the model's end token"},
    {.name = "include-stop", .type = OPTIONS_FLAG, .group = "Ending",
     .help = "shows the stop text that matched"},
    {.name = "logprobs", .type = OPTIONS_REAL, .group = "Output", .value = "N",
     .help = "log-probabilities of each token and of the N likeliest (with --json)"},
    {.name = "show-special", .type = OPTIONS_FLAG, .group = "Output",
     .help = "special tokens appear in the text"},
    {.name = "shade", .type = OPTIONS_CHOICE, .group = "Output", .value = "WHEN",
     .help = "shows accepted draft tokens fainter; auto: on a terminal", .initial = "auto",
     .choices = "auto|always|never"},
    {.name = "json", .type = OPTIONS_FLAG, .group = "Output",
     .help = "prints one JSON object per event; the last has \"done\": true"},
    {.name = "config", .type = OPTIONS_TEXT, .group = "General", .value = "FILE",
     .help = "YAML file with these options by the same names", .command_line_only = true},
    {.name = "help", .type = OPTIONS_FLAG, .group = "General", .help = "prints this",
     .command_line_only = true},
};
#define N_ROWS (sizeof rows / sizeof *rows)

struct generation {
    const struct options *options;
    bool json;
    struct shade shade;
    char *text;              /* everything so far (JSON's last event repeats it) */
    size_t n_text;
    json_t *token_ids;
    char last;               /* of the text: a line break is due at the end when it is none */
    bool finished;
};

/* ---- the request ----------------------------------------------------------------------------- */

/* "1,2,3" → ids, malloc'd. */
static enum status parse_ids(int32_t **ids, size_t *n_ids, const char *option, const char *text,
                             struct error *err) {
    *ids = xmalloc((strlen(text) / 2 + 1) * sizeof **ids);
    *n_ids = 0;
    for (const char *at = text; *at != '\0';) {
        char *end;
        errno = 0;
        long long id = strtoll(at, &end, 10);
        if (end == at || errno != 0 || id < INT32_MIN || id > INT32_MAX ||
            (*end != ',' && *end != '\0') || (*end == ',' && end[1] == '\0')) {
            free(*ids);
            *ids = NULL;
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "--%s is \"%s\"; expected token ids like 1,2,3", option, text);
        }
        (*ids)[(*n_ids)++] = (int32_t)id;
        at = *end == ',' ? end + 1 : end;
    }
    return STATUS_OK;
}

static enum status read_prompt(char **text, size_t *n_bytes, const char *path, struct error *err) {
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    if (file == NULL) {
        return error_set(err, STATUS_NOT_FOUND, "--prompt-file %s: %s", path, strerror(errno));
    }
    *text = NULL;
    *n_bytes = 0;
    size_t room = 0, n;
    do {
        room = room == 0 ? 65536 : room * 2;
        *text = xrealloc(*text, room);
        n = fread(*text + *n_bytes, 1, room - *n_bytes, file);
        *n_bytes += n;
    } while (*n_bytes == room && room <= PROMPT_BYTES_MAX);
    bool failed = ferror(file) != 0;
    if (file != stdin) fclose(file);
    if (failed || *n_bytes > PROMPT_BYTES_MAX) {
        free(*text);
        return error_set(err, STATUS_INVALID_ARGUMENT, "--prompt-file %s: %s", path,
                         failed ? "cannot be read" : "larger than 64 MiB");
    }
    return STATUS_OK;
}

static ProtobufCBinaryData bytes_of(const char *text) {
    return (ProtobufCBinaryData){strlen(text), (uint8_t *)text};
}

static Tandem__V1__ChatMessage *message(const char *role, const char *content) {
    Tandem__V1__ChatMessage *out = xmalloc(sizeof *out);
    tandem__v1__chat_message__init(out);
    out->role = xstrdup(role);
    out->content = bytes_of(xstrdup(content));
    return out;
}

static Tandem__V1__ChatMessages *chat_of(const char *system, const char *user) {
    Tandem__V1__ChatMessages *chat = xmalloc(sizeof *chat);
    tandem__v1__chat_messages__init(chat);
    chat->messages = xcalloc(2, sizeof *chat->messages);
    if (system != NULL) chat->messages[chat->n_messages++] = message("system", system);
    chat->messages[chat->n_messages++] = message("user", user);
    return chat;
}

/* Exactly one input. What it allocates belongs to the request. */
static enum status set_input(Tandem__V1__GenerateRequest *request, const struct options *options,
                             struct error *err) {
    const char *prompt = options_text(options, "prompt"), *chat = options_text(options, "chat");
    const char *file = options_text(options, "prompt-file");
    const char *tokens = options_text(options, "tokens");
    const char *system = options_text(options, "system");
    if ((prompt != NULL) + (chat != NULL) + (file != NULL) + (tokens != NULL) != 1) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "give one of --prompt, --prompt-file, --chat and --tokens");
    }
    if (system != NULL && chat == NULL) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "--system goes with --chat only");
    }
    if (chat != NULL) {
        request->chat = chat_of(system, chat);
        request->input_case = TANDEM__V1__GENERATE_REQUEST__INPUT_CHAT;
    } else if (tokens != NULL) {
        Tandem__V1__TokenIds *ids = xmalloc(sizeof *ids);
        tandem__v1__token_ids__init(ids);
        request->tokens = ids;
        request->input_case = TANDEM__V1__GENERATE_REQUEST__INPUT_TOKENS;
        TRY(parse_ids(&ids->ids, &ids->n_ids, "tokens", tokens, err));
    } else {
        char *text = prompt != NULL ? xstrdup(prompt) : NULL;
        size_t n_bytes = prompt != NULL ? strlen(prompt) : 0;
        if (text == NULL) TRY(read_prompt(&text, &n_bytes, file, err));
        request->text = (ProtobufCBinaryData){n_bytes, (uint8_t *)text};
        request->input_case = TANDEM__V1__GENERATE_REQUEST__INPUT_TEXT;
    }
    return STATUS_OK;
}

static enum status set_biases(Tandem__V1__SamplingParams *sampling, const struct options *options,
                              struct error *err) {
    char *const *items;
    size_t n = options_list(options, "logit-bias", &items);
    if (n > 0) sampling->logit_bias = xcalloc(n, sizeof(Tandem__V1__LogitBias *));
    for (size_t i = 0; i < n; i++) {
        char *middle, *end = NULL;
        errno = 0;
        long id = strtol(items[i], &middle, 10);
        float bias = *middle == '=' ? strtof(middle + 1, &end) : 0;
        if (middle == items[i] || end == NULL || end == middle + 1 || *end != '\0' ||
            errno != 0 || id < INT32_MIN || id > INT32_MAX) {
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "--logit-bias is \"%s\"; expected ID=B, for example 17=-2.5",
                             items[i]);
        }
        Tandem__V1__LogitBias *entry = xmalloc(sizeof *entry);
        tandem__v1__logit_bias__init(entry);
        entry->token_id = (int32_t)id;
        entry->bias = bias;
        sampling->logit_bias[sampling->n_logit_bias++] = entry;
    }
    return STATUS_OK;
}

static enum status set_seed(Tandem__V1__SamplingParams *sampling, const char *text,
                            struct error *err) {
    if (text == NULL) return STATUS_OK;
    char *end;
    errno = 0;
    sampling->seed = strtoull(text, &end, 10);
    sampling->seed__case = TANDEM__V1__SAMPLING_PARAMS__SEED__SEED;
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--seed is \"%s\"; expected a whole number below 2^64", text);
    }
    return STATUS_OK;
}

/* A whole number that may be negative, so that the server can judge it. */
static enum status whole(int32_t *out, const struct options *options, const char *name,
                         struct error *err) {
    double value = options_real(options, name);
    if (value != (double)(int32_t)value) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "--%s is %g; expected a whole number", name,
                         value);
    }
    *out = (int32_t)value;
    return STATUS_OK;
}

/* Sets a parameter that may be left out: value and case. */
#define SET_GIVEN(option_, field_, CASE_, value_)                                                  \
    do {                                                                                           \
        if (options_given(options, option_)) {                                                     \
            sampling->field_ = value_;                                                             \
            sampling->field_##__case = TANDEM__V1__SAMPLING_PARAMS__##CASE_##__##CASE_;            \
        }                                                                                          \
    } while (0)
#define REAL(option_) ((float)options_real(options, option_))

static enum status set_numbers(Tandem__V1__SamplingParams *sampling, const struct options *options,
                               struct error *err) {
    int32_t top_k = 0, logprobs = 0;
    TRY(whole(&top_k, options, "top-k", err));
    TRY(whole(&logprobs, options, "logprobs", err));
    uint64_t max_tokens = options_count(options, "max-tokens");
    uint64_t min_tokens = options_count(options, "min-tokens");
    if (max_tokens > UINT32_MAX || min_tokens > UINT32_MAX) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--max-tokens and --min-tokens are below 2^32");
    }
    SET_GIVEN("temperature", temperature, TEMPERATURE, REAL("temperature"));
    SET_GIVEN("top-p", top_p, TOP_P, REAL("top-p"));
    SET_GIVEN("top-k", top_k, TOP_K, top_k);
    SET_GIVEN("min-p", min_p, MIN_P, REAL("min-p"));
    SET_GIVEN("max-tokens", max_tokens, MAX_TOKENS, (uint32_t)max_tokens);
    SET_GIVEN("min-tokens", min_tokens, MIN_TOKENS, (uint32_t)min_tokens);
    SET_GIVEN("repetition-penalty", repetition_penalty, REPETITION_PENALTY,
              REAL("repetition-penalty"));
    SET_GIVEN("presence-penalty", presence_penalty, PRESENCE_PENALTY, REAL("presence-penalty"));
    SET_GIVEN("frequency-penalty", frequency_penalty, FREQUENCY_PENALTY,
              REAL("frequency-penalty"));
    SET_GIVEN("logprobs", logprobs, LOGPROBS, logprobs);
    return STATUS_OK;
}

static enum status set_sampling(Tandem__V1__SamplingParams *sampling,
                                const struct options *options, struct error *err) {
    TRY(set_numbers(sampling, options, err));
    TRY(set_seed(sampling, options_text(options, "seed"), err));
    TRY(set_biases(sampling, options, err));
    const char *ids = options_text(options, "stop-token-ids");
    if (ids != NULL) {
        TRY(parse_ids(&sampling->stop_token_ids, &sampling->n_stop_token_ids, "stop-token-ids",
                      ids, err));
    }
    char *const *stops;
    size_t n_stops = options_list(options, "stop", &stops);
    if (n_stops > 0) sampling->stop = xcalloc(n_stops, sizeof *sampling->stop);
    for (size_t i = 0; i < n_stops; i++) {
        sampling->stop[sampling->n_stop++] = bytes_of(xstrdup(stops[i]));
    }
    sampling->ignore_eos = options_flag(options, "ignore-eos");
    sampling->include_stop_str_in_output = options_flag(options, "include-stop");
    sampling->skip_special_tokens_off = options_flag(options, "show-special");
    return STATUS_OK;
}

static enum status set_speculation(Tandem__V1__GenerateRequest *request,
                                   const struct options *options, struct error *err) {
    const char *mode = options_text(options, "speculation");
    uint64_t n = options_count(options, "num-speculative-tokens");
    if (n > UINT32_MAX) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "--num-speculative-tokens is below 2^32");
    }
    if (mode != NULL) request->speculation = xstrdup(mode);
    request->num_speculative_tokens = (uint32_t)n;
    return STATUS_OK;
}

/* Builds the request; on failure too, the caller frees *out with protobuf-c. */
static enum status build_request(Tandem__V1__GenerateRequest **out, const struct options *options,
                                 struct error *err) {
    Tandem__V1__GenerateRequest *request = xmalloc(sizeof *request);
    tandem__v1__generate_request__init(request);
    request->sampling = xmalloc(sizeof *request->sampling);
    tandem__v1__sampling_params__init(request->sampling);
    *out = request;
    const char *id = options_text(options, "request-id");
    if (id != NULL) request->request_id = xstrdup(id);
    TRY(set_speculation(request, options, err));
    TRY(set_input(request, options, err));
    return set_sampling(request->sampling, options, err);
}

/* ---- the answer ------------------------------------------------------------------------------ */

static void print_event(json_t *event) {
    CHECK(event != NULL);
    json_dumpf(event, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(event);
}

static json_t *logprob_json(const Tandem__V1__TokenLogprob *entry) {
    json_t *top = json_array();
    for (size_t i = 0; i < entry->n_top_ids; i++) {
        json_array_append_new(top, json_pack("{si sf}", "token_id", entry->top_ids[i], "logprob",
                                             (double)entry->top_logprobs[i]));
    }
    return json_pack("{si sf so}", "token_id", entry->token_id, "logprob", (double)entry->logprob,
                     "top", top);
}

static void print_chunk_json(const Tandem__V1__GenerateChunk *chunk) {
    json_t *ids = json_array();
    for (size_t i = 0; i < chunk->n_token_ids; i++) {
        json_array_append_new(ids, json_integer(chunk->token_ids[i]));
    }
    json_t *event = json_pack("{ss# so}", "text",
                              chunk->text.len > 0 ? (const char *)chunk->text.data : "",
                              (int)chunk->text.len, "token_ids", ids);
    CHECK(event != NULL);
    if (chunk->n_drafted > 0) {
        json_t *drafted = json_array();
        for (size_t i = 0; i < chunk->n_drafted; i++) {
            json_array_append_new(drafted, json_boolean(chunk->drafted[i]));
        }
        json_object_set_new(event, "drafted", drafted);
    }
    if (chunk->n_logprobs > 0) {
        json_t *logprobs = json_array();
        for (size_t i = 0; i < chunk->n_logprobs; i++) {
            json_array_append_new(logprobs, logprob_json(chunk->logprobs[i]));
        }
        json_object_set_new(event, "logprobs", logprobs);
    }
    print_event(event);
}

static json_t *speculation_json(const Tandem__V1__SpeculationReport *report) {
    json_t *histogram = json_array();
    for (size_t i = 0; i < report->n_acceptance_histogram; i++) {
        json_array_append_new(histogram, json_integer(report->acceptance_histogram[i]));
    }
    return json_pack("{ss sf sf so sI sI sI}", "mode", report->mode, "mean_acceptance_length",
                     report->mean_acceptance_length, "draft_acceptance_rate",
                     report->draft_acceptance_rate, "acceptance_histogram", histogram,
                     "num_spec_steps", (json_int_t)report->num_spec_steps, "num_draft_tokens",
                     (json_int_t)report->num_draft_tokens, "num_accepted_tokens",
                     (json_int_t)report->num_accepted_tokens);
}

/* Seeds are 64 bits, JSON's integers here 63: the upper half is written as text. */
static json_t *seed_json(uint64_t seed) {
    char text[24];
    snprintf(text, sizeof text, "%" PRIu64, seed);
    return seed <= INT64_MAX ? json_integer((json_int_t)seed) : json_string(text);
}

static void print_finish_json(const struct generation *g, const Tandem__V1__GenerateChunk *chunk) {
    const Tandem__V1__Finish *finish = chunk->finish;
    const Tandem__V1__Usage *usage = finish->usage;
    const Tandem__V1__Timing *timing = finish->timing;
    json_t *event = json_pack(
        "{sb ss sO ss# ss so s{sI sI sI} s{sf sf sf sf}}", "done", 1, "request_id",
        chunk->request_id, "token_ids", g->token_ids, "text", g->text, (int)g->n_text,
        "finish_reason", finish->reason, "seed", seed_json(finish->seed), "usage", "prompt_tokens",
        (json_int_t)usage->prompt_tokens, "cached_tokens", (json_int_t)usage->cached_tokens,
        "completion_tokens", (json_int_t)usage->completion_tokens, "timing", "queue_seconds",
        timing->queue_seconds, "ttft_seconds", timing->ttft_seconds, "total_seconds",
        timing->total_seconds, "tokens_per_second", timing->tokens_per_second);
    CHECK(event != NULL);
    if (finish->stop_string.len > 0) {
        json_object_set_new(event, "stop_string",
                            json_stringn((const char *)finish->stop_string.data,
                                         finish->stop_string.len));
    }
    if (finish->stop_token__case == TANDEM__V1__FINISH__STOP_TOKEN__STOP_TOKEN) {
        json_object_set_new(event, "stop_token", json_integer(finish->stop_token));
    }
    if (finish->speculation != NULL) {
        json_object_set_new(event, "speculation", speculation_json(finish->speculation));
    }
    print_event(event);
}

/* "mode pearl, mean acceptance length 3.21", or only the mode where nothing was judged. */
static void describe_speculation(char *out, size_t size,
                                 const Tandem__V1__SpeculationReport *report) {
    if (report == NULL || report->num_spec_steps == 0) {
        snprintf(out, size, "mode %.32s", report != NULL ? report->mode : "plain");
        return;
    }
    snprintf(out, size, "mode %.32s, mean acceptance length %.2f", report->mode,
             report->mean_acceptance_length);
}

static void print_finish(const struct generation *g, const Tandem__V1__Finish *finish) {
    char speculation[100];
    if (g->n_text > 0 && g->last != '\n') putchar('\n');
    fflush(stdout);
    describe_speculation(speculation, sizeof speculation, finish->speculation);
    fprintf(stderr,
            "[%u prompt tokens (%u cached), %u tokens, TTFT %.1f ms, %.1f tokens/s, %s, finish %s, "
            "seed %" PRIu64 "]\n",
            finish->usage->prompt_tokens, finish->usage->cached_tokens,
            finish->usage->completion_tokens, finish->timing->ttft_seconds * 1e3,
            finish->timing->tokens_per_second, speculation, finish->reason, finish->seed);
}

/* INTERNAL: the chunk contradicts itself, or the last one lacks what every server sends. */
static enum status take_chunk(struct generation *g, const Tandem__V1__GenerateChunk *chunk,
                              struct error *err) {
    const Tandem__V1__Finish *finish = chunk->finish;
    if (finish != NULL && (finish->usage == NULL || finish->timing == NULL)) {
        return error_set(err, STATUS_INTERNAL, "the server's last chunk has no usage or timing");
    }
    TRY(shade_check(chunk, err));
    if (chunk->text.len > 0) {
        g->text = xrealloc(g->text, g->n_text + chunk->text.len);
        memcpy(g->text + g->n_text, chunk->text.data, chunk->text.len);
        g->n_text += chunk->text.len;
        g->last = g->text[g->n_text - 1];
    }
    for (size_t i = 0; i < chunk->n_token_ids; i++) {
        json_array_append_new(g->token_ids, json_integer(chunk->token_ids[i]));
    }
    if (g->json) {
        if (chunk->text.len > 0 || chunk->n_token_ids > 0) print_chunk_json(chunk);
        if (finish != NULL) print_finish_json(g, chunk);
    } else {
        shade_write(&g->shade, stdout, chunk);
        if (finish != NULL) print_finish(g, finish);
    }
    fflush(stdout);
    g->finished |= finish != NULL;
    return STATUS_OK;
}

/* SIGINT and SIGTERM are blocked; asks whether one waits. */
static bool interrupted(void) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    return sigtimedwait(&signals, NULL, &(struct timespec){0, 0}) > 0;
}

/* Reads until the end. CANCELLED: by a signal, or by somebody through the server. */
static enum status receive(struct generation *g, struct rpc_stream *stream, struct error *err) {
    for (;;) {
        ProtobufCMessage *chunk;
        enum rpc_event event = rpc_stream_recv(stream, &chunk, SECOND_NS / 20);
        if (event == RPC_CLOSED) break;
        if (event == RPC_MESSAGE) {
            enum status status = take_chunk(g, (Tandem__V1__GenerateChunk *)chunk, err);
            rpc_message_free(chunk);
            TRY(status);
        }
        if (interrupted()) {
            rpc_stream_cancel(stream);
            return error_set(err, STATUS_CANCELLED, "interrupted; the generation is cancelled");
        }
    }
    TRY(rpc_stream_end(stream, err));
    if (!g->finished) {
        return error_set(err, STATUS_INTERNAL, "the stream ended without a last chunk");
    }
    return STATUS_OK;
}

static enum status generate(struct generation *g, const Tandem__V1__GenerateRequest *request,
                            struct error *err) {
    struct rpc_channel_options channel_options = rpc_channel_options_default();
    struct rpc_channel *channel;
    struct rpc_stream *stream;
    double deadline = options_real(g->options, "deadline");
    int64_t deadline_ns = deadline > 0 ? clock_now_ns() + (int64_t)(deadline * 1e9) : 0;
    TRY(rpc_channel_create(&channel, options_text(g->options, "server"), &channel_options, err));
    enum status status = rpc_stream_open(&stream, channel, "/tandem.v1.Generation/Generate",
                                         &tandem__v1__generate_chunk__descriptor, deadline_ns,
                                         NULL, err);
    if (status == STATUS_OK) {
        status = rpc_stream_send(stream, &request->base);
        if (status == STATUS_OK) {
            rpc_stream_half_close(stream);
            status = receive(g, stream, err);
        } else {
            error_set(err, status, "the request could not be sent (%s)", status_name(status));
        }
        rpc_stream_destroy(stream);
    }
    rpc_channel_destroy(channel);
    return status;
}

static int report(const struct generation *g, const struct error *err) {
    if (!g->json && g->n_text > 0 && g->last != '\n') putchar('\n');
    if (g->json) {
        print_event(json_pack("{s{ss ss}}", "error", "code", status_name(err->status), "message",
                              err->text));
    }
    fflush(stdout);
    fprintf(stderr, "tandem generate: %s: %s\n", status_name(err->status), err->text);
    return err->status == STATUS_CANCELLED ? 130 : 1;
}

/* Whether text is shaded. With --json nothing is: marks stand beside the tokens. */
static bool shades(const struct options *options) {
    const char *when = options_text(options, "shade");
    if (options_flag(options, "json") || strcmp(when, "never") == 0) return false;
    return strcmp(when, "always") == 0 || isatty(STDOUT_FILENO);
}

static int run(const struct options *options) {
    struct error err;
    Tandem__V1__GenerateRequest *request;
    int result = 0;
    /* Blocked before the RPC threads exist, so that only `interrupted` takes them. */
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    if (build_request(&request, options, &err) != STATUS_OK) {
        fprintf(stderr, "tandem generate: %s; try tandem generate --help\n", err.text);
        result = 2;
    } else {
        struct generation g = {.options = options, .json = options_flag(options, "json"),
                               .shade = {.on = shades(options)}, .text = xcalloc(1, 1),
                               .token_ids = json_array()};
        if (generate(&g, request, &err) != STATUS_OK) result = report(&g, &err);
        free(g.text);
        json_decref(g.token_ids);
    }
    tandem__v1__generate_request__free_unpacked(request, NULL);
    return result;
}

int client_generate(int argc, char **argv) {
    struct options *options;
    struct error err;
    if (options_parse(&options, rows, N_ROWS, argc, argv, &err) != STATUS_OK) {
        fprintf(stderr, "tandem generate: %s; try tandem generate --help\n", err.text);
        return 2;
    }
    int result = 0;
    if (options_flag(options, "help")) {
        puts("Usage: tandem generate --prompt TEXT [options]\n\n"
             "Streams a generation to stdout; its statistics go to stderr. Ctrl-C cancels it.");
        options_help(stdout, rows, N_ROWS);
    } else {
        result = run(options);
    }
    options_free(options);
    return result;
}
