/* Draws on the emulated device, in every scheduling order, against the CPU's: every set of
 * parameters, large vocabularies, ties, odd values, long histories, chains, company. Noise is the
 * same bit for bit, so tokens are equal; only where rounding decides top-p's border may one id come
 * or go, and then the token must stand on that border. */
#include "common/gumbel.h"
#include "tests/reference/emulated.h"
#include "tests/reference/isas.h"
#include "tests/reference/random.h"
#include "tests/reference/sample.h"
#include "tests/unit/test.h"

enum { MAX_DRAWS = 64, LARGE = 128256 };

/* Parameters by bits: all sets of them are tried. */
enum {
    GREEDY = 1,
    MIN_P = 2,
    TOP_K = 4,
    TOP_P = 8,
    REPETITION = 16,
    PRESENCE = 32,
    FREQUENCY = 64,
    BIAS = 128,
    BANNED = 256,
    N_SETS = 512
};

struct machines {
    struct backend *device, *cpu;
};

static void in_every_order(void (*check)(const struct machines *m, uint64_t seed)) {
    if (!computes_here(BACKEND_EMULATED)) {
        cr_skip_test("the emulated device is not built here (x86-64, no thread sanitizer)");
    }
    for (int order = 0; order < EMULATION_ORDERS; order++) {
        emulated_set_order(order, (uint32_t)order + 1);
        struct machines m = {open_backend(BACKEND_EMULATED, 1, MAX_DRAWS, 64), open_backend(BACKEND_PORTABLE, 1, MAX_DRAWS, 64)};
        check(&m, (uint64_t)order * 100000 + 1);
        backend_destroy(m.device);
        backend_destroy(m.cpu);
    }
    emulated_set_order(0, 1);
}

/* --- subjects --------------------------------------------------------------------------------- */

struct subject {
    struct sample_params params;
    struct sample_bias bias[6];
    int32_t banned[5], history[48];
    struct sample_draw draw;
    int vocab;
    float *logits; /* [vocab] */
};

static struct sample_params plain_params(float temperature) {
    return (struct sample_params){.temperature = temperature,
                                  .top_p = 1,
                                  .repetition_penalty = 1,
                                  .seed = 42,
                                  .n_logprobs = -1};
}

/* Spread or narrow, coarse (many ties), with odd values, or all equal. */
static float *random_logits(struct test_random *random, int vocab) {
    int kind = random_below(random, 6);
    float reach = kind == 0 ? 30 : 6;
    float *logits = random_floats(random, (size_t)vocab, -reach, reach);
    for (int v = 0; v < vocab; v++) {
        if (kind == 1) logits[v] = floorf(logits[v] / 4);
        if (kind == 2 && random_below(random, 3) == 0) logits[v] = -INFINITY;
        if (kind == 3 && random_below(random, 3) == 0) logits[v] = NAN;
        if (kind == 4) logits[v] = -2.5f;
    }
    return logits;
}

static void fill_params(struct subject *s, struct test_random *random, int set) {
    struct sample_params *p = &s->params;
    *p = plain_params(set & GREEDY ? 0 : random_f32(random, 0.2f, 2));
    p->seed = random_u64(random);
    if (set & MIN_P) p->min_p = random_f32(random, 0.0001f, 0.3f);
    if (set & TOP_K) p->top_k = 1 + random_below(random, random_below(random, 2) ? s->vocab : 9);
    if (set & TOP_P) p->top_p = random_f32(random, 0.05f, 0.9999f);
    if (set & REPETITION) p->repetition_penalty = random_f32(random, 0.7f, 1.5f);
    if (set & PRESENCE) p->presence_penalty = random_f32(random, -1, 1);
    if (set & FREQUENCY) p->frequency_penalty = random_f32(random, -1, 1);
    p->n_bias = set & BIAS ? 1 + random_below(random, 6) : 0;
    p->n_banned = set & BANNED ? 1 + random_below(random, 5) : 0;
    p->n_logprobs = random_below(random, 3) ? -1 : random_below(random, 21);
    p->bias = s->bias;
    p->banned = s->banned;
}

