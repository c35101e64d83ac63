/* From rows of logits to tokens: bias, penalties, bans, temperature, min-p, top-k, top-p, the coupled draw.
 *
 * Idea: a block has one row and walks over it a few times; nothing is sorted. Which ids may be drawn is
 * "key above a threshold, or equal to it with a low enough id", and the thresholds of top-k and top-p
 * are found digit by digit (radix select) from counts and from probability masses. Masses are integers
 * (units of 2^-40 of the largest), so their sums have no order: the result is a function of the row,
 * whatever the number of threads. Noise is common/gumbel.h's, bit for bit the CPU's.
 *
 * Bytes: the row, from the second-level cache, 3 times without filters, up to 13 times with them. */
#include "common/gumbel.h"
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/sample.h"

enum { THREADS = 512, WARPS = THREADS / 32, BINS = 256 };

#define LOGPROB_MIN (-9999.0f)
#define MASS_UNIT 1099511627776.0f /* 2^40 */

typedef unsigned long long mass_t;

/* Order of floats as order of integers; NaN lowest, the zeros equal. 0 is no number's key. */
static __device__ __forceinline__ uint32_t key_of(float x) {
    if (x != x) return 0;
    uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ bool is_finite(float x) {
    return x - x == 0;
}

/* The larger key wins, then the lower id. */
static __device__ __forceinline__ mass_t rank_of(float x, int id) {
    return (mass_t)key_of(x) << 32 | (uint32_t)~id;
}
static __device__ __forceinline__ int id_of(mass_t rank) {
    return (int)~(uint32_t)rank;
}

struct shared_row {
    mass_t masses[BINS];
    mass_t warps[WARPS];
    double sums[WARPS];
    uint32_t counts[WARPS];
    mass_t found;
    mass_t above;
    int digit, limit;
};

static __device__ __forceinline__ mass_t block_max(mass_t v, struct shared_row *sh) {
    for (int with = 16; with > 0; with /= 2) {
        mass_t other = __shfl_xor_sync(~0u, v, with);
        v = other > v ? other : v;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) sh->warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = sh->warps[0];
    for (int w = 1; w < WARPS; w++) v = sh->warps[w] > v ? sh->warps[w] : v;
    return v;
}

static __device__ __forceinline__ mass_t block_mass(mass_t v, struct shared_row *sh) {
    for (int with = 16; with > 0; with /= 2) v += __shfl_xor_sync(~0u, v, with);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sh->warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < WARPS; w++) v += sh->warps[w];
    return v;
}

static __device__ __forceinline__ double block_double(double v, struct shared_row *sh) {
    for (int with = 16; with > 0; with /= 2) v += __shfl_xor_sync(~0u, v, with);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sh->sums[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < WARPS; w++) v += sh->sums[w];
    return v;
}

/* --- log-probabilities of the raw logits ------------------------------------------------------------ */

static __device__ __forceinline__ float log_sum_exp(const float *logits, int vocab, struct shared_row *sh) {
    mass_t best = 0;
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        mass_t rank = rank_of(logits[v], v);
        best = rank > best ? rank : best;
    }
    best = block_max(best, sh);
    float largest = best >> 32 != 0 ? logits[id_of(best)] : -INFINITY;
    double sum = 0;
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        sum += (double)gumbel_exp(logits[v] - largest);
    }
    return largest + gumbel_log((float)block_double(sum, sh));
}

static __device__ __forceinline__ float logprob_of(float logit, float total) {
    float logprob = logit - total;
    return logprob > LOGPROB_MIN ? logprob : LOGPROB_MIN;
}

/* The n likeliest, by walking down from one to the next. */
static __device__ __forceinline__ void take_top(struct sample_result *out, const float *logits, int vocab, int n,
                                float total, struct shared_row *sh) {
    n = n < vocab ? n : vocab;
    mass_t below = ~(mass_t)0;
    for (int i = 0; i < n; i++) {
        mass_t best = 0;
        for (int v = threadIdx.x; v < vocab; v += THREADS) {
            mass_t rank = rank_of(logprob_of(logits[v], total), v);
            if (rank < below && rank > best) best = rank;
        }
        below = block_max(best, sh);
        if (threadIdx.x == 0) {
            out->top_token[i] = id_of(below);
            out->top_logprob[i] = logprob_of(logits[id_of(below)], total);
        }
    }
    if (threadIdx.x == 0) out->n_top = n > 0 ? n : 0;
}

/* --- what changes the logits ------------------------------------------------------------------------- */

