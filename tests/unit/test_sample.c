/* Sampling: every step against plain loops, and the draw against the probabilities it promises. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tests/reference/random.h"
#include "tests/reference/sample.h"
#include "tests/unit/test.h"

static struct backend *open_backend(void) {
    struct backend_options options = {BACKEND_AUTO, 1, 4, 64, 0};
    struct backend *backend = NULL;
    struct error err = {0};
    if (backend_create(&backend, &options, &err) != STATUS_OK) abort();
    return backend;
}

static struct sample_params plain_params(float temperature) {
    return (struct sample_params){.temperature = temperature,
                                  .top_p = 1,
                                  .repetition_penalty = 1,
                                  .seed = 42,
                                  .n_logprobs = -1};
}

/* Samples a copy of the logits. */
static struct sample_result draw(struct backend *backend, const float *logits, int vocab,
                                 const struct sample_params *params, const int32_t *history,
                                 int n_prompt, int n_history, int64_t position) {
    float *copy = calloc((size_t)vocab, sizeof *copy);
    if (copy == NULL) abort();
    memcpy(copy, logits, (size_t)vocab * sizeof *copy);
    struct sample_result result;
    memset(&result, 0x7f, sizeof result);
    struct error err;
    struct sample_draw one = {params, history, n_prompt, n_history, position, -1, false};
    backend_sample_begin(backend, copy, vocab, vocab, &one, 1);
    cr_assert_eq(backend_sample_end(backend, &result, &err), STATUS_OK);
    cr_assert(result.made);
    free(copy);
    return result;
}

static int32_t draw_plain(struct backend *backend, const float *logits, int vocab,
                          const struct sample_params *params, int64_t position) {
    return draw(backend, logits, vocab, params, NULL, 0, 0, position).token;
}

/* --- greedy ----------------------------------------------------------------------------------- */

Test(sample, greedy_takes_the_largest_and_the_lowest_of_equals) {
    struct backend *backend = open_backend();
    struct sample_params params = plain_params(0);
    float a[] = {-3, 2, 7, 7, 1}, b[] = {-1, -1, -1}, c[] = {-INFINITY, -4, -4}, d[] = {5};
    cr_assert_eq(draw_plain(backend, a, 5, &params, 3), 2);
    cr_assert_eq(draw_plain(backend, b, 3, &params, 3), 0);
    cr_assert_eq(draw_plain(backend, c, 3, &params, 3), 1);
    cr_assert_eq(draw_plain(backend, d, 1, &params, 3), 0);
    backend_destroy(backend);
}

/* --- the draw against an argmax over everything ----------------------------------------------- */

struct random_case {
    struct sample_params params;
    struct sample_bias bias[4];
    int32_t banned[3], history[40];
    int n_prompt, n_history, vocab;
    int64_t position;
    float *logits;
};

/* Half of the cases use each parameter; logits are coarse now and then, so that there are ties. */
static void fill_case(struct random_case *c, uint64_t seed) {
    struct test_random random = {seed};
    c->vocab = 1 + random_below(&random, random_below(&random, 2) ? 20 : 700);
    float spread = random_below(&random, 2) ? 3 : 30;
    c->logits = random_floats(&random, (size_t)c->vocab, -spread, spread);
    if (random_below(&random, 3) == 0) {
        for (int v = 0; v < c->vocab; v++) c->logits[v] = floorf(c->logits[v]);
    }
    c->params = plain_params(random_f32(&random, 0.1f, 2));
    if (random_below(&random, 8) == 0) c->params.temperature = 0;
    c->params.seed = random_u64(&random);
    if (random_below(&random, 2)) c->params.top_k = 1 + random_below(&random, c->vocab);
    if (random_below(&random, 2)) c->params.top_p = random_f32(&random, 0.05f, 0.999f);
    if (random_below(&random, 3) == 0) c->params.min_p = random_f32(&random, 0.001f, 0.4f);
    c->n_prompt = random_below(&random, 20);
    c->n_history = c->n_prompt + random_below(&random, 20);
    for (int i = 0; i < c->n_history; i++) c->history[i] = random_below(&random, c->vocab);
    if (random_below(&random, 2)) c->params.repetition_penalty = random_f32(&random, 0.7f, 1.5f);
    if (random_below(&random, 2)) c->params.presence_penalty = random_f32(&random, -1, 1);
    if (random_below(&random, 2)) c->params.frequency_penalty = random_f32(&random, -1, 1);
    c->params.n_bias = random_below(&random, 5);
    for (int i = 0; i < c->params.n_bias; i++) {
        c->bias[i] = (struct sample_bias){random_below(&random, c->vocab),
                                          random_f32(&random, -9, 9)};
    }
    c->params.bias = c->bias;
    c->params.n_banned = c->vocab > 3 ? random_below(&random, 4) : 0;
    for (int i = 0; i < c->params.n_banned; i++) c->banned[i] = random_below(&random, c->vocab);
    c->params.banned = c->banned;
    c->position = (int64_t)(random_u64(&random) >> random_below(&random, 64) >> 1);
}

