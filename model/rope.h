/* The angular frequencies of rotary position embedding (Su et al., "RoFormer", 2021), with the
 * scalings that checkpoints name: linear, and llama3 (long wavelengths stretched, short ones kept,
 * a smooth blend between). Pure. */
#pragma once
#include "model/config.h"

/* out[head_dim / 2]: radians per position of pair (i, i + head_dim / 2), scaling applied. */
void model_rope_inv_freq(float *out, const struct model_config *config);
