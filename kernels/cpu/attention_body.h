/* Attention of one KV head for a few query rows: see ops.h. Compiled once per instruction set, which
 * gives dot_pairs(acc, pairs, pair): acc + low * low + high * high in every lane, bf16 products; and
 * PASS_MAX, the most queries whose accumulators its registers hold.
 *
 * Up to 8 queries (rows x heads of the group) pass over the context together, so K and V are read once
 * for all of them. The context is cut in pieces of 256 positions, counted from position 0. In a piece:
 * scores of 16 positions at a time in lanes; the piece's own maximum, weights and sum; weights rounded
 * to bf16; weighted values. Pieces are combined in order. Every query has its own numbers throughout,
 * and what it may not see enters as a weight of exactly 0: who shares the pass changes nothing.
 *
 * Layout of one KV head in one block (kv_cache.c): K [head_dim / 2][16 positions][2],
 * V [16 / 2 positions][head_dim][2], head_dim padded to 16. */
#include <math.h>

#include "common/dtype.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

enum {
    QUERIES = 8,
    PIECE_BLOCKS = BACKEND_ATTENTION_PIECE / BACKEND_KV_BLOCK,
    HEAD_DIM_MAX = 256,
};

struct piece {
    float scores[QUERIES][BACKEND_ATTENTION_PIECE];
    uint32_t weights[QUERIES][BACKEND_ATTENTION_PIECE / 2]; /* pairs of bf16 */
    float values[QUERIES][HEAD_DIM_MAX];
    float largest[QUERIES], sum[QUERIES];
};

struct running {
    uint32_t q[QUERIES][HEAD_DIM_MAX / 2]; /* pairs of bf16 */
    float values[QUERIES][HEAD_DIM_MAX];
    float largest[QUERIES], sum[QUERIES];
    int first[QUERIES], last[QUERIES]; /* positions that the query sees */
    bool begun[QUERIES];
};

VINLINE v16u load_pairs(const uint16_t *at) {
    v16u pairs;
    memcpy(&pairs, at, sizeof pairs);
    return pairs;
}

/* Scores of N queries with the 16 positions of one block. */
VINLINE void block_scores(float (*scores)[BACKEND_ATTENTION_PIECE], int at,
                          uint32_t (*q)[HEAD_DIM_MAX / 2], const uint16_t *k, int n_pairs,
                          float scale, const int N) {
    v16 acc[QUERIES];
    for (int i = 0; i < N; i++) acc[i] = (v16){0};
    for (int pair = 0; pair < n_pairs; pair++) {
        v16u keys = load_pairs(k + pair * 32);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) acc[i] = dot_pairs(acc[i], keys, q[i][pair]);
    }
    for (int i = 0; i < N; i++) v16_store(scores[i] + at, acc[i] * scale);
}

/* Masks, exponentiates and rounds the scores of one query; false: it sees nothing of this piece. */
VINLINE bool weigh(struct piece *piece, const struct running *run, int i, int base, int n_blocks) {
    int first = run->first[i] - base, last = run->last[i] - base;
    int n = n_blocks * BACKEND_KV_BLOCK;
    if (last < 0 || first >= n) return false;
    float *scores = piece->scores[i];
    for (int p = 0; p < first; p++) scores[p] = -INFINITY;
    for (int p = last + 1; p < n; p++) scores[p] = -INFINITY;
    v16 largest = v16_set(-INFINITY);
    for (int p = 0; p < n; p += 16) {
        v16 x = v16_load(scores + p);
        largest = v16_select(x > largest, x, largest);
    }
    float top = v16_max(largest);
    v16 sum = {0};
    for (int p = 0; p < n; p += 16) {
        v16 x = v16_exp(v16_load(scores + p) - top);
        v16u rounded = v16_round_bf16(x);
        sum += (v16)rounded; /* what is multiplied is what is counted */
        uint32_t lanes[16];
        memcpy(lanes, &rounded, sizeof lanes);
        for (int j = 0; j < 8; j++) {
            piece->weights[i][p / 2 + j] = lanes[2 * j] >> 16 | lanes[2 * j + 1];
        }
    }
    piece->largest[i] = top;
    piece->sum[i] = v16_sum(sum);
    return true;
}

/* Weighted values of N queries over the piece, 16 dimensions at a time. */
VINLINE void weighted_values(struct piece *piece, const uint16_t *const *v, int n_blocks,
                             int head_dim, int padded, const int N) {
    (void)head_dim;
    for (int d = 0; d < padded; d += 16) {
        v16 acc[QUERIES];
        for (int i = 0; i < N; i++) acc[i] = (v16){0};
        for (int b = 0; b < n_blocks; b++) {
            for (int pair = 0; pair < BACKEND_KV_BLOCK / 2; pair++) {
                v16u values = load_pairs(v[b] + (size_t)pair * (size_t)padded * 2 + d * 2);
                int at = b * BACKEND_KV_BLOCK / 2 + pair;
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) {
                    acc[i] = dot_pairs(acc[i], values, piece->weights[i][at]);
                }
            }
        }
        for (int i = 0; i < N; i++) v16_store(piece->values[i] + d, acc[i]);
    }
}