Test(sample, the_draw_is_the_argmax_over_all_tokens) {
    struct backend *backend = open_backend();
    for (uint64_t seed = 0; seed < 6000; seed++) {
        struct random_case c;
        fill_case(&c, seed);
        bool allowed[720];
        int32_t got = draw(backend, c.logits, c.vocab, &c.params, c.history, c.n_prompt,
                           c.n_history, c.position).token;
        int32_t expected = reference_sample(allowed, c.logits, c.vocab, &c.params, c.history,
                                            c.n_prompt, c.n_history, c.position);
        cr_assert_eq(got, expected, "seed %llu: vocab %d T %g k %d p %g min %g: %d, expected %d",
                     (unsigned long long)seed, c.vocab, c.params.temperature, c.params.top_k,
                     c.params.top_p, c.params.min_p, got, expected);
        free(c.logits);
    }
    backend_destroy(backend);
}

/* The largest logit, of a high id, and a smaller one with more noise come to the same number. */
Test(sample, a_tie_of_the_draw_goes_to_the_lowest_token) {
    enum { LOW = 1, HIGH = 6, VOCAB = 9 };
    struct backend *backend = open_backend();
    struct sample_params params = plain_params(1);
    int n_ties = 0;
    for (int64_t position = 0; position < 2000; position++) {
        float noise[8];
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t words[4];
            gumbel_words(words, params.seed, position, i);
            for (int w = 0; w < 4; w++) noise[i * 4 + (uint32_t)w] = gumbel_noise(words[w]);
        }
        float logits[VOCAB];
        for (int v = 0; v < VOCAB; v++) logits[v] = -50;
        logits[HIGH] = 0;
        logits[LOW] = noise[HIGH] - noise[LOW];
        if (logits[LOW] >= 0 || logits[LOW] + noise[LOW] != noise[HIGH]) continue;
        n_ties++;
        for (int filter = 0; filter < 2; filter++) {
            params.top_k = filter ? 4 : 0;
            int32_t token = draw_plain(backend, logits, VOCAB, &params, position);
            cr_assert_eq(token, LOW, "position %lld filter %d: %d", (long long)position, filter,
                         token);
        }
    }
    cr_assert(n_ties > 100, "%d ties", n_ties);
    backend_destroy(backend);
}

/* A large vocabulary, most of which is passed over, at temperatures where it must not be. */
Test(sample, the_draw_is_the_argmax_in_a_large_vocabulary) {
    enum { VOCAB = 50001 };
    struct backend *backend = open_backend();
    struct test_random random = {77};
    float *logits = random_floats(&random, VOCAB, -10, 10);
    static const float temperatures[] = {0.3f, 1, 5, 100};
    for (int i = 0; i < 40; i++) {
        struct sample_params params = plain_params(temperatures[i % 4]);
        params.seed = (uint64_t)i;
        int32_t got = draw_plain(backend, logits, VOCAB, &params, i);
        float largest = logits[reference_argmax(logits, VOCAB)], best_value = -INFINITY;
        int32_t best = -1;
        for (int v = 0; v < VOCAB; v++) {
            uint32_t words[4];
            gumbel_words(words, params.seed, i, (uint32_t)v / 4);
            float value = (logits[v] - largest) / params.temperature + gumbel_noise(words[v % 4]);
            if (value > best_value) best = v, best_value = value;
        }
        cr_assert_eq(got, best, "draw %d: %d, expected %d", i, got, best);
    }
    free(logits);
    backend_destroy(backend);
}

