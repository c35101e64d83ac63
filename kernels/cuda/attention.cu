/* Rotation with the write to the KV cache, and paged attention for prefill, decode and verification.
 *
 * Idea: queries are the 16-row operand of mma.sync: up to 16 of (rows of one segment) x (query heads of
 * one KV head), so that a verification's rows share one walk over K and V. The context is cut in pieces
 * of 256 positions counted from 0. A block of 4 warps takes one piece, 64 positions a warp: scores in
 * registers, the piece's own maximum, weights rounded to bf16, their sum, weighted values. Pieces are
 * combined in order, by one formula: either by the block that walks all of them (long passes) or by a
 * second kernel over pieces computed side by side (few rows). Both give the same bits; so does any
 * neighbourhood of a query, since what it may not see has a weight of exactly 0.
 *
 * Order of sums: scores along dims by mma; a query's weights by lanes, then warps 0 to 3; values by mma
 * along a warp's positions, then warps 0 to 3.
 *
 * Bytes: K and V of the visible positions, once for 16 queries, 16 bytes a lane as they lie. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/arithmetic.h"

enum {
    WARPS = 4,
    THREADS = WARPS * LANES,
    QUERIES = 16,
    KV_BLOCK = 16,
    WARP_POSITIONS = PIECE / WARPS,
    WARP_BLOCKS = WARP_POSITIONS / KV_BLOCK,
    CHUNK = 64, /* dims of values at a time */
    CHUNK_STRIDE = CHUNK + 4
};

/* --- rotation and KV write ----------------------------------------------------------------------- */

/* A weight of 0 hides a masked position only while 0 * value is 0: values are kept finite. */
static __device__ __forceinline__ uint16_t finite_bf16(float value) {
    const float largest = 3.38953139e38f; /* 0x7f7f */
    if (value != value) return 0;
    value = value > largest ? largest : value < -largest ? -largest : value;
    return (uint16_t)bf16_bits(value);
}

