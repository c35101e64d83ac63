/* The rejection rule's pieces: the distribution that is sampled, the acceptance test, the
 * residual. Each is held against the definition or against counts of many draws (law.c holds the
 * whole against a toy). */
#include "tests/unit/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"
#include "tests/reference/random.h"
#include "worker/spec/accept.h"

enum { VOCAB = 40, N_DRAWS = 40000 };

static struct backend *open_backend(void) {
    struct backend_options options = {BACKEND_AUTO, 1, 1, 64, 0};
    struct backend *backend;
    struct error err;
    cr_assert_eq(backend_create(&backend, &options, &err), STATUS_OK, "%s", err.text);
    return backend;
}

static void fill(float *logits, uint64_t seed) {
    struct test_random random = {seed};
    for (int i = 0; i < VOCAB; i++) logits[i] = random_f32(&random, -3, 3);
}

/* backend_distribution is the law of the draw, whatever the filters. */
Test(distribution, is_what_is_sampled) {
    static const struct sample_params kinds[] = {
        {.temperature = 1, .top_p = 1, .repetition_penalty = 1},
        {.temperature = 0.6f, .top_p = 0.8f, .repetition_penalty = 1},
        {.temperature = 1.3f, .top_p = 1, .top_k = 5, .repetition_penalty = 1},
        {.temperature = 0.9f, .top_p = 1, .min_p = 0.1f, .repetition_penalty = 1.4f,
         .presence_penalty = 0.6f, .frequency_penalty = 0.3f},
        {.temperature = 0, .top_p = 1, .repetition_penalty = 1},
    };
    struct backend *backend = open_backend();
    int32_t history[] = {3, 4, 4, 9, 20};
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
        float raw[VOCAB], logits[VOCAB], p[VOCAB];
        double counts[VOCAB] = {0}, sum = 0, chi = 0;
        int n_possible = 0;
        struct sample_params params = kinds[kind];
        params.n_logprobs = -1;
        fill(raw, 100 + kind);
        memcpy(logits, raw, sizeof raw);
        struct sample_draw draw = {&params, history, 2, 5, 5, -1, false};
        struct error err;
        cr_assert_eq(backend_distribution(backend, p, logits, VOCAB, &draw, &err), STATUS_OK);
        cr_assert_arr_eq(logits, raw, sizeof raw, "the logits stay");
        for (int i = 0; i < N_DRAWS; i++) {
            struct sample_result result;
            memcpy(logits, raw, sizeof raw);
            params.seed = (uint64_t)i * 7919 + 1;
            backend_sample_begin(backend, logits, VOCAB, VOCAB, &draw, 1);
            cr_assert_eq(backend_sample_end(backend, &result, &err), STATUS_OK);
            counts[result.token]++;
        }
        for (int v = 0; v < VOCAB; v++) {
            double wanted = (double)p[v] * N_DRAWS;
            sum += (double)p[v];
            cr_assert(p[v] > 0 || counts[v] == 0, "kind %zu draws %d, which has no probability",
                      kind, v);
            if (p[v] == 0) continue;
            n_possible++;
            chi += (counts[v] - wanted) * (counts[v] - wanted) / wanted;
        }
        cr_assert(fabs(sum - 1) < 1e-5, "kind %zu sums to %g", kind, sum);
        cr_assert(chi < n_possible + 6 * sqrt(2.0 * n_possible), "kind %zu: chi-square %g of %d", kind,
                  chi, n_possible);
        cr_assert(kinds[kind].top_k == 0 || n_possible == kinds[kind].top_k);
    }
    backend_destroy(backend);
}

Test(logprobs, are_those_of_sampling) {
    struct backend *backend = open_backend();
    struct sample_params params = {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .seed = 5,
                                   .n_logprobs = 4};
    float raw[VOCAB], logits[VOCAB];
    struct sample_result a, b;
    fill(raw, 7);
    memcpy(logits, raw, sizeof raw);
    struct sample_draw draw = {&params, NULL, 0, 0, 0, -1, false};
    struct error err;
    backend_sample_begin(backend, logits, VOCAB, VOCAB, &draw, 1);
    cr_assert_eq(backend_sample_end(backend, &a, &err), STATUS_OK);
    cr_assert_eq(backend_logprobs(backend, &b, raw, VOCAB, 4, a.token, &err), STATUS_OK);
    cr_assert(a.logprob == b.logprob && a.n_top == 4 && b.n_top == 4 && b.token == a.token);
    cr_assert_arr_eq(a.top_token, b.top_token, 4 * sizeof *a.top_token);
    cr_assert_arr_eq(a.top_logprob, b.top_logprob, 4 * sizeof *a.top_logprob);
    backend_destroy(backend);
}

Test(accept, holds_with_probability_p_over_q) {
    static const float pairs[][2] = {{0.2f, 0.8f}, {0.5f, 0.5f}, {0.9f, 0.3f}, {0, 0.4f}, {0.3f, 0.4f}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        float p = pairs[i][0], q = pairs[i][1];
        double n = 0, wanted = p < q ? (double)(p / q) : 1;
        for (int seed = 0; seed < N_DRAWS; seed++) n += accept_by_rejection(p, q, (uint64_t)seed, 17);
        double deviation = sqrt(wanted * (1 - wanted) / N_DRAWS) + 1e-9;
        cr_assert(fabs(n / N_DRAWS - wanted) < 5 * deviation, "%g/%g: %g, not %g", (double)p, (double)q,
                  n / N_DRAWS, wanted);
    }
    int same = 0;
    for (uint64_t seed = 0; seed < 1000; seed++) {
        same += accept_by_rejection(0.5f, 1, seed, 1) == accept_by_rejection(0.5f, 1, seed, 2);
    }
    cr_assert(same > 400 && same < 600, "positions share their uniform: %d of 1000 alike", same);
}

Test(accept, replaces_from_what_is_left) {
    float p[5] = {0.1f, 0.4f, 0.2f, 0.3f, 0}, q[5] = {0.3f, 0.1f, 0.2f, 0.1f, 0.3f};
    double counts[5] = {0}, wanted[5] = {0, 0.6, 0, 0.4, 0};
    for (int seed = 0; seed < N_DRAWS; seed++) counts[accept_residual(p, q, 5, (uint64_t)seed, 3)]++;
    for (int v = 0; v < 5; v++) {
        cr_assert(fabs(counts[v] / N_DRAWS - wanted[v]) < 0.013, "%d: %g", v, counts[v] / N_DRAWS);
        cr_assert(wanted[v] > 0 || counts[v] == 0);
    }
    /* Nothing left of p - q: from p, and never what p does not hold. */
    double zeros = 0;
    for (int seed = 0; seed < 1000; seed++) {
        zeros += accept_residual(p, p, 5, (uint64_t)seed, 3) == 4;
    }
    cr_assert_eq(zeros, 0);
}