/* Nothing that was sampled before, by this backend or with a larger vocabulary, leaves a trace. */
Test(sample, the_order_of_requests_does_not_matter) {
    enum { CASES = 60 };
    struct backend *backend = open_backend();
    static struct random_case cases[CASES];
    int32_t forwards[CASES];
    for (int i = 0; i < CASES; i++) {
        struct random_case *c = &cases[i];
        fill_case(c, (uint64_t)(8000 + i));
        forwards[i] = draw(backend, c->logits, c->vocab, &c->params, c->history, c->n_prompt,
                           c->n_history, c->position).token;
    }
    for (int i = CASES - 1; i >= 0; i--) {
        struct random_case *c = &cases[i];
        c->params.n_logprobs = i % 5; /* nor do log-probabilities */
        struct backend *fresh = i % 2 ? backend : open_backend();
        int32_t got = draw(fresh, c->logits, c->vocab, &c->params, c->history, c->n_prompt,
                           c->n_history, c->position).token;
        if (fresh != backend) backend_destroy(fresh);
        cr_assert_eq(got, forwards[i], "case %d: %d, then %d", i, forwards[i], got);
        free(c->logits);
    }
    backend_destroy(backend);
}

Test(sample, seed_and_position_choose_the_draw) {
    enum { VOCAB = 64, DRAWS = 200 };
    struct backend *backend = open_backend();
    float logits[VOCAB] = {0};
    struct sample_params params = plain_params(1), other = plain_params(1);
    other.seed = 43;
    int same_seed = 0, same_position = 0;
    for (int p = 0; p < DRAWS; p++) {
        int32_t token = draw_plain(backend, logits, VOCAB, &params, p);
        cr_assert_eq(token, draw_plain(backend, logits, VOCAB, &params, p));
        same_seed += token == draw_plain(backend, logits, VOCAB, &other, p);
        same_position += token == draw_plain(backend, logits, VOCAB, &params, p + 1);
    }
    cr_assert(same_seed < 20 && same_position < 20, "%d, %d of %d", same_seed, same_position,
              DRAWS);
    backend_destroy(backend);
}

/* --- filters ---------------------------------------------------------------------------------- */

/* Which of the ids are ever drawn, over many positions at a high temperature. */
static unsigned drawn_ids(struct backend *backend, const float *logits, int vocab,
                          const struct sample_params *params) {
    unsigned ids = 0;
    for (int p = 0; p < 3000; p++) ids |= 1u << draw_plain(backend, logits, vocab, params, p);
    return ids;
}

/* Probabilities 0.4, 0.3, 0.2, 0.1 in another order: id 2, 0, 3, 1. */
static const float four[4] = {-1.2039728f, -2.3025851f, -0.91629073f, -1.6094379f};

Test(sample, top_k_keeps_the_k_largest) {
    struct backend *backend = open_backend();
    static const unsigned expected[] = {0xf, 0x4, 0x5, 0xd, 0xf, 0xf};
    for (int k = 0; k < 6; k++) {
        struct sample_params params = plain_params(1);
        params.top_k = k;
        cr_assert_eq(drawn_ids(backend, four, 4, &params), expected[k], "k %d", k);
    }
    float equal[5] = {1, 2, 2, 2, 0};
    struct sample_params params = plain_params(1);
    params.top_k = 2;
    cr_assert_eq(drawn_ids(backend, equal, 5, &params), 0x6u, "lower ids of equals");
    backend_destroy(backend);
}