/* Few ids are biased, so that some are biased twice. Parameters point into the subject. */
static void fill_subject(struct subject *s, int set, int vocab, uint64_t seed) {
    struct test_random random = {seed};
    s->vocab = vocab;
    s->logits = random_logits(&random, vocab);
    for (int i = 0; i < 6; i++) {
        s->bias[i].token = random_below(&random, vocab < 5 ? vocab : 5);
        s->bias[i].bias = random_f32(&random, -4, 4);
    }
    for (int i = 0; i < 5; i++) s->banned[i] = random_below(&random, vocab);
    for (int i = 0; i < 48; i++) s->history[i] = random_below(&random, vocab < 40 ? vocab : 40);
    int n_history = random_below(&random, 49);
    fill_params(s, &random, set);
    s->draw = (struct sample_draw){.params = &s->params,
                                   .history = s->history,
                                   .n_prompt = random_below(&random, n_history + 1),
                                   .n_history = n_history,
                                   .position = (int64_t)(random_u64(&random) >> 1),
                                   .candidate = -1};
}

/* Of a copy of the logits. */
static struct sample_result draw_on(struct backend *backend, const float *logits, int vocab,
                                    const struct sample_draw *draw) {
    float *row = xmalloc((size_t)vocab * sizeof *row);
    struct sample_result result;
    struct error err = {0};
    memset(&result, 0x7f, sizeof result);
    memcpy(row, logits, (size_t)vocab * sizeof *row);
    backend_sample_begin(backend, row, vocab, vocab, draw, 1);
    cr_assert_eq(backend_sample_end(backend, &result, &err), STATUS_OK, "%s", err.text);
    cr_assert(result.made);
    free(row);
    return result;
}

/* --- comparison ------------------------------------------------------------------------------- */

static bool near(float a, float b, float relative) {
    if (a == b || (isnan(a) && isnan(b))) return true;
    return fabsf(a - b) <= relative * fmaxf(1, fabsf(b));
}

static const float *sorted_by;

/* Largest first, lower id first among equals, NaN last. */
static int by_logit(const void *a, const void *b) {
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    float x = isnan(sorted_by[i]) ? -INFINITY : sorted_by[i];
    float y = isnan(sorted_by[j]) ? -INFINITY : sorted_by[j];
    if (x != y) return x > y ? -1 : 1;
    return i < j ? -1 : 1;
}

static int32_t *sorted_ids(const float *logits, int vocab) {
    int32_t *ids = xmalloc((size_t)vocab * sizeof *ids);
    for (int32_t v = 0; v < vocab; v++) ids[v] = v;
    sorted_by = logits;
    qsort(ids, (size_t)vocab, sizeof *ids, by_logit);
    return ids;
}

/* Whether rounding decides if the run that top-p leaves has `token`: what weighs more than it comes
 * to top_p of all, within a millionth. */
static bool on_border(const struct subject *s, int32_t token) {
    const struct sample_params *p = &s->params;
    float *x = xmalloc((size_t)s->vocab * sizeof *x);
    memcpy(x, s->logits, (size_t)s->vocab * sizeof *x);
    reference_changes(x, s->vocab, p, s->history, s->draw.n_prompt, s->draw.n_history);
    int32_t *ids = sorted_ids(x, s->vocab);
    float largest = x[ids[0]];
    float floor = p->min_p > 0 ? gumbel_log(p->min_p) : -INFINITY;
    double total = 0, before = -1;
    for (int i = 0; i < s->vocab && (p->top_k == 0 || i < p->top_k); i++) {
        float scaled = (x[ids[i]] - largest) / p->temperature;
        if (!(scaled >= floor && scaled > -INFINITY)) break;
        if (ids[i] == token) before = total;
        total += (double)gumbel_exp(scaled);
    }
    free(ids);
    free(x);
    return before >= 0 && fabs(before / total - (double)p->top_p) < 1e-6;
}

