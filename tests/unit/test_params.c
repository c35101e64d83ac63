#include "coordinator/params.h"

#include <math.h>
#include <string.h>

#include "common/spec_mode.h"
#include "tests/unit/test.h"

enum { VOCAB = 100, MODES = 1u << SPEC_PLAIN | 1u << SPEC_SD | 1u << SPEC_PEARL };

/* A request whose parts the tests change before resolving. */
struct asked {
    Tandem__V1__GenerateRequest request;
    Tandem__V1__SamplingParams sampling;
};

static void ask(struct asked *asked) {
    tandem__v1__generate_request__init(&asked->request);
    tandem__v1__sampling_params__init(&asked->sampling);
    asked->request.sampling = &asked->sampling;
}

static enum status resolve(struct asked *asked, struct params *params, struct error *err) {
    err->text[0] = '\0';
    return params_resolve(params, &asked->request, VOCAB, MODES, err);
}

/* The request must be refused with words that hold `words`. */
#define REFUSED(asked, words)                                                                      \
    do {                                                                                           \
        struct params params_;                                                                     \
        struct error err_;                                                                         \
        cr_assert_eq(resolve(&(asked), &params_, &err_), STATUS_INVALID_ARGUMENT);                 \
        cr_assert(strstr(err_.text, (words)) != NULL, "%s", err_.text);                            \
    } while (0)

#define ACCEPTED(asked)                                                                            \
    do {                                                                                           \
        struct params params_;                                                                     \
        struct error err_;                                                                         \
        cr_assert_eq(resolve(&(asked), &params_, &err_), STATUS_OK, "%s", err_.text);              \
    } while (0)