static __device__ __forceinline__ void apply_bias(float *logits, int vocab, const struct sample_row &row,
                                  const int32_t *words) {
    const int32_t *pairs = words + row.bias_at;
    for (int i = threadIdx.x; i < row.n_bias; i += THREADS) {
        int token = pairs[2 * i];
        bool first = token >= 0 && token < vocab;
        for (int j = 0; j < i; j++) first = first && pairs[2 * j] != token;
        if (!first) continue;
        float logit = logits[token];
        for (int j = i; j < row.n_bias; j++) {
            if (pairs[2 * j] == token) logit += __int_as_float(pairs[2 * j + 1]);
        }
        logits[token] = logit;
    }
    __syncthreads();
}

/* Counts of the output in the low bits; the highest bit marks every token that was seen at all. */
static __device__ __forceinline__ void apply_penalties(float *logits, int vocab, const struct sample_row &row,
                                       const int32_t *words, uint32_t *counts) {
    const uint32_t seen = 0x80000000u;
    for (int v = threadIdx.x; v < vocab; v += THREADS) counts[v] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < row.n_history; i += THREADS) {
        int token = words[row.history_at + i];
        atomicOr(&counts[token], seen);
        if (i >= row.n_prompt) atomicAdd(&counts[token], 1u);
    }
    __syncthreads();
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        if (counts[v] == 0) continue;
        float logit = logits[v];
        int count = (int)(counts[v] & ~seen);
        if (row.repetition_penalty != 1.0f) {
            logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
        }
        if (count > 0) logit -= row.presence_penalty + row.frequency_penalty * (float)count;
        logits[v] = logit;
    }
    __syncthreads();
}

static __device__ __forceinline__ void apply_changes(float *logits, int vocab, const struct sample_row &row,
                                     const struct sample_batch &batch) {
    apply_bias(logits, vocab, row, batch.words);
    if (row.counts_slot >= 0) {
        apply_penalties(logits, vocab, row, batch.words,
                        (uint32_t *)batch.counts + (size_t)row.counts_slot * vocab);
    }
    for (int i = threadIdx.x; i < row.n_banned; i += THREADS) {
        int token = batch.words[row.banned_at + i];
        if (token >= 0 && token < vocab) logits[token] = -INFINITY;
    }
    __syncthreads();
}

/* --- filters: which ids may be drawn ------------------------------------------------------------------ */

/* A row over the temperature, and the ids that filters have left. */
struct choice {
    const float *logits;
    float largest, temperature;
    int vocab;
    float floor;      /* min-p: not below */
    uint32_t lowest;  /* key of the last one left, */
    int last;         /* and the highest id that is left among those with this key */
};

static __device__ __forceinline__ float scaled(const struct choice &c, int v) {
    return (c.logits[v] - c.largest) / c.temperature;
}

/* Its key where it is left, else 0. */
static __device__ __forceinline__ uint32_t key_left(const struct choice &c, int v, float x) {
    if (!(x >= c.floor) || !(x > -INFINITY)) return 0;
    uint32_t key = key_of(x);
    return key > c.lowest || (key == c.lowest && v <= c.last) ? key : 0;
}

/* What an id weighs: 1 for top-k, its mass for top-p. */
template <bool MASS> static __device__ __forceinline__ mass_t weight_of(float x) {
    return MASS ? (mass_t)(gumbel_exp(x) * MASS_UNIT) : 1;
}

/* All weights of what is left. */
template <bool MASS>
static __device__ __forceinline__ mass_t total_weight(const struct choice &c, struct shared_row *sh) {
    mass_t sum = 0;
    for (int v = threadIdx.x; v < c.vocab; v += THREADS) {
        float x = scaled(c, v);
        if (key_left(c, v, x) != 0) sum += weight_of<MASS>(x);
    }
    return block_mass(sum, sh);
}

/* One digit more of the key where the weight from above reaches `wanted`; sh->above: what is above it. */
template <bool MASS>
static __device__ __forceinline__ uint32_t next_digit(const struct choice &c, uint32_t prefix, int shift, mass_t wanted,
                                      struct shared_row *sh) {
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) sh->masses[i] = 0;
    __syncthreads();
    for (int v = threadIdx.x; v < c.vocab; v += THREADS) {
        float x = scaled(c, v);
        uint32_t key = key_left(c, v, x);
        bool here = key != 0 && (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8));
        if (here) atomicAdd(&sh->masses[key >> shift & 0xffu], weight_of<MASS>(x));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mass_t above = sh->above;
        int digit = BINS - 1;
        while (digit > 0 && above + sh->masses[digit] < wanted) above += sh->masses[digit--];
        sh->above = above;
        sh->digit = digit;
    }
    __syncthreads();
    return prefix | (uint32_t)sh->digit << shift;
}