/* Fails unless both results say the same; true where tokens differ on a border of top-p. */
static bool compare(const struct subject *s, const struct sample_result *ours,
                    const struct sample_result *theirs, uint64_t seed) {
    const struct sample_params *p = &s->params;
    bool differs = ours->token != theirs->token;
    if (differs) {
        bool border = p->top_p < 1 && p->temperature > 0 &&
                      (on_border(s, ours->token) || on_border(s, theirs->token));
        cr_assert(border,
                  "seed %llu, vocab %d T %g k %d p %g min %g, %d biases, %d banned: token %d, the "
                  "CPU drew %d",
                  (unsigned long long)seed, s->vocab, p->temperature, p->top_k, p->top_p, p->min_p,
                  p->n_bias, p->n_banned, ours->token, theirs->token);
    }
    cr_assert_eq(ours->n_top, theirs->n_top, "seed %llu: top %d, %d", (unsigned long long)seed,
                 ours->n_top, theirs->n_top);
    cr_assert(differs || near(ours->logprob, theirs->logprob, 2e-6f),
              "seed %llu: log-probability %.9g, the CPU has %.9g", (unsigned long long)seed,
              ours->logprob, theirs->logprob);
    for (int i = 0; i < ours->n_top; i++) {
        float a = s->logits[ours->top_token[i]], b = s->logits[theirs->top_token[i]];
        cr_assert(near(ours->top_logprob[i], theirs->top_logprob[i], 2e-6f) &&
                      (near(a, b, 2e-6f) || (!(a > -9000) && !(b > -9000))),
                  "seed %llu, top %d: %d with %.9g, the CPU has %d with %.9g",
                  (unsigned long long)seed, i, ours->top_token[i], ours->top_logprob[i],
                  theirs->top_token[i], theirs->top_logprob[i]);
    }
    return differs;
}

static bool compare_subject(const struct machines *m, int set, int vocab, uint64_t seed) {
    struct subject s;
    fill_subject(&s, set, vocab, seed);
    struct sample_result ours = draw_on(m->device, s.logits, vocab, &s.draw);
    struct sample_result theirs = draw_on(m->cpu, s.logits, vocab, &s.draw);
    bool differs = compare(&s, &ours, &theirs, seed);
    free(s.logits);
    return differs;
}

static void all_sets(const struct machines *m, uint64_t seed) {
    static const int vocabs[] = {7, 257, 1, 257, 7, 257, 7, 5000};
    int n_differ = 0;
    for (int set = 0; set < N_SETS; set++) {
        int vocab = vocabs[(set * 5 + set / 8 + (int)(seed / 100000)) % 8];
        n_differ += compare_subject(m, set, vocab, seed + (uint64_t)set);
    }
    cr_assert(n_differ <= 1, "seed %llu: %d of %d draws differ", (unsigned long long)seed, n_differ,
              N_SETS);
}

Test(cuda_sample, every_set_of_parameters) {
    in_every_order(all_sets);
}

static void large(const struct machines *m, uint64_t seed) {
    static const int sets[] = {0, TOP_K, TOP_P, TOP_K | TOP_P | MIN_P, GREEDY};
    int n_differ = 0;
    for (int i = 0; i < 5; i++) n_differ += compare_subject(m, sets[i], LARGE, seed + (uint64_t)i);
    cr_assert(n_differ <= 1, "seed %llu: %d differ", (unsigned long long)seed, n_differ);
}

Test(cuda_sample, a_vocabulary_of_128256) {
    in_every_order(large);
}

/* --- ties ------------------------------------------------------------------------------------- */

/* n draws of one row at positions 0 .. n-1. */
static void draw_many(struct backend *backend, const float *logits, int vocab,
                      const struct sample_params *params, struct sample_result *results, int n) {
    float *rows = xmalloc((size_t)(n * vocab) * sizeof *rows);
    struct sample_draw draws[MAX_DRAWS];
    struct error err = {0};
    for (int i = 0; i < n; i++) {
        memcpy(rows + i * vocab, logits, (size_t)vocab * sizeof *rows);
        draws[i] = (struct sample_draw){.params = params, .position = i, .candidate = -1};
    }
    backend_sample_begin(backend, rows, vocab, vocab, draws, n);
    cr_assert_eq(backend_sample_end(backend, results, &err), STATUS_OK, "%s", err.text);
    free(rows);
}