/* One warp: RMSNorm over the head where there is a weight, then the rotation, in place. */
static __device__ __forceinline__ void turn_head(float *head, const float *norm,
                                                 const struct rope_launch &r, int position) {
    const int dim = r.kv.head_dim, half = dim / 2, lane = threadIdx.x % LANES;
    float scale = 1;
    if (norm != NULL) {
        float squares = 0;
        for (int i = lane; i < dim; i += LANES) squares += head[i] * head[i];
        scale = 1.0f / sqrtf(warp_sum(squares) / (float)dim + r.eps);
    }
    const float *cosines = r.cosines + (size_t)position * half;
    const float *sines = r.sines + (size_t)position * half;
    for (int i = lane; i < half; i += LANES) {
        float a = head[i], b = head[i + half];
        if (norm != NULL) {
            a = a * scale * norm[i];
            b = b * scale * norm[i + half];
        }
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

/* A warp has one head of one row: query heads, then key heads (which take their value head along). */
static __global__ void __launch_bounds__(THREADS) rope_kv_write_kernel(struct rope_launch r) {
    grid_wait();
    const int row = blockIdx.y, head = blockIdx.x * WARPS + threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES, dim = r.kv.head_dim, n_kv = r.kv.n_kv_heads;
    const struct row_place place = r.places[row];
    if (place.position < 0 || head >= r.n_heads + n_kv) return;
    float *at = r.qkv + ((size_t)row * (r.n_heads + 2 * n_kv) + head) * dim;
    if (head < r.n_heads) {
        turn_head(at, r.q_norm, r, place.position);
        return;
    }
    turn_head(at, r.k_norm, r, place.position);
    __syncwarp();
    const int slot = place.position % KV_BLOCK, padded = r.kv.padded;
    const int32_t block = r.tables[place.blocks + place.position / KV_BLOCK];
    const size_t base = ((size_t)block * n_kv + (head - r.n_heads)) * KV_BLOCK * padded;
    const float *values = at + (size_t)n_kv * dim;
    for (int d = lane; d < dim; d += LANES) {
        r.kv.keys[base + key_at(slot, d, padded)] = (uint16_t)bf16_bits(at[d]);
        r.kv.values[base + value_at(slot, d)] = finite_bf16(values[d]);
    }
}

extern "C" void launch_rope_kv_write(struct cuda_queue queue, const struct rope_launch *rope) {
    int n = rope->n_heads + rope->kv.n_kv_heads;
    CU_LAUNCH_OVERLAPPED(rope_kv_write_kernel, dim3((n + WARPS - 1) / WARPS, rope->n_rows),
                         dim3(THREADS), 0, queue, *rope);
}

/* --- attention ------------------------------------------------------------------------------------ */

/* The queries of a block: rows x heads of one KV head, heads innermost. */
struct tile {
    int row, n_rows, first_head, n_heads;
    int position; /* of `row` */
    int n_queries;
};

static __device__ __forceinline__ int tile_rows(int group) {
    return group >= QUERIES ? 1 : QUERIES / group;
}

/* false: the block has nothing to do. blockIdx.x: KV head, and part of its query heads where they are
 * more than 16; blockIdx.y: a row, which begins a tile or not. */
static __device__ __forceinline__ bool find_tile(struct tile &t, int &kv_head,
                                                 const struct attention_launch &a,
                                                 const struct row_place &place) {
    kv_head = blockIdx.x % a.kv.n_kv_heads;
    const int part = blockIdx.x / a.kv.n_kv_heads;
    const int group = a.first_head[kv_head + 1] - a.first_head[kv_head];
    if (place.position < 0 || part * QUERIES >= group) return false;
    const int rows = tile_rows(group), row = blockIdx.y;
    if ((row - place.first_row) % rows != 0) return false;
    t.row = row;
    t.n_rows = min(rows, place.end_row - row);
    t.first_head = a.first_head[kv_head] + part * QUERIES;
    t.n_heads = min(QUERIES, group - part * QUERIES);
    t.position = place.position;
    t.n_queries = t.n_rows * t.n_heads;
    return true;
}

/* Queries as A operands: KK units of 32 dims, two operands each. */
template <int KK>
static __device__ __forceinline__ void load_queries(uint4 (&q)[KK][2], const struct tile &t,
                                                    const struct attention_launch &a) {
    const int g = threadIdx.x % LANES / 4, dim0 = threadIdx.x % 4 * 2, dim = a.kv.head_dim;
#pragma unroll
    for (int i = 0; i < KK * 2; i++) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; w++) {
            int query = g + w % 2 * 8, d = i * 16 + w / 2 * 8 + dim0;
            const float *from = a.q + (size_t)(t.row + query / t.n_heads) * a.q_stride +
                                (size_t)(t.first_head + query % t.n_heads) * dim;
            bool there = query < t.n_queries;
            words[w] = bf16_pair(there && d < dim ? from[d] : 0,
                                 there && d + 1 < dim ? from[d + 1] : 0);
        }
        q[i / 2][i % 2] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

/* What the 4 warps share of one piece, and the running state of a block that walks all pieces. */
struct shared_state {
    float largest[WARPS][QUERIES], sum[WARPS][QUERIES];
    float values[WARPS][QUERIES][CHUNK_STRIDE];
    float old_scale[QUERIES], new_scale[QUERIES], running_largest[QUERIES], running_sum[QUERIES];
};

static __device__ __forceinline__ float quad_max(float v) {
    for (int with = 2; with > 0; with /= 2) {
        float other = __shfl_xor_sync(~0u, v, with);
        v = other > v ? other : v;
    }
    return v;
}

static __device__ __forceinline__ float quad_sum(float v) {
    for (int with = 2; with > 0; with /= 2) v += __shfl_xor_sync(~0u, v, with);
    return v;
}

/* Scores of this warp's 64 positions, masked: s[j] are positions 8j.. of them. blocks[i] < 0: not there. */
template <int KK>
static __device__ __forceinline__ void compute_scores(float (&s)[WARP_BLOCKS * 2][4],
                                                      const uint4 (&q)[KK][2], const int (&blocks)[WARP_BLOCKS],
                                                      const struct tile &t, int kv_head, int first,
                                                      const struct attention_launch &a) {
    const int lane = threadIdx.x % LANES;
    const float scale = 1.0f / sqrtf((float)a.kv.head_dim);
#pragma unroll
    for (int j = 0; j < WARP_BLOCKS * 2; j++) {
#pragma unroll
        for (int r = 0; r < 4; r++) s[j][r] = 0;
        if (blocks[j / 2] < 0) continue;
        size_t base = ((size_t)blocks[j / 2] * a.kv.n_kv_heads + kv_head) * KV_BLOCK * (KK * 32);
        const uint4 *keys = (const uint4 *)(a.kv.keys + base) + (size_t)(j % 2) * KK * LANES + lane;
#pragma unroll
        for (int kk = 0; kk < KK; kk++) {
            uint4 k = keys[kk * LANES];
            mma_bf16(s[j], q[kk][0], k.x, k.y);
            mma_bf16(s[j], q[kk][1], k.z, k.w);
        }
    }
#pragma unroll
    for (int j = 0; j < WARP_BLOCKS * 2; j++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int query = lane / 4 + r / 2 * 8, at = first + j * 8 + lane % 4 * 2 + r % 2;
            int last = t.position + query / t.n_heads;
            bool seen = query < t.n_queries && blocks[j / 2] >= 0 && at <= last &&
                        (a.window == 0 || at > last - a.window);
            s[j][r] = seen ? s[j][r] * scale : -INFINITY;
        }
    }
}

/* Scores to weights, rounded to bf16, as A operands of 16 positions; the piece's maximum and sum of the
 * weights go to sh.largest[0] and sh.sum[0]. */
static __device__ __forceinline__ void weigh(uint4 (&weights)[WARP_BLOCKS],
                                             float (&s)[WARP_BLOCKS * 2][4], struct shared_state *sh) {
    const int warp = threadIdx.x / LANES, g = threadIdx.x % LANES / 4;
    const bool writes = threadIdx.x % 4 == 0;
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < WARP_BLOCKS * 2; j++) {
#pragma unroll
        for (int r = 0; r < 4; r++) top[r / 2] = s[j][r] > top[r / 2] ? s[j][r] : top[r / 2];
    }
    top[0] = quad_max(top[0]);
    top[1] = quad_max(top[1]);
    if (writes) {
        sh->largest[warp][g] = top[0];
        sh->largest[warp][g + 8] = top[1];
    }
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
        top[0] = sh->largest[w][g] > top[0] ? sh->largest[w][g] : top[0];
        top[1] = sh->largest[w][g + 8] > top[1] ? sh->largest[w][g + 8] : top[1];
    }
    uint32_t words[WARP_BLOCKS * 2][2];