Test(sample, top_p_keeps_the_shortest_run_that_reaches_p) {
    struct backend *backend = open_backend();
    static const struct {
        float p;
        unsigned ids;
    } cases[] = {{0.01f, 0x4}, {0.39f, 0x4}, {0.41f, 0x5}, {0.69f, 0x5},
                 {0.71f, 0xd}, {0.89f, 0xd}, {0.91f, 0xf}, {1, 0xf}};
    for (int i = 0; i < 8; i++) {
        struct sample_params params = plain_params(1);
        params.top_p = cases[i].p;
        cr_assert_eq(drawn_ids(backend, four, 4, &params), cases[i].ids, "p %g", cases[i].p);
    }
    /* After top-k 2 the two have 4/7 and 3/7: 0.56 keeps one, 0.58 both. */
    struct sample_params params = plain_params(1);
    params.top_k = 2;
    params.top_p = 0.56f;
    cr_assert_eq(drawn_ids(backend, four, 4, &params), 0x4u);
    params.top_p = 0.58f;
    cr_assert_eq(drawn_ids(backend, four, 4, &params), 0x5u);
    backend_destroy(backend);
}

Test(sample, min_p_is_relative_to_the_largest_after_the_temperature) {
    struct backend *backend = open_backend();
    struct sample_params params = plain_params(1);
    params.min_p = 0.49f; /* of 0.4: at least 0.196 */
    cr_assert_eq(drawn_ids(backend, four, 4, &params), 0xdu);
    params.min_p = 0.51f;
    cr_assert_eq(drawn_ids(backend, four, 4, &params), 0x5u);
    params.min_p = 1;
    cr_assert_eq(drawn_ids(backend, four, 4, &params), 0x4u);
    params.temperature = 2; /* ratios become square roots: 0.25 -> 0.5 */
    params.min_p = 0.49f;
    cr_assert_eq(drawn_ids(backend, four, 4, &params), 0xfu);
    backend_destroy(backend);
}

/* --- bias, bans, penalties -------------------------------------------------------------------- */

/* The order in which ids win under greedy, one ban at a time. */
static void check_ranking(struct backend *backend, struct sample_params params, const float *logits,
                          int vocab, const int32_t *history, int n_prompt, int n_history,
                          const int32_t *expected) {
    int32_t banned[8];
    params.banned = banned;
    for (int i = 0; i < vocab; i++) {
        params.n_banned = i;
        int32_t token =
            draw(backend, logits, vocab, &params, history, n_prompt, n_history, 1).token;
        cr_assert_eq(token, expected[i], "place %d: %d, expected %d", i, token, expected[i]);
        banned[i] = token;
    }
}

Test(sample, penalties_weigh_prompt_and_output_as_documented) {
    struct backend *backend = open_backend();
    /* prompt: 0, 1; output: 1, 2, 2. */
    static const int32_t history[] = {0, 1, 1, 2, 2};
    struct sample_params params = plain_params(0);
    /* Divides 0, 1 by 2 and multiplies the negative 2: {4, 3, -2, 3.5}. */
    params.repetition_penalty = 2;
    static const float repeated[] = {8, 6, -1, 3.5f};
    check_ranking(backend, params, repeated, 4, history, 2, 5, (const int32_t[]){0, 3, 1, 2});
    /* Only the output counts: {8, 6 - 1.5, 7 - 1.5, 5}. */
    params = plain_params(0);
    params.presence_penalty = 1.5f;
    static const float present[] = {8, 6, 7, 5};
    check_ranking(backend, params, present, 4, history, 2, 5, (const int32_t[]){0, 2, 3, 1});
    /* Once for each occurrence: {8, 6 - 1.5, 7 - 3, 4.2}. */
    params = plain_params(0);
    params.frequency_penalty = 1.5f;
    static const float frequent[] = {8, 6, 7, 4.2f};
    check_ranking(backend, params, frequent, 4, history, 2, 5, (const int32_t[]){0, 1, 3, 2});
    /* Bias comes first, and is divided too: {(1 + 9) / 2, 4.9}. */
    params = plain_params(0);
    params.repetition_penalty = 2;
    struct sample_bias bias[] = {{0, 9}};
    params.bias = bias;
    params.n_bias = 1;
    static const float biased[] = {1, 9.9f, -9, 4.9f};
    check_ranking(backend, params, biased, 4, history, 2, 5, (const int32_t[]){0, 1, 3, 2});
    backend_destroy(backend);
}