/* 5 ids of 1500 equal ones, scattered among smaller: exactly the lowest 5 are ever drawn. */
static void equal_at_the_border(const struct machines *m, uint64_t seed) {
    enum { VOCAB = 3000, KEPT = 5 };
    float logits[VOCAB];
    struct sample_result results[MAX_DRAWS];
    for (int v = 0; v < VOCAB; v++) logits[v] = v % 2 ? 3 : -90;
    for (int filter = 0; filter < 2; filter++) {
        struct sample_params params = plain_params(1);
        params.seed = seed;
        if (filter == 0) params.top_k = KEPT;
        else params.top_p = (KEPT - 0.5f) / (VOCAB / 2);
        unsigned drawn = 0;
        draw_many(m->device, logits, VOCAB, &params, results, MAX_DRAWS);
        for (int i = 0; i < MAX_DRAWS; i++) {
            int32_t token = results[i].token;
            cr_assert(token % 2 && token < 2 * KEPT, "seed %llu filter %d: %d",
                      (unsigned long long)seed, filter, token);
            drawn |= 1u << token / 2;
        }
        cr_assert_eq(drawn, (1u << KEPT) - 1, "seed %llu filter %d: not all are drawn",
                     (unsigned long long)seed, filter);
    }
}

Test(cuda_sample, of_equals_at_a_border_the_lowest_stay) {
    in_every_order(equal_at_the_border);
}

/* A high id with the largest logit and a low one with more noise come to the same number. */
static void tied_draws(const struct machines *m, uint64_t seed) {
    enum { LOW = 1, HIGH = 700, VOCAB = 900 };
    struct sample_params params = plain_params(1);
    int n_ties = 0;
    for (int64_t position = (int64_t)seed; n_ties < 8; position++) {
        cr_assert(position < (int64_t)seed + 4000, "%d ties", n_ties);
        uint32_t low[4], high[4];
        gumbel_words(low, params.seed, position, LOW / 4);
        gumbel_words(high, params.seed, position, HIGH / 4);
        float less = gumbel_noise(high[HIGH % 4]), more = gumbel_noise(low[LOW % 4]);
        float logits[VOCAB];
        for (int v = 0; v < VOCAB; v++) logits[v] = -50;
        logits[HIGH] = 0;
        logits[LOW] = less - more;
        if (logits[LOW] >= 0 || logits[LOW] + more != less) continue;
        params.top_k = n_ties++ % 2 ? 4 : 0;
        struct sample_draw draw = {.params = &params, .position = position, .candidate = -1};
        struct sample_result result = draw_on(m->device, logits, VOCAB, &draw);
        cr_assert_eq(result.token, LOW, "position %lld: %d", (long long)position, result.token);
    }
}

Test(cuda_sample, a_tie_of_the_draw_goes_to_the_lowest_token) {
    in_every_order(tied_draws);
}

/* --- odd values ------------------------------------------------------------------------------- */

static void odd_values(const struct machines *m, uint64_t seed) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 0, -0.0f, 1};
    for (uint64_t end = seed + 250; seed < end; seed++) {
        struct test_random random = {seed};
        struct subject s = {.params = plain_params((float)random_below(&random, 3)), .vocab = 9};
        int n_odd = 1 + random_below(&random, 8); /* 1: nothing but NaN; 3: no number above -inf */
        float logits[9];
        for (int v = 0; v < 9; v++) {
            logits[v] = odd[random_below(&random, n_odd)];
            if (n_odd == 3 && logits[v] > 0) logits[v] = NAN;
        }
        if (random_below(&random, 2)) s.params.top_p = 0.5f;
        if (random_below(&random, 2)) s.params.top_k = 3;
        if (random_below(&random, 2)) s.params.min_p = 0.2f;
        s.params.n_logprobs = random_below(&random, 11) - 1;
        s.logits = logits;
        s.draw = (struct sample_draw){.params = &s.params, .position = 1, .candidate = -1};
        struct sample_result ours = draw_on(m->device, logits, 9, &s.draw);
        struct sample_result theirs = draw_on(m->cpu, logits, 9, &s.draw);
        cr_assert_eq(ours.token, theirs.token, "seed %llu: %d, %d on the CPU",
                     (unsigned long long)seed, ours.token, theirs.token);
        compare(&s, &ours, &theirs, seed);
    }
}

Test(cuda_sample, nan_and_infinity_as_on_the_cpu) {
    in_every_order(odd_values);
}

/* --- bias, bans, penalties -------------------------------------------------------------------- */