#pragma unroll
    for (int j = 0; j < WARP_BLOCKS * 2; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float low = s[j][half * 2] > -INFINITY ? exp_f32(s[j][half * 2] - top[half]) : 0;
            float high = s[j][half * 2 + 1] > -INFINITY ? exp_f32(s[j][half * 2 + 1] - top[half]) : 0;
            words[j][half] = bf16_pair(low, high);
            /* What is multiplied is what is counted. */
            sum[half] += bf16_value(words[j][half] & 0xffffu);
            sum[half] += bf16_value(words[j][half] >> 16);
        }
    }
#pragma unroll
    for (int i = 0; i < WARP_BLOCKS; i++) {
        weights[i] = make_uint4(words[2 * i][0], words[2 * i][1], words[2 * i + 1][0],
                                words[2 * i + 1][1]);
    }
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
    if (writes) {
        sh->sum[warp][g] = sum[0];
        sh->sum[warp][g + 8] = sum[1];
    }
    __syncthreads();
    if (warp == 0 && threadIdx.x < QUERIES) {
        int query = threadIdx.x;
        float most = sh->largest[0][query], total = sh->sum[0][query];
        for (int w = 1; w < WARPS; w++) {
            most = sh->largest[w][query] > most ? sh->largest[w][query] : most;
            total += sh->sum[w][query];
        }
        sh->largest[0][query] = most;
        sh->sum[0][query] = total;
    }
}

/* This warp's part of the weighted values of dims dim0 .. dim0 + 63. */
static __device__ __forceinline__ void chunk_values(const uint4 (&weights)[WARP_BLOCKS],
                                                    const int (&blocks)[WARP_BLOCKS], int kv_head,
                                                    int dim0, struct shared_state *sh,
                                                    const struct attention_launch &a) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, padded = a.kv.padded;
    float o[CHUNK / 8][4] = {};
#pragma unroll
    for (int i = 0; i < WARP_BLOCKS; i++) {
        if (blocks[i] < 0) continue;
        size_t base = ((size_t)blocks[i] * a.kv.n_kv_heads + kv_head) * KV_BLOCK * padded;
        const uint4 *values = (const uint4 *)(a.kv.values + base) + (size_t)(dim0 / 16) * LANES + lane;
#pragma unroll
        for (int j = 0; j < CHUNK / 16; j++) {
            if (dim0 + j * 16 >= padded) break;
            uint4 v = values[j * LANES];
            mma_bf16(o[2 * j], weights[i], v.x, v.y);
            mma_bf16(o[2 * j + 1], weights[i], v.z, v.w);
        }
    }