static void combine(struct running *run, const struct piece *piece, int i, int padded) {
    if (!run->begun[i]) {
        run->begun[i] = true;
        run->largest[i] = piece->largest[i];
        run->sum[i] = piece->sum[i];
        memcpy(run->values[i], piece->values[i], (size_t)padded * sizeof(float));
        return;
    }
    float largest = run->largest[i] > piece->largest[i] ? run->largest[i] : piece->largest[i];
    v16 scales = v16_exp((v16){run->largest[i] - largest, piece->largest[i] - largest});
    float old = scales[0], added = scales[1];
    run->largest[i] = largest;
    run->sum[i] = run->sum[i] * old + piece->sum[i] * added;
    for (int d = 0; d < padded; d += 16) {
        v16_store(run->values[i] + d, v16_load(run->values[i] + d) * old +
                                          v16_load(piece->values[i] + d) * added);
    }
}

VINLINE void piece_pass(const struct attention_task *task, struct running *run,
                        struct piece *piece, int base, int n_blocks, float scale, const int N) {
    int padded = (task->head_dim + 15) / 16 * 16;
    int n_pairs = (task->head_dim + 1) / 2;
    const uint16_t *v[PIECE_BLOCKS];
    for (int b = 0; b < n_blocks; b++) {
        size_t at = (size_t)task->blocks[base / BACKEND_KV_BLOCK + b] * task->block_stride;
        block_scores(piece->scores, b * BACKEND_KV_BLOCK, run->q, task->k + at, n_pairs, scale, N);
        v[b] = task->v + at;
    }
    bool seen[QUERIES];
    for (int i = 0; i < N; i++) {
        seen[i] = weigh(piece, run, i, base, n_blocks);
        if (!seen[i]) memset(piece->weights[i], 0, sizeof piece->weights[i]);
    }
    weighted_values(piece, v, n_blocks, task->head_dim, padded, N);
    for (int i = 0; i < N; i++) {
        if (seen[i]) combine(run, piece, i, padded);
    }
}

/* Query i of the task: its row, and which of the group's heads. */
static void load_query(const struct attention_task *task, struct running *run, int slot, int query) {
    int row = query / task->group, head = task->query_head[query % task->group];
    const float *q = task->q + (size_t)(task->first_row + row) * (size_t)task->q_stride +
                     (size_t)head * (size_t)task->head_dim;
    memset(run->q[slot], 0, sizeof run->q[slot]);
    for (int d = 0; d < task->head_dim; d++) {
        run->q[slot][d / 2] |= (uint32_t)bf16_from_f32(q[d]) << (16 * (d % 2));
    }
    int position = task->first_position + row;
    run->last[slot] = position;
    run->first[slot] = task->window > 0 && position >= task->window ? position - task->window + 1 : 0;
    run->begun[slot] = false;
}

static void store_query(const struct attention_task *task, const struct running *run, int slot,
                        int query) {
    int row = query / task->group, head = task->query_head[query % task->group];
    float *out = task->out + (size_t)(task->first_row + row) * (size_t)task->out_stride +
                 (size_t)head * (size_t)task->head_dim;
    float inverse = 1.0f / run->sum[slot];
    for (int d = 0; d < task->head_dim; d++) out[d] = run->values[slot][d] * inverse;
}

VINLINE void queries_pass(const struct attention_task *task, int query, const int N) {
    struct running run;
    struct piece piece;
    int first = INT32_MAX, last = 0;
    for (int i = 0; i < N; i++) {
        load_query(task, &run, i, query + i);
        if (run.first[i] < first) first = run.first[i];
        if (run.last[i] > last) last = run.last[i];
    }
    float scale = 1.0f / __builtin_sqrtf((float)task->head_dim);
    int begin = first / BACKEND_ATTENTION_PIECE * BACKEND_ATTENTION_PIECE;
    for (int base = begin; base <= last; base += BACKEND_ATTENTION_PIECE) {
        int left = last + 1 - base;
        int n = left < BACKEND_ATTENTION_PIECE ? left : BACKEND_ATTENTION_PIECE;
        piece_pass(task, &run, &piece, base, (n + BACKEND_KV_BLOCK - 1) / BACKEND_KV_BLOCK, scale,
                   N);
    }
    for (int i = 0; i < N; i++) store_query(task, &run, i, query + i);
}

static void pass_8(const struct attention_task *task, int query) { queries_pass(task, query, 8); }
static void pass_4(const struct attention_task *task, int query) { queries_pass(task, query, 4); }
static void pass_2(const struct attention_task *task, int query) { queries_pass(task, query, 2); }
static void pass_1(const struct attention_task *task, int query) { queries_pass(task, query, 1); }

static void attention(const struct attention_task *task) {
    int n = task->n_rows * task->group, query = 0;
    for (; PASS_MAX >= 8 && query + 8 <= n; query += 8) pass_8(task, query);
    for (; query + 4 <= n; query += 4) pass_4(task, query);
    for (; query + 2 <= n; query += 2) pass_2(task, query);
    for (; query < n; query++) pass_1(task, query);
}