Test(sample, bias_moves_and_a_ban_is_absolute) {
    struct backend *backend = open_backend();
    float logits[] = {5, 4, 3, 2, 1};
    struct sample_bias bias[] = {{3, 50}, {0, -100}, {77, 1000}, {-1, 1000}};
    int32_t banned[] = {3, 1, 900, -5};
    for (int temperature = 0; temperature < 2; temperature++) {
        struct sample_params params = plain_params((float)temperature);
        params.bias = bias;
        params.n_bias = 4; /* two of them are not in the vocabulary */
        cr_assert_eq(draw_plain(backend, logits, 5, &params, 9), 3);
        params.banned = banned;
        params.n_banned = 4;
        for (int p = 0; p < 300; p++) {
            int32_t token = draw_plain(backend, logits, 5, &params, p);
            cr_assert(token == 2 || (temperature && token == 4), "%d", token);
        }
    }
    backend_destroy(backend);
}

/* --- log-probabilities ------------------------------------------------------------------------ */

static void check_logprobs(struct backend *backend, int vocab, int n_logprobs, uint64_t seed) {
    struct test_random random = {seed};
    float *logits = random_floats(&random, (size_t)vocab, -12, 12);
    if (seed % 2) logits[vocab / 2] = logits[0]; /* a tie */
    struct sample_params params = plain_params(0.7f);
    struct sample_bias bias = {vocab / 3, 20}; /* changes the draw, not the log-probabilities */
    params.bias = &bias;
    params.n_bias = 1;
    params.n_logprobs = n_logprobs;
    struct sample_result result = draw(backend, logits, vocab, &params, NULL, 0, 0, (int64_t)seed);
    double largest = logits[reference_argmax(logits, vocab)], sum = 0;
    for (int v = 0; v < vocab; v++) sum += exp(logits[v] - largest);
    double total = largest + log(sum);
    double bound = 1e-5;
    cr_assert(fabs(result.logprob - (logits[result.token] - total)) < bound, "seed %llu",
              (unsigned long long)seed);
    cr_assert_eq(result.n_top, n_logprobs < vocab ? n_logprobs : vocab);
    int32_t *ids = calloc((size_t)vocab, sizeof *ids);
    reference_sort(ids, logits, vocab);
    double mass = 0;
    for (int i = 0; i < result.n_top; i++) {
        cr_assert_eq(result.top_token[i], ids[i], "seed %llu place %d", (unsigned long long)seed,
                     i);
        cr_assert(fabs(result.top_logprob[i] - (logits[ids[i]] - total)) < bound);
        mass += exp((double)result.top_logprob[i]);
        if (ids[i] == result.token) cr_assert_eq(result.top_logprob[i], result.logprob);
    }
    if (n_logprobs >= vocab) cr_assert(fabs(mass - 1) < 1e-5, "they sum to %.9g", mass);
    free(ids), free(logits);
}

Test(sample, logprobs_are_of_the_raw_logits) {
    static const int vocabs[] = {1, 2, 5, 16, 20, 37, 1000};
    struct backend *backend = open_backend();
    for (int i = 0; i < 7; i++) {
        for (int n = 0; n <= SAMPLE_MAX_LOGPROBS; n += 5) {
            check_logprobs(backend, vocabs[i], n, (uint64_t)(100 * i + n));
        }
    }
    struct sample_params params = plain_params(0);
    float logits[3] = {1, 2, 3};
    cr_assert_eq(draw(backend, logits, 3, &params, NULL, 0, 0, 1).n_top, 0);
    backend_destroy(backend);
}

/* --- hard logits ------------------------------------------------------------------------------ */

Test(sample, a_tiny_temperature_is_greedy) {
    struct backend *backend = open_backend();
    struct test_random random = {5};
    static const float temperatures[] = {1e-3f, 1e-10f, 1e-30f, 1e-44f};
    for (int i = 0; i < 200; i++) {
        float *logits = random_floats(&random, 101, -1e4f, 1e4f);
        for (int filter = 0; filter < 2; filter++) {
            struct sample_params params = plain_params(temperatures[i % 4]);
            params.top_p = filter ? 0.9f : 1;
            params.min_p = filter ? 0.1f : 0;
            params.top_k = filter ? 50 : 0;
            cr_assert_eq(draw_plain(backend, logits, 101, &params, i),
                         reference_argmax(logits, 101), "case %d filter %d", i, filter);
        }
        free(logits);
    }
    backend_destroy(backend);
}