#pragma unroll
    for (int j = 0; j < CHUNK / 8; j++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            sh->values[warp][lane / 4 + r / 2 * 8][j * 8 + lane % 4 * 2 + r % 2] = o[j][r];
        }
    }
}

/* How a running result and a piece's enter their combination. */
static __device__ __forceinline__ void combine_scales(float &old_scale, float &new_scale,
                                                      float &largest, float &sum, float piece_largest,
                                                      float piece_sum) {
    if (!(piece_largest > -INFINITY)) { /* it sees nothing of the piece */
        old_scale = 1;
        new_scale = 0;
        return;
    }
    if (!(largest > -INFINITY)) {
        old_scale = 0;
        new_scale = 1;
        largest = piece_largest;
        sum = piece_sum;
        return;
    }
    float most = largest > piece_largest ? largest : piece_largest;
    old_scale = exp_f32(largest - most);
    new_scale = exp_f32(piece_largest - most);
    largest = most;
    sum = sum * old_scale + piece_sum * new_scale;
}

/* The combination itself; 0 takes a part out, whatever it holds. */
static __device__ __forceinline__ float combine(float value, float old_scale, float piece,
                                                float new_scale) {
    if (new_scale == 0 && old_scale == 1) return value;
    if (old_scale == 0 && new_scale == 1) return piece;
    return value * old_scale + piece * new_scale;
}

static __device__ __forceinline__ void store_result(const struct attention_launch &a, int row,
                                                    int head, int d, float value) {
    int column = head * a.kv.head_dim + d, width = a.n_heads * a.kv.head_dim;
    a.out[(size_t)row * width + column] = value;
    if (a.packed == NULL) return;
    ((uint16_t *)a.packed)[packed_row_at(row, column / 32, column % 32, (width + 31) / 32)] =
        (uint16_t)bf16_bits(value);
}

static __device__ __forceinline__ size_t partial_at(const struct attention_launch &a, int row,
                                                    int head, int slot) {
    return (((size_t)row * a.n_heads + head) * a.n_slots + slot) * (a.kv.padded + 2);
}

static __device__ __forceinline__ int first_piece(const struct attention_launch &a, int position) {
    int first = a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
    return first / PIECE;
}

/* Running values [QUERIES][KK * 32] stand in dynamic shared memory where the block walks all pieces. */
template <int KK>
static __global__ void __launch_bounds__(THREADS) attention_kernel(struct attention_launch a) {
    CU_DYN_SMEM(float, running);
    CU_SHARED(struct shared_state, sh, 1);
    grid_wait();
    const struct row_place place = a.places[blockIdx.y];
    struct tile t;
    int kv_head;
    if (!find_tile(t, kv_head, a, place)) return;
    const int warp = threadIdx.x / LANES, last = t.position + t.n_rows - 1;
    const bool walks = a.n_slots == 0;
    const int begin = first_piece(a, t.position) + (walks ? 0 : (int)blockIdx.z);
    const int end = walks ? last / PIECE + 1 : min(begin + 1, last / PIECE + 1);
    if (begin >= end) return;
    uint4 q[KK][2];
    load_queries<KK>(q, t, a);
    if (threadIdx.x < QUERIES) sh->running_largest[threadIdx.x] = -INFINITY;

    for (int piece = begin; piece < end; piece++) {
        const int first = piece * PIECE + warp * WARP_POSITIONS;
        int blocks[WARP_BLOCKS];
#pragma unroll
        for (int i = 0; i < WARP_BLOCKS; i++) {
            int at = first + i * KV_BLOCK;
            blocks[i] = at <= last ? a.tables[place.blocks + at / KV_BLOCK] : -1;
        }
        float s[WARP_BLOCKS * 2][4];
        uint4 weights[WARP_BLOCKS];
        compute_scores<KK>(s, q, blocks, t, kv_head, first, a);
        weigh(weights, s, sh);
        if (warp == 0 && threadIdx.x < QUERIES && walks) {
            int query = threadIdx.x;
            combine_scales(sh->old_scale[query], sh->new_scale[query], sh->running_largest[query],
                           sh->running_sum[query], sh->largest[0][query], sh->sum[0][query]);
        }
        for (int dim0 = 0; dim0 < KK * 32; dim0 += CHUNK) {
            __syncthreads();
            chunk_values(weights, blocks, kv_head, dim0, sh, a);
            __syncthreads();
            for (int i = threadIdx.x; i < QUERIES * CHUNK; i += THREADS) {
                int query = i / CHUNK, d = dim0 + i % CHUNK;
                if (query >= t.n_queries || d >= KK * 32) continue;
                float value = sh->values[0][query][i % CHUNK];
                for (int w = 1; w < WARPS; w++) value += sh->values[w][query][i % CHUNK];
                if (walks) {
                    float *to = &running[query * (KK * 32) + d];
                    *to = combine(*to, sh->old_scale[query], value, sh->new_scale[query]);
                } else {
                    int row = t.row + query / t.n_heads, head = t.first_head + query % t.n_heads;
                    a.partial[partial_at(a, row, head, blockIdx.z) + 2 + d] = value;
                }
            }
        }
        if (!walks && (int)threadIdx.x < t.n_queries) {
            int query = threadIdx.x;
            int row = t.row + query / t.n_heads, head = t.first_head + query % t.n_heads;
            float *to = a.partial + partial_at(a, row, head, blockIdx.z);
            to[0] = sh->largest[0][query];
            to[1] = sh->sum[0][query];
        }
        __syncthreads();
    }
    grid_go_on();
    if (!walks) return;
    const int dim = a.kv.head_dim;
    for (int i = threadIdx.x; i < t.n_queries * dim; i += THREADS) {
        int query = i / dim, d = i % dim;
        float inverse = 1.0f / sh->running_sum[query];
        store_result(a, t.row + query / t.n_heads, t.first_head + query % t.n_heads, d,
                     running[query * (KK * 32) + d] * inverse);
    }
}

