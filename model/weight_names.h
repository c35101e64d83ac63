/* What each tensor of a checkpoint is called in Hugging Face files, and which shape the config
 * gives it. The one table shared by reading (checkpoint.c) and writing (tandem-bench make-model).
 * Pure. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "model/checkpoint.h"

enum { WEIGHT_NAME_MAX = 96 };

/* Whether the role belongs to every decoder layer; otherwise it is there once. */
bool weight_is_per_layer(enum checkpoint_role role);

/* Whether the config calls for it as a tensor of its own (a tied LM head is not). */
bool weight_is_used(enum checkpoint_role role, const struct model_config *config);

/* "model.layers.3.mlp.up_proj.weight"; `layer` is ignored for roles that are there once. */
void weight_name(char out[WEIGHT_NAME_MAX], enum checkpoint_role role, int layer);

/* Rows and columns; a vector has cols 0. */
void weight_shape(int64_t *rows, int64_t *cols, enum checkpoint_role role,
                  const struct model_config *config);