/* The id of the n-th (from 1) of those left that have this key, by ids. */
static __device__ __forceinline__ int nth_of_key(const struct choice &c, uint32_t key, uint32_t n,
                                 struct shared_row *sh) {
    int stretch = (c.vocab + THREADS - 1) / THREADS, begin = (int)threadIdx.x * stretch;
    int end = min(begin + stretch, c.vocab), lane = threadIdx.x % 32;
    uint32_t count = 0;
    for (int v = begin; v < end; v++) count += key_left(c, v, scaled(c, v)) == key;
    uint32_t before = count;
    for (int by = 1; by < 32; by *= 2) {
        uint32_t other = __shfl_up_sync(~0u, before, by);
        if (lane >= by) before += other;
    }
    __syncthreads();
    if (lane == 31) sh->counts[threadIdx.x / 32] = before;
    if (threadIdx.x == 0) sh->limit = c.vocab - 1;
    __syncthreads();
    before -= count;
    for (int w = 0; w < (int)threadIdx.x / 32; w++) before += sh->counts[w];
    if (before < n && n <= before + count) {
        for (int v = begin; v < end; v++) {
            before += key_left(c, v, scaled(c, v)) == key;
            if (before == n) {
                sh->limit = v;
                break;
            }
        }
    }
    __syncthreads();
    return sh->limit;
}

/* Leaves the shortest run, from the likeliest down, whose weights reach `wanted`. */
template <bool MASS>
static __device__ __forceinline__ void cut(struct choice &c, mass_t wanted, struct shared_row *sh) {
    __syncthreads();
    if (threadIdx.x == 0) sh->above = 0;
    uint32_t key = 0;
    for (int shift = 24; shift >= 0; shift -= 8) key = next_digit<MASS>(c, key, shift, wanted, sh);
    mass_t above = sh->above, missing = wanted > above ? wanted - above : 1;
    mass_t each = 1;
    if (MASS) {
        /* All of one key weigh the same. */
        float x = __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
        each = weight_of<true>(x);
    }
    mass_t n = each > 0 ? (missing + each - 1) / each : 1;
    int last = nth_of_key(c, key, n < 0xffffffffu ? (uint32_t)n : 0xffffffffu, sh);
    c.lowest = key;
    c.last = last;
    __syncthreads();
}

static __device__ __forceinline__ void filter(struct choice &c, const struct sample_row &row, struct shared_row *sh) {
    if (row.min_p > 0) c.floor = gumbel_log(row.min_p);
    if (row.top_k > 0) {
        mass_t n = total_weight<false>(c, sh);
        if ((mass_t)row.top_k < n) cut<false>(c, (mass_t)row.top_k, sh);
    }
    if (row.top_p < 1) {
        double total = (double)total_weight<true>(c, sh);
        mass_t wanted = (mass_t)ceil((double)row.top_p * total);
        cut<true>(c, wanted > 0 ? wanted : 1, sh);
    }
}

/* --- the draw --------------------------------------------------------------------------------------- */

static __device__ __forceinline__ mass_t likeliest_of(const float *logits, int vocab, struct shared_row *sh) {
    mass_t best = 0;
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        mass_t rank = rank_of(logits[v], v);
        best = rank > best ? rank : best;
    }
    return block_max(best, sh);
}

/* Ids four at a time share their random words; whoever cannot win is passed over without any. */
static __device__ __forceinline__ int pick(const struct choice &c, const struct sample_row &row,
                           struct shared_row *sh) {
    mass_t best = 0;
    float least = -INFINITY;
    for (int first = (int)threadIdx.x * 4; first < c.vocab; first += THREADS * 4) {
        float x[4];
        bool hopeful = false;
        for (int i = 0; i < 4; i++) {
            int v = first + i;
            x[i] = v < c.vocab ? scaled(c, v) : -INFINITY;
            if (v >= c.vocab || key_left(c, v, x[i]) == 0) x[i] = -INFINITY;
            hopeful = hopeful || (x[i] > -INFINITY && x[i] + GUMBEL_MAX >= least);
        }
        if (!hopeful) continue;
        uint32_t bits[4];
        gumbel_words(bits, row.seed, row.position, (uint32_t)first / 4);
        for (int i = 0; i < 4; i++) {
            if (!(x[i] > -INFINITY)) continue;
            float perturbed = x[i] + gumbel_noise(bits[i]);
            mass_t rank = rank_of(perturbed, first + i);
            best = rank > best ? rank : best;
            least = perturbed > least ? perturbed : least;
        }
    }
    return id_of(block_max(best, sh));
}

static __device__ __forceinline__ struct choice choice_of(const float *logits, int vocab,
                                                          float largest, float temperature) {
    struct choice c;
    c.logits = logits;
    c.largest = largest;
    c.temperature = temperature;
    c.vocab = vocab;
    c.floor = -INFINITY;
    c.lowest = 0;
    c.last = vocab;
    return c;
}

