/* Draws on the device: from rows of logits to tokens, their log-probabilities, and the verdict walk over
 * chains, without the host in between. Contracts: backend_sample_begin and its kin in backend.h. */
#pragma once
#include "common/error.h"
#include "kernels/sample_draw.h"

struct cuda_sampler;

/* Up to max_draws in a batch, on the stream (a cudaStream_t, borrowed). RESOURCE_EXHAUSTED when memory
 * runs out. */
enum status cuda_sampler_create(struct cuda_sampler **out, void *stream, int max_draws,
                                struct error *err);
void cuda_sampler_destroy(struct cuda_sampler *sampler);
/* As backend_sample_reserve. */
enum status cuda_sampler_reserve(struct cuda_sampler *sampler, int n_rows, int vocab, struct error *err);

/* Enqueues draw i from row i of `logits` [n, stride] (device, destroyed). Draw i's token goes to
 * tokens_out[i] (device) as well. Draws and what they point at may be reused at return. */
enum status cuda_sampler_enqueue(struct cuda_sampler *sampler, float *logits, size_t stride, int vocab,
                                 const struct sample_draw *draws, int n, int32_t *tokens_out,
                                 struct error *err);

/* Waits for the last batch. INTERNAL with CUDA's words when the device failed. */
enum status cuda_sampler_collect(struct cuda_sampler *sampler, struct sample_result *results,
                                 struct error *err);

/* Both wait; logits is one row on the device and stays as it is, `out` is the host's. */
enum status cuda_sampler_distribution(struct cuda_sampler *sampler, float *out, const float *logits,
                                      int vocab, const struct sample_draw *draw, struct error *err);
enum status cuda_sampler_logprobs(struct cuda_sampler *sampler, struct sample_result *out,
                                  const float *logits, int vocab, int n_top, int32_t token,
                                  struct error *err);