/* Ids outside the vocabulary are passed over; all banned but one leaves that, all banned id 0. */
static void bans(const struct machines *m, uint64_t seed) {
    enum { VOCAB = 40 };
    static const struct sample_bias outside[] = {{-1, 9}, {VOCAB, 9}, {1 << 30, 9}, {3, 1}};
    struct test_random random = {seed};
    float *logits = random_floats(&random, VOCAB, -5, 5);
    int32_t banned[VOCAB + 2] = {-1, VOCAB};
    for (int i = 0; i < 6; i++) {
        int32_t left = random_below(&random, VOCAB);
        for (int v = 0; v < VOCAB; v++) banned[2 + v] = v == left ? (v + 1) % VOCAB : v;
        struct sample_params params = plain_params((float)(i % 3));
        params.banned = banned;
        params.n_banned = VOCAB + 2;
        params.bias = outside;
        params.n_bias = 4;
        if (i % 2) params.top_p = 0.9f;
        struct sample_draw draw = {.params = &params, .position = i, .candidate = -1};
        cr_assert_eq(draw_on(m->device, logits, VOCAB, &draw).token, left);
        banned[2 + left] = left;
        cr_assert_eq(draw_on(m->device, logits, VOCAB, &draw).token, 0);
    }
    free(logits);
}

Test(cuda_sample, bans_and_ids_outside_the_vocabulary) {
    in_every_order(bans);
}

/* A history longer than what was ever sent, most of it of few tokens; all prompt, all output. */
static void long_histories(const struct machines *m, uint64_t seed) {
    enum { VOCAB = 600, LENGTH = 40000 };
    struct test_random random = {seed};
    int32_t *history = xmalloc(LENGTH * sizeof *history);
    for (int i = 0; i < LENGTH; i++) history[i] = random_below(&random, i % 3 ? 10 : VOCAB - 100);
    static const int prompts[] = {0, 100, LENGTH - 3, LENGTH};
    for (int i = 0; i < 8; i++) {
        struct subject s = {.params = plain_params(i % 2 ? 0.8f : 0), .vocab = VOCAB};
        s.logits = random_floats(&random, VOCAB, -3, 3);
        s.params.repetition_penalty = i % 3 ? 1.2f : 1;
        s.params.presence_penalty = 0.5f;
        s.params.frequency_penalty = 0.01f;
        s.params.n_logprobs = 3;
        s.draw = (struct sample_draw){.params = &s.params, .history = history,
                                      .n_prompt = prompts[i / 2], .n_history = LENGTH,
                                      .position = i};
        struct sample_result ours = draw_on(m->device, s.logits, VOCAB, &s.draw);
        struct sample_result theirs = draw_on(m->cpu, s.logits, VOCAB, &s.draw);
        compare(&s, &ours, &theirs, seed);
        free(s.logits);
    }
    free(history);
}

Test(cuda_sample, long_histories_weigh_as_on_the_cpu) {
    in_every_order(long_histories);
}

/* --- log-probabilities ------------------------------------------------------------------------ */

static void check_logprobs(const struct machines *m, const float *logits, int vocab, int n,
                           uint64_t seed) {
    struct sample_params params = plain_params(0.7f); /* raw: the temperature does not matter */
    params.n_logprobs = n;
    struct sample_draw draw = {.params = &params, .position = n, .candidate = -1};
    struct sample_result result = draw_on(m->device, logits, vocab, &draw), asked;
    struct error err = {0};
    int32_t *ids = sorted_ids(logits, vocab);
    double sum = 0;
    for (int v = 0; v < vocab; v++) sum += exp((double)logits[v]);
    enum status status = backend_logprobs(m->device, &asked, logits, vocab, n, result.token, &err);
    cr_assert_eq(status, STATUS_OK, "%s", err.text);
    cr_assert(asked.token == result.token && asked.n_top == result.n_top);
    cr_assert_arr_eq(&asked.logprob, &result.logprob, sizeof(float));
    cr_assert_eq(result.n_top, n < vocab ? n : vocab, "n_top %d", result.n_top);
    cr_assert(near(result.logprob, (float)((double)logits[result.token] - log(sum)), 3e-6f));
    for (int i = 0; i < result.n_top; i++) {
        cr_assert_eq(result.top_token[i], ids[i], "seed %llu vocab %d top %d: %d, expected %d",
                     (unsigned long long)seed, vocab, i, result.top_token[i], ids[i]);
        cr_assert_eq(asked.top_token[i], ids[i]);
        cr_assert(near(result.top_logprob[i], (float)((double)logits[ids[i]] - log(sum)), 3e-6f));
    }
    free(ids);
}

