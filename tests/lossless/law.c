/* `law`: what is drawn follows the target's distribution. A toy of 5 tokens, whose next token
 * depends on the last one; rounds by the real round.h, so that PRE, POST and the border between
 * them are crossed; draws by the real accept.h, gumbel.h and backend_distribution. Chi-square over
 * all texts of three tokens. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/gumbel.h"
#include "common/spec_mode.h"
#include "tests/lossless/parts.h"
#include "worker/spec/accept.h"
#include "worker/spec/round.h"

enum { V = 5, LENGTH = 4, N_TEXTS = V * V * V };

/* Rows are distributions of the next token after each token; 0 starts. */
static const float target[V][V] = {{0.35f, 0.30f, 0.20f, 0.10f, 0.05f},
                                   {0.05f, 0.15f, 0.50f, 0.20f, 0.10f},
                                   {0.25f, 0.25f, 0.25f, 0.15f, 0.10f},
                                   {0.60f, 0.10f, 0.10f, 0.10f, 0.10f},
                                   {0.02f, 0.08f, 0.10f, 0.30f, 0.50f}};
static const float draft[V][V] = {{0.50f, 0.10f, 0.20f, 0.10f, 0.10f},
                                  {0.10f, 0.30f, 0.30f, 0.20f, 0.10f},
                                  {0.10f, 0.40f, 0.30f, 0.10f, 0.10f},
                                  {0.40f, 0.30f, 0.10f, 0.10f, 0.10f},
                                  {0.10f, 0.10f, 0.20f, 0.20f, 0.40f}};

/* argmax of log p + Gumbel noise: the coupled draw of both sides. */
static int32_t coupled(const float *p, uint64_t seed, int64_t position) {
    uint32_t words[8];
    gumbel_words(words, seed, position, 0);
    gumbel_words(words + 4, seed, position, 1);
    int32_t best = 0;
    float most = -INFINITY;
    for (int v = 0; v < V; v++) {
        float score = logf(p[v]) + gumbel_noise(words[v]);
        if (score > most) {
            most = score;
            best = v;
        }
    }
    return best;
}

struct toy {
    enum sampling_rule rule;
    uint64_t seed;
    int32_t tokens[LENGTH + 1 + 32]; /* a start token, committed ones, candidates */
    int n_committed, tail;
    bool shares_uniform; /* as published PEARL code does: behind a pre-verify the next token is judged by
                            the same uniform */
    bool after_pre;
    uint64_t n_pre_to_post, n_fallen; /* over all runs */
};

/* The target's token at the next place, and whether the candidate standing there is it. */
static int32_t decide(struct toy *toy, bool judged, bool *holds) {
    int position = toy->n_committed;
    int32_t last = toy->tokens[position - 1], x = toy->tokens[position];
    if (!judged || toy->rule == SAMPLING_COUPLED) {
        int32_t y = coupled(target[last], toy->seed, position);
        *holds = judged && x == y;
        return y;
    }
    int judged_by = toy->shares_uniform && toy->after_pre ? position - 1 : position;
    toy->after_pre = false;
    *holds = accept_by_rejection(target[last][x], draft[last][x], toy->seed, judged_by);
    if (*holds) return x;
    return accept_residual(target[last], draft[last], V, toy->seed, position);
}

static void run_round(struct toy *toy, int window, int wait) {
    struct round_plan plan = round_plan(toy->tail, window, wait, LENGTH + 1);
    for (int i = 0; i < plan.make; i++) {
        int position = toy->n_committed + toy->tail + i;
        toy->tokens[position] = coupled(draft[toy->tokens[position - 1]], toy->seed, position);
    }
    int accepted = 0, judged = round_judged(plan);
    for (int row = 0; row < round_rows(plan); row++) {
        bool holds;
        toy->tokens[toy->n_committed] = decide(toy, row < judged, &holds);
        toy->n_committed++;
        accepted += holds;
        if (!holds) break;
    }
    int tail = round_settle(plan, accepted).tail;
    toy->after_pre = toy->tail == 0 && tail > 0;
    toy->n_pre_to_post += toy->after_pre;
    toy->n_fallen += accepted < judged;
    toy->tail = tail;
}

/* Chi-square of the first three tokens over `n` seeds; window and wait are the mode. */
static double chi_square(struct toy *toy, int window, int wait, int n, uint64_t seed) {
    static double counts[N_TEXTS];
    memset(counts, 0, sizeof counts);
    for (int i = 0; i < n; i++) {
        toy->seed = seed + (uint64_t)i * 0x9e3779b97f4a7c15u;
        toy->tokens[0] = 0;
        toy->n_committed = 1;
        toy->tail = 0;
        toy->after_pre = false;
        while (toy->n_committed < LENGTH) run_round(toy, window, wait);
        counts[(toy->tokens[1] * V + toy->tokens[2]) * V + toy->tokens[3]]++;
    }
    double chi = 0;
    for (int a = 0; a < V; a++) {
        for (int b = 0; b < V; b++) {
            for (int c = 0; c < V; c++) {
                double wanted = (double)target[0][a] * (double)target[a][b] * (double)target[b][c] * n;
                double delta = counts[(a * V + b) * V + c] - wanted;
                chi += delta * delta / wanted;
            }
        }
    }
    return chi;
}

/* 124 degrees of freedom: mean 124, standard deviation 15.7; 6 deviations are never chance. */
static bool follows(double chi) {
    return chi < N_TEXTS - 1 + 6 * sqrt(2.0 * (N_TEXTS - 1));
}

int part_law(const struct part_options *options) {
    static const struct {
        const char *name;
        int window, wait;
    } modes[] = {{"plain", 0, 0}, {"sd", 3, 3}, {"pearl", 3, 0}, {"pearl, delay 1", 3, 1},
                 {"pearl, window 1", 1, 0}};
    int n = options->full ? 2000000 : 200000, failures = 0;
    for (int rule = 0; rule < 2; rule++) {
        for (size_t m = 0; m < sizeof modes / sizeof *modes; m++) {
            struct toy toy = {.rule = (enum sampling_rule)rule};
            double chi = chi_square(&toy, modes[m].window, modes[m].wait, n, options->seed);
            bool good = follows(chi);
            bool crossed = modes[m].window <= 1 || modes[m].wait == modes[m].window ||
                           (toy.n_pre_to_post > 0 && toy.n_fallen > 0);
            printf("%s, %s: chi-square %.1f of 124 degrees, %llu times PRE to POST, %llu falls%s\n",
                   rule == SAMPLING_COUPLED ? "coupled" : "rejection", modes[m].name, chi,
                   (unsigned long long)toy.n_pre_to_post, (unsigned long long)toy.n_fallen,
                   good && crossed ? "" : ": FAILED");
            failures += !good + !crossed;
        }
    }
    /* The test sees a wrong law: the flaw of the published code, over the PRE to POST border. */
    struct toy flawed = {.rule = SAMPLING_REJECTION, .shares_uniform = true};
    double chi = chi_square(&flawed, 3, 0, n, options->seed);
    printf("a uniform shared by two tokens: chi-square %.1f%s\n", chi,
           follows(chi) ? ": FAILED to see it" : ", seen as wrong");
    return failures + follows(chi);
}