/* A block combines the pieces of one row's query head, a thread a dim, in order. */
static __global__ void __launch_bounds__(THREADS) combine_kernel(struct attention_launch a) {
    grid_wait();
    const int row = blockIdx.y, head = blockIdx.x;
    const struct row_place place = a.places[row];
    if (place.position < 0) return;
    /* Slots are counted from the first piece of the tile's first row. */
    int kv_head = 0;
    while (head >= a.first_head[kv_head + 1]) kv_head++;
    const int rows = tile_rows(a.first_head[kv_head + 1] - a.first_head[kv_head]);
    const int in_tile = (row - place.first_row) % rows;
    const int begin = first_piece(a, place.position - in_tile);
    const int n = place.position / PIECE + 1 - begin;
    for (int d = threadIdx.x; d < a.kv.head_dim; d += THREADS) {
        float largest = -INFINITY, sum = 0, value = 0;
        for (int slot = 0; slot < n; slot++) {
            const float *from = a.partial + partial_at(a, row, head, slot);
            float old_scale, new_scale;
            combine_scales(old_scale, new_scale, largest, sum, from[0], from[1]);
            value = combine(value, old_scale, from[2 + d], new_scale);
        }
        store_result(a, row, head, d, value * (1.0f / sum));
    }
}

template <int KK>
static void launch_dims(struct cuda_queue queue, const struct attention_launch &a, int n_parts) {
    bool walks = a.n_slots == 0;
    size_t shared = walks ? (size_t)QUERIES * KK * 32 * sizeof(float) : 0;
    CU_LAUNCH_OVERLAPPED(attention_kernel<KK>,
                         dim3(a.kv.n_kv_heads * n_parts, a.n_rows, walks ? 1 : a.n_slots),
                         dim3(THREADS), shared, queue, a);
    if (walks) return;
    CU_LAUNCH_OVERLAPPED(combine_kernel, dim3(a.n_heads, a.n_rows), dim3(THREADS), 0, queue, a);
}

extern "C" void launch_attention(struct cuda_queue queue, const struct attention_launch *a) {
    int most = 1;
    for (int i = 0; i < a->kv.n_kv_heads; i++) {
        int group = a->first_head[i + 1] - a->first_head[i];
        most = group > most ? group : most;
    }
    int n_parts = (most + QUERIES - 1) / QUERIES;
    switch (a->kv.padded / 32) {
    case 1: launch_dims<1>(queue, *a, n_parts); break;
    case 2: launch_dims<2>(queue, *a, n_parts); break;
    case 3: launch_dims<3>(queue, *a, n_parts); break;
    case 4: launch_dims<4>(queue, *a, n_parts); break;
    case 5: launch_dims<5>(queue, *a, n_parts); break;
    case 6: launch_dims<6>(queue, *a, n_parts); break;
    case 7: launch_dims<7>(queue, *a, n_parts); break;
    default: launch_dims<8>(queue, *a, n_parts); break;
    }
}