/* Logits in eighths: equal ones are many, different ones stay different. */
static void logprobs(const struct machines *m, uint64_t seed) {
    static const int vocabs[] = {1, 7, 257};
    struct test_random random = {seed};
    float logits[257];
    for (int i = 0; i < 3; i++) {
        for (int v = 0; v < vocabs[i]; v++) logits[v] = (float)random_below(&random, 80) / 8 - 5;
        for (int n = 0; n <= SAMPLE_MAX_LOGPROBS; n++) {
            check_logprobs(m, logits, vocabs[i], n, seed);
        }
    }
}

Test(cuda_sample, all_numbers_of_logprobs) {
    in_every_order(logprobs);
}

/* --- chains and company ----------------------------------------------------------------------- */

static void check_same(const struct sample_result *a, const struct sample_result *b, int i,
                       uint64_t seed) {
    size_t bytes = (size_t)a->n_top * sizeof *a->top_token;
    cr_assert(a->token == b->token && a->n_top == b->n_top &&
                  memcmp(&a->logprob, &b->logprob, sizeof a->logprob) == 0 &&
                  memcmp(a->top_token, b->top_token, bytes) == 0 &&
                  memcmp(a->top_logprob, b->top_logprob, bytes) == 0,
              "seed %llu: draw %d alone gives %d, in company %d", (unsigned long long)seed, i,
              a->token, b->token);
}

enum { CHAINED_VOCAB = 61, STRIDE = 67 };

/* Chains of any length, also one that continues nothing; candidates mostly right. */
static void link_chains(struct sample_draw *draws, const struct sample_result *alone, int n,
                        struct test_random *random) {
    for (int i = 0; i < n; i++) {
        draws[i].continues = random_below(random, 4) != 0;
        int kind = random_below(random, 5);
        draws[i].candidate = kind == 0 ? -1 : alone[i].token;
        if (kind == 1) draws[i].candidate = (alone[i].token + 1) % CHAINED_VOCAB;
    }
}

static void chains(const struct machines *m, uint64_t seed) {
    struct test_random random = {seed};
    static struct subject subjects[MAX_DRAWS];
    static float rows[MAX_DRAWS * STRIDE];
    struct sample_draw draws[MAX_DRAWS];
    struct sample_result alone[MAX_DRAWS], together[MAX_DRAWS];
    struct error err = {0};
    for (int i = 0; i < MAX_DRAWS; i++) {
        int set = random_below(&random, N_SETS);
        fill_subject(&subjects[i], set, CHAINED_VOCAB, random_u64(&random));
        alone[i] = draw_on(m->device, subjects[i].logits, CHAINED_VOCAB, &subjects[i].draw);
    }
    for (int trial = 0; trial < 4; trial++) {
        int n = trial == 0 ? MAX_DRAWS : 1 + random_below(&random, MAX_DRAWS);
        for (int i = 0; i < n; i++) {
            draws[i] = subjects[i].draw;
            memcpy(rows + i * STRIDE, subjects[i].logits, CHAINED_VOCAB * sizeof *rows);
        }
        link_chains(draws, alone, n, &random);
        backend_sample_begin(m->device, rows, STRIDE, CHAINED_VOCAB, draws, n);
        cr_assert_eq(backend_sample_end(m->device, together, &err), STATUS_OK, "%s", err.text);
        bool goes_on = false;
        for (int i = 0; i < n; i++) {
            bool made = !draws[i].continues || goes_on;
            cr_assert_eq(together[i].made, made, "seed %llu: draw %d", (unsigned long long)seed, i);
            if (made) check_same(&alone[i], &together[i], i, seed);
            goes_on = made && alone[i].token == draws[i].candidate;
        }
    }
    for (int i = 0; i < MAX_DRAWS; i++) free(subjects[i].logits);
}

