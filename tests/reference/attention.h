/* Attention of one query as plain loops in double, with the roundings of the CPU backend: inputs in
 * bf16; weights relative to the maximum of their piece of 256 positions, in bf16. */
#pragma once
#include <math.h>

#include "common/dtype.h"
#include "kernels/backend.h"

/* A sequence's rows as the transformer makes them: [row, (n_heads + 2 n_kv) * head_dim]. */
struct reference_history {
    const float *qkv;
    int n_heads, n_kv, head_dim;
};

static inline const float *reference_head(const struct reference_history *h, int position,
                                          int head) {
    return h->qkv + (position * (h->n_heads + 2 * h->n_kv) + head) * h->head_dim;
}

/* What the pieces up to now come to. */
struct reference_softmax {
    double largest, sum, magnitude, heaviest;
    double values[256];
};

static inline void reference_rescale(struct reference_softmax *s, double largest, int head_dim) {
    double factor = s->sum > 0 ? exp(s->largest - largest) : 0;
    s->largest = largest;
    s->sum *= factor;
    s->magnitude *= factor;
    s->heaviest *= factor;
    for (int d = 0; d < head_dim; d++) s->values[d] *= factor;
}

static inline void reference_piece(struct reference_softmax *s, const struct reference_history *h,
                                   const float *q, int kv, int begin, int end) {
    double scores[BACKEND_ATTENTION_PIECE], top = -INFINITY;
    for (int p = begin; p < end; p++) {
        const float *k = reference_head(h, p, h->n_heads + kv);
        double dot = 0;
        for (int d = 0; d < h->head_dim; d++) {
            dot += (double)bf16_to_f32(bf16_from_f32(q[d])) * bf16_to_f32(bf16_from_f32(k[d]));
        }
        scores[p - begin] = dot / sqrt(h->head_dim);
        top = fmax(top, scores[p - begin]);
    }
    double largest = s->sum > 0 ? fmax(s->largest, top) : top;
    reference_rescale(s, largest, h->head_dim);
    for (int p = begin; p < end; p++) {
        const float *v = reference_head(h, p, h->n_heads + h->n_kv + kv);
        double weight = bf16_to_f32(bf16_from_f32((float)exp(scores[p - begin] - top)));
        weight *= exp(top - largest);
        s->sum += weight;
        s->heaviest = fmax(s->heaviest, weight);
        for (int d = 0; d < h->head_dim; d++) {
            double value = bf16_to_f32(bf16_from_f32(v[d]));
            s->values[d] += weight * value;
            s->magnitude = fmax(s->magnitude, fabs(value));
        }
    }
}

/* out[head_dim] for the query at `position`, head `head`, reading KV head kv. Returns the bound:
 * f32 sums of up to 256 terms, and a few weights that round to the other neighbour (2^-7 each). */
static inline double reference_attention(double *out, const struct reference_history *h,
                                         int position, int head, int kv, int window) {
    struct reference_softmax s = {0};
    int first = window > 0 && position >= window ? position - window + 1 : 0;
    for (int begin = first; begin <= position;) {
        int end = (begin / BACKEND_ATTENTION_PIECE + 1) * BACKEND_ATTENTION_PIECE;
        if (end > position + 1) end = position + 1;
        reference_piece(&s, h, reference_head(h, position, head), kv, begin, end);
        begin = end;
    }
    for (int d = 0; d < h->head_dim; d++) out[d] = s.values[d] / s.sum;
    double magnitude = 4; /* of any value: the tests' inputs stay below */
    return magnitude * (2e-5 + 3 * 0x1p-7 * s.heaviest / s.sum);
}
