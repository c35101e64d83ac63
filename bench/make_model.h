/* tandem-bench make-model: random weights of any shape, written as an ordinary Hugging Face
 * folder, or a pair of folders of which the draft agrees with the target as often as asked for.
 *
 * Weights are a pure function of seed, tensor name and index, uniform around 0 at the scale that
 * keeps activations near unit size: the same command writes the same bytes anywhere. A draft made
 * of the target's first layers therefore needs no copying: the same names give the same numbers. */
#pragma once
#include <stdint.h>

#include "common/error.h"
#include "model/config.h"

/* The subcommand; argv[0] is its name. Returns the process's exit status: 0, 1 for a failure, 2 for
 * wrong usage. */
int bench_make_model(int argc, char **argv);

struct make_model_weights {
    const char *dir; /* exists */
    const struct model_config *config;
    enum dtype dtype;     /* BF16, F16 or F32 */
    uint64_t seed;
    int64_t shard_bytes;  /* data of one file at most, where a single tensor is not larger */
    int scaled_from;      /* from this layer on o_proj and down_proj are multiplied by `scale` */
    float scale;
};

/* Writes model.safetensors, or numbered files and their index; removes what an earlier run left
 * under those names. *n_bytes: data written. INTERNAL with path and reason when writing fails. */
enum status make_model_write_weights(const struct make_model_weights *weights, int64_t *n_bytes,
                                     struct error *err);

/* Writes tokenizer.json and tokenizer_config.json: byte-level BPE of exactly `vocab` tokens: 256
 * bytes, made-up words of two to four letters, and BOS and EOS as the last two ids.
 * INVALID_ARGUMENT when the vocabulary is too small or too large for that. */
enum status make_model_write_tokenizer(const char *dir, int vocab, struct error *err);

/* Copies both files from another folder; finds its BOS and EOS ids (-1: none) and its size. */
enum status make_model_copy_tokenizer(const char *dir, const char *from, int *bos, int *eos,
                                      int *size, struct error *err);