Test(cuda_sample, chains_end_at_their_first_miss_and_company_changes_no_bit) {
    in_every_order(chains);
}

/* Batches one after another that nobody waits for, more of them than there is staging, each with
 * more to send than the one before. */
static void batches(const struct machines *m, uint64_t seed) {
    enum { BATCHES = 11, VOCAB = 80 };
    struct test_random random = {seed};
    float *logits = random_floats(&random, BATCHES * VOCAB, -4, 4);
    int32_t expected[BATCHES], fed[BATCHES * BACKEND_MAX_FED];
    struct error err = {0};
    for (int pass = 0; pass < 2; pass++) {
        for (int b = 0; b < BATCHES; b++) {
            int n_history = 5000 * b;
            int32_t *history = xcalloc((size_t)n_history + 1, sizeof *history);
            for (int i = 0; i < n_history; i++) history[i] = random_below(&random, 5) + b;
            struct sample_params params = plain_params(1);
            params.presence_penalty = 1e6f;
            struct sample_draw draw = {.params = &params, .history = history,
                                       .n_history = n_history, .position = b, .candidate = -1};
            expected[b] = draw_on(m->cpu, logits + b * VOCAB, VOCAB, &draw).token;
            float row[VOCAB];
            memcpy(row, logits + b * VOCAB, sizeof row);
            backend_sample_begin(m->device, row, VOCAB, VOCAB, &draw, 1);
            free(history);
        }
        cr_assert_eq(backend_fed_tokens(m->device, fed, BATCHES, &err), STATUS_OK, "%s", err.text);
        for (int b = 0; b < BATCHES; b++) {
            cr_assert_eq(fed[b * BACKEND_MAX_FED], expected[b], "seed %llu: batch %d",
                         (unsigned long long)seed, b);
        }
    }
    free(logits);
}

Test(cuda_sample, batches_that_nobody_waits_for) {
    in_every_order(batches);
}

/* --- the distribution ------------------------------------------------------------------------- */

/* Every id as on the CPU, unless top-p's border is decided by rounding. */
static void check_distribution(const struct machines *m, int set, int vocab, uint64_t seed) {
    struct subject s;
    fill_subject(&s, set, vocab, seed);
    for (int v = 0; v < vocab; v++) s.logits[v] = (float)(v * 7919 % 1009) / 100 - 5;
    float *p = xcalloc((size_t)vocab, sizeof *p), *q = xcalloc((size_t)vocab, sizeof *q);
    float *before = xmalloc((size_t)vocab * sizeof *before);
    struct error err = {0};
    double sum = 0;
    memcpy(before, s.logits, (size_t)vocab * sizeof *before);
    cr_assert_eq(backend_distribution(m->device, p, s.logits, vocab, &s.draw, &err), STATUS_OK);
    cr_assert_arr_eq(s.logits, before, (size_t)vocab * sizeof *before, "the logits stay");
    cr_assert_eq(backend_distribution(m->cpu, q, s.logits, vocab, &s.draw, &err), STATUS_OK);
    for (int v = 0; v < vocab; v++) {
        sum += (double)p[v];
        bool border = s.params.top_p < 1 && (p[v] > 0) != (q[v] > 0) && on_border(&s, v);
        cr_assert(near(p[v], q[v], 1e-6f) || border, "seed %llu: %d has %.9g, %.9g on the CPU",
                  (unsigned long long)seed, v, p[v], q[v]);
    }
    cr_assert(fabs(sum - 1) < 1e-6, "seed %llu: the sum is %.9g", (unsigned long long)seed, sum);
    struct sample_result drawn = draw_on(m->device, s.logits, vocab, &s.draw);
    cr_assert(p[drawn.token] > 0, "seed %llu: %d was drawn", (unsigned long long)seed, drawn.token);
    free(s.logits), free(before), free(p), free(q);
}

static void distributions(const struct machines *m, uint64_t seed) {
    static const int vocabs[] = {1, 7, 257, 1000};
    for (int i = 0; i < 64; i++) {
        check_distribution(m, i * 8 + i / 8, vocabs[i % 4], seed + (uint64_t)i);
    }
}

Test(cuda_sample, distributions_are_the_cpus) {
    in_every_order(distributions);
}