#define SET(asked, field, value)                                                                   \
    ((asked).sampling.field##__case = 1, (asked).sampling.field = (value))

Test(params, absent_means_the_defaults) {
    struct asked asked;
    struct params params;
    struct error err;
    ask(&asked);
    asked.request.sampling = NULL;
    cr_assert_eq(resolve(&asked, &params, &err), STATUS_OK);
    cr_assert(params.temperature == 1 && params.top_p == 1 && params.min_p == 0);
    cr_assert(params.repetition_penalty == 1 && params.presence_penalty == 0);
    cr_assert(params.frequency_penalty == 0);
    cr_assert_eq(params.top_k, 0);
    cr_assert_eq(params.max_tokens, 0);
    cr_assert_eq(params.logprobs, -1);
    cr_assert(params.skip_special && !params.has_seed && !params.ignore_eos);
}

Test(params, zero_given_is_not_absent) {
    struct asked asked;
    struct params params;
    struct error err;
    ask(&asked);
    SET(asked, temperature, 0);
    SET(asked, seed, 0);
    SET(asked, logprobs, 0);
    SET(asked, top_k, -1);
    cr_assert_eq(resolve(&asked, &params, &err), STATUS_OK);
    cr_assert(params.temperature == 0);
    cr_assert(params.has_seed && params.seed == 0);
    cr_assert_eq(params.logprobs, 0);
    cr_assert_eq(params.top_k, 0);
}

#define FLOAT_RANGE(field, below, low, high, above)                                                \
    do {                                                                                           \
        struct asked asked_;                                                                       \
        ask(&asked_);                                                                              \
        SET(asked_, field, (below));                                                               \
        REFUSED(asked_, #field " is ");                                                            \
        SET(asked_, field, (above));                                                               \
        REFUSED(asked_, "expected ");                                                              \
        SET(asked_, field, NAN);                                                                   \
        REFUSED(asked_, #field " is ");                                                            \
        SET(asked_, field, INFINITY);                                                              \
        REFUSED(asked_, #field " is inf");                                                         \
        SET(asked_, field, (low));                                                                 \
        ACCEPTED(asked_);                                                                          \
        SET(asked_, field, (high));                                                                \
        ACCEPTED(asked_);                                                                          \
    } while (0)

Test(params, numbers_out_of_range_name_field_value_and_range) {
    FLOAT_RANGE(temperature, -0.5f, 0, 100, 100.5f);
    FLOAT_RANGE(top_p, 0, 0.001f, 1, 1.01f);
    FLOAT_RANGE(min_p, -0.01f, 0, 1, 1.01f);
    FLOAT_RANGE(repetition_penalty, 0, 0.01f, 10, 10.5f);
    FLOAT_RANGE(presence_penalty, -2.1f, -2, 2, 2.1f);
    FLOAT_RANGE(frequency_penalty, -2.1f, -2, 2, 2.1f);
    struct asked asked;
    ask(&asked);
    SET(asked, temperature, -0.5f);
    REFUSED(asked, "temperature is -0.5; expected [0, 100]");
}

Test(params, counts_out_of_range) {
    struct asked asked;
    ask(&asked);
    SET(asked, top_k, -2);
    REFUSED(asked, "top_k is -2");
    ask(&asked);
    SET(asked, max_tokens, 0);
    REFUSED(asked, "max_tokens is 0");
    ask(&asked);
    SET(asked, max_tokens, 5);
    SET(asked, min_tokens, 6);
    REFUSED(asked, "min_tokens is 6; expected 0 to max_tokens, which is 5");
    ask(&asked);
    SET(asked, logprobs, 21);
    REFUSED(asked, "logprobs is 21; expected 0 to 20");
    SET(asked, logprobs, -1);
    REFUSED(asked, "logprobs is -1");
    ask(&asked);
    SET(asked, n, 2);
    REFUSED(asked, "n is 2; expected 1");
    SET(asked, n, 0);
    REFUSED(asked, "n is 0");
    SET(asked, n, 1);
    ACCEPTED(asked);
}

Test(params, stops_are_bounded) {
    struct asked asked;
    ProtobufCBinaryData stops[17];
    uint8_t text[300] = {'x'};
    int32_t ids[65] = {0};
    ask(&asked);
    for (int i = 0; i < 17; i++) stops[i] = (ProtobufCBinaryData){1, text};
    asked.sampling.stop = stops;
    asked.sampling.n_stop = 17;
    REFUSED(asked, "stop has 17 entries; expected at most 16");
    asked.sampling.n_stop = 16;
    ACCEPTED(asked);
    stops[3].len = 0;
    REFUSED(asked, "stop[3] has 0 bytes; expected 1 to 256");
    stops[3].len = 257;
    REFUSED(asked, "stop[3] has 257 bytes");
    ask(&asked);
    asked.sampling.stop_token_ids = ids;
    asked.sampling.n_stop_token_ids = 65;
    REFUSED(asked, "stop_token_ids has 65 entries");
    asked.sampling.n_stop_token_ids = 2;
    ids[1] = VOCAB;
    REFUSED(asked, "stop_token_ids[1] is token id 100; expected 0 to 99");
}

Test(params, biases_are_bounded_and_named_once) {
    struct asked asked;
    Tandem__V1__LogitBias rows[2], *biases[] = {&rows[0], &rows[1]};
    for (int i = 0; i < 2; i++) tandem__v1__logit_bias__init(&rows[i]);
    ask(&asked);
    asked.sampling.logit_bias = biases;
    asked.sampling.n_logit_bias = 2;
    REFUSED(asked, "token id 0 twice");
    rows[1].token_id = 7;
    rows[1].bias = 101;
    REFUSED(asked, "logit_bias's bias is 101; expected [-100, 100]");
    rows[1].bias = -100;
    ACCEPTED(asked);
    rows[1].token_id = -1;
    REFUSED(asked, "logit_bias[1] is token id -1");
    asked.sampling.n_logit_bias = 1025;
    REFUSED(asked, "logit_bias has 1025 entries; expected at most 1024");
}

Test(params, modes_are_resolved_to_what_a_replica_is_told) {
    static const char *const cases[][2] = {{"", ""},           {"auto", ""}, {"off", "plain"},
                                           {"plain", "plain"}, {"sd", "sd"}, {"pearl", "pearl"}};
    struct asked asked;
    struct params params;
    struct error err;
    ask(&asked);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        asked.request.speculation = (char *)cases[i][0];
        cr_assert_eq(resolve(&asked, &params, &err), STATUS_OK, "%s", err.text);
        cr_assert_str_eq(params.speculation, cases[i][1]);
        cr_assert_eq(params.num_speculative_tokens, 0);
    }
}

Test(params, modes_that_cannot_be_run_are_refused_with_those_that_can) {
    struct asked asked;
    struct params params;
    struct error err;
    ask(&asked);
    asked.request.speculation = "pearl+lp";
    REFUSED(asked, "speculation is \"pearl+lp\"; expected one that this server can run: "
                   "auto, off, plain, sd, pearl");
    asked.request.speculation = "PEARL";
    REFUSED(asked, "speculation is \"PEARL\"");
    asked.request.speculation = "sd";
    cr_assert_eq(params_resolve(&params, &asked.request, VOCAB, 1u << SPEC_PLAIN, &err),
                 STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "expected one that this server can run: auto, off, plain") != NULL);
    cr_assert(strstr(err.text, "pearl") == NULL);
}

Test(params, drafted_tokens_are_bounded) {
    struct asked asked;
    struct params params;
    struct error err;
    ask(&asked);
    asked.request.num_speculative_tokens = SPEC_MAX_WINDOW;
    cr_assert_eq(resolve(&asked, &params, &err), STATUS_OK);
    cr_assert_eq(params.num_speculative_tokens, SPEC_MAX_WINDOW);
    asked.request.num_speculative_tokens = SPEC_MAX_WINDOW + 1;
    REFUSED(asked, "num_speculative_tokens is 17; expected 1 to 16, or 0 for the server's choice");
}

Test(params, ids_are_printable_and_short) {
    struct asked asked;
    char id[200];
    memset(id, 'a', sizeof id);
    id[129] = '\0';
    ask(&asked);
    asked.request.request_id = id;
    REFUSED(asked, "request_id has 129 bytes");
    id[128] = '\0';
    ACCEPTED(asked);
    asked.request.request_id = "a b";
    REFUSED(asked, "printable");
}

Test(params, the_context_decides_how_much_may_come) {
    struct params params = {.max_tokens = 0};
    struct error err;
    cr_assert_eq(params_fit_context(&params, 10, 64, &err), STATUS_OK);
    cr_assert_eq(params.max_tokens, 54);
    params.max_tokens = 20;
    cr_assert_eq(params_fit_context(&params, 10, 64, &err), STATUS_OK);
    cr_assert_eq(params.max_tokens, 20);
    params.max_tokens = 1000;
    cr_assert_eq(params_fit_context(&params, 63, 64, &err), STATUS_OK);
    cr_assert_eq(params.max_tokens, 1);
    cr_assert_eq(params_fit_context(&params, 64, 64, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "64 tokens; expected at most 63"));
    cr_assert_eq(params_fit_context(&params, 0, 64, &err), STATUS_INVALID_ARGUMENT);
    params.min_tokens = 5;
    cr_assert_eq(params_fit_context(&params, 60, 64, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "min_tokens is 5; expected 0 to 4"));
}

Test(params, prompt_ids_are_in_the_vocabulary) {
    int32_t ids[] = {0, 99, 100, -1};
    struct error err;
    cr_assert_eq(params_check_tokens(ids, 2, VOCAB, &err), STATUS_OK);
    cr_assert_eq(params_check_tokens(ids, 3, VOCAB, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "tokens[2] is token id 100; expected 0 to 99"));
    ids[2] = 1;
    cr_assert_eq(params_check_tokens(ids, 4, VOCAB, &err), STATUS_INVALID_ARGUMENT);
}