Test(sample, nan_and_infinity_give_a_token_that_is_no_nan) {
    enum { VOCAB = 9 };
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 0, 1};
    struct backend *backend = open_backend();
    for (uint64_t seed = 0; seed < 4000; seed++) {
        struct test_random random = {seed};
        float logits[VOCAB];
        bool any_number = false;
        for (int v = 0; v < VOCAB; v++) {
            logits[v] = odd[random_below(&random, 7)];
            any_number |= logits[v] > -INFINITY;
        }
        struct sample_params params = plain_params((float)random_below(&random, 3));
        if (random_below(&random, 2)) params.top_p = 0.5f;
        if (random_below(&random, 2)) params.top_k = 3;
        if (random_below(&random, 2)) params.min_p = 0.2f;
        params.n_logprobs = random_below(&random, 4) - 1;
        int32_t token = draw(backend, logits, VOCAB, &params, NULL, 0, 0, 1).token;
        cr_assert(token >= 0 && token < VOCAB, "seed %llu: %d", (unsigned long long)seed, token);
        cr_assert(!any_number || logits[token] > -INFINITY, "seed %llu: token %d has logit %g",
                  (unsigned long long)seed, token, logits[token]);
    }
    backend_destroy(backend);
}

/* --- the distribution ------------------------------------------------------------------------- */

/* The 0.9999 quantiles of chi-square with 1..11 degrees of freedom; seeds fix the draws. */
static const double chi_square_limit[] = {0,     15.14, 18.42, 21.11, 23.51, 25.74,
                                          27.86, 29.88, 31.83, 33.72, 35.56, 37.37};

static void check_distribution(struct backend *backend, int vocab, float temperature, int filter,
                               uint64_t seed) {
    enum { DRAWS = 20000 };
    struct test_random random = {seed};
    float *logits = random_floats(&random, (size_t)vocab, -1.5f, 1.5f);
    struct sample_params params = plain_params(temperature);
    params.seed = seed * 0x9e3779b97f4a7c15u;
    if (filter == 1) params.top_k = vocab / 2;
    if (filter == 2) params.top_p = 0.8f;
    if (filter == 3) params.min_p = 0.3f;
    int counts[12] = {0};
    for (int p = 0; p < DRAWS; p++) counts[draw_plain(backend, logits, vocab, &params, p)]++;
    bool allowed[12];
    for (int v = 0; v < vocab; v++) logits[v] /= temperature;
    reference_filter(allowed, logits, vocab, &params);
    double total = 0, chi_square = 0;
    int freedom = -1;
    for (int v = 0; v < vocab; v++) total += allowed[v] ? exp((double)logits[v]) : 0;
    for (int v = 0; v < vocab; v++) {
        if (!allowed[v]) {
            cr_assert_eq(counts[v], 0, "seed %llu: %d was filtered", (unsigned long long)seed, v);
            continue;
        }
        double expected = DRAWS * exp((double)logits[v]) / total;
        chi_square += (counts[v] - expected) * (counts[v] - expected) / expected;
        freedom++;
    }
    cr_assert(chi_square <= chi_square_limit[freedom],
              "seed %llu vocab %d T %g filter %d: chi-square %.2f with %d degrees of freedom",
              (unsigned long long)seed, vocab, temperature, filter, chi_square, freedom);
    free(logits);
}

Test(sample, draws_follow_the_softmax) {
    static const float temperatures[] = {0.7f, 1, 1.5f};
    struct backend *backend = open_backend();
    for (int vocab = 5; vocab <= 12; vocab++) {
        for (int t = 0; t < 3; t++) {
            for (int filter = 0; filter < 4; filter++) {
                check_distribution(backend, vocab, temperatures[t], filter,
                                   (uint64_t)(vocab * 100 + t * 10 + filter));
            }
        }
    }
    backend_destroy(backend);
}