static __global__ void __launch_bounds__(THREADS) sample_kernel(struct sample_batch batch) {
    CU_SHARED(struct shared_row, sh, 1);
    const struct sample_row row = batch.rows[blockIdx.x];
    const int vocab = batch.vocab;
    float *logits = batch.logits + (size_t)blockIdx.x * batch.stride;
    struct sample_result *out = &batch.results[blockIdx.x];
    float total = 0;
    const float *raw = logits;
    if (threadIdx.x == 0) out->n_top = 0;
    if (row.n_logprobs >= 0) {
        total = log_sum_exp(logits, vocab, sh);
        take_top(out, logits, vocab, row.n_logprobs, total, sh);
        if (row.raw_slot >= 0) {
            float *kept = batch.raw + (size_t)row.raw_slot * vocab;
            for (int v = threadIdx.x; v < vocab; v += THREADS) kept[v] = logits[v];
            raw = kept;
        }
        __syncthreads();
    }
    apply_changes(logits, vocab, row, batch);
    mass_t best = likeliest_of(logits, vocab, sh);
    int token = best >> 32 != 0 ? id_of(best) : 0;
    float largest = logits[token];
    if (row.temperature != 0 && is_finite(largest)) {
        struct choice c = choice_of(logits, vocab, largest, row.temperature);
        filter(c, row, sh);
        token = pick(c, row, sh);
    }
    if (threadIdx.x != 0) return;
    out->token = token;
    out->logprob = row.n_logprobs >= 0 ? logprob_of(raw[token], total) : 0;
    if (batch.tokens != NULL) batch.tokens[blockIdx.x] = token;
}

/* The verdict walk: a chain goes on while its tokens are its candidates. */
static __global__ void verdict_kernel(struct sample_batch batch) {
    if (threadIdx.x != 0) return;
    bool goes_on = false;
    for (int i = 0; i < batch.n; i++) {
        bool made = !batch.rows[i].continues || goes_on;
        batch.results[i].made = made;
        goes_on = made && batch.results[i].token == batch.rows[i].candidate;
    }
}

extern "C" void launch_sample(void *stream, const struct sample_batch *batch) {
    CU_LAUNCH(sample_kernel, dim3(batch->n), dim3(THREADS), 0, stream, *batch);
    CU_LAUNCH(verdict_kernel, dim3(1), dim3(32), 0, stream, *batch);
}

static __global__ void __launch_bounds__(THREADS)
    distribution_kernel(struct sample_batch batch, float *out) {
    CU_SHARED(struct shared_row, sh, 1);
    const struct sample_row row = batch.rows[0];
    const int vocab = batch.vocab;
    apply_changes(batch.logits, vocab, row, batch);
    mass_t best = likeliest_of(batch.logits, vocab, sh);
    int token = best >> 32 != 0 ? id_of(best) : 0;
    float largest = batch.logits[token];
    if (row.temperature == 0 || !is_finite(largest)) {
        for (int v = threadIdx.x; v < vocab; v += THREADS) out[v] = v == token ? 1.0f : 0.0f;
        return;
    }
    struct choice c = choice_of(batch.logits, vocab, largest, row.temperature);
    filter(c, row, sh);
    double sum = 0;
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        float x = scaled(c, v);
        out[v] = key_left(c, v, x) != 0 ? gumbel_exp(x) : 0;
        sum += (double)out[v];
    }
    sum = block_double(sum, sh);
    for (int v = threadIdx.x; v < vocab; v += THREADS) out[v] = (float)((double)out[v] / sum);
}

extern "C" void launch_distribution(void *stream, const struct sample_batch *batch, float *out) {
    CU_LAUNCH(distribution_kernel, dim3(1), dim3(THREADS), 0, stream, *batch, out);
}

static __global__ void __launch_bounds__(THREADS)
    logprobs_kernel(struct sample_batch batch, int n_top, int32_t token) {
    CU_SHARED(struct shared_row, sh, 1);
    float total = log_sum_exp(batch.logits, batch.vocab, sh);
    take_top(batch.results, batch.logits, batch.vocab, n_top, total, sh);
    if (threadIdx.x != 0) return;
    batch.results->made = true;
    batch.results->token = token;
    batch.results->logprob = logprob_of(batch.logits[token], total);
}

extern "C" void launch_logprobs(void *stream, const struct sample_batch *batch, int n_top,
                                int32_t token) {
    CU_LAUNCH(logprobs_kernel, dim3(1), dim3(THREADS), 0, stream, *batch, n_top, token);
}
