/* Writing random weights as safetensors, a few hundred MB/s: generated into one buffer, streamed
 * out. */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/make_model.h"
#include "model/weight_names.h"

enum { BUFFER_BYTES = 1 << 20, ALIGNMENT = 64 };

/* --- the numbers ---------------------------------------------------------------------------- */

/* SplitMix64's finaliser: every bit of the input reaches every bit of the output. */
static uint64_t mix_bits(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static uint64_t tensor_key(uint64_t seed, const char *name) {
    uint64_t hash = mix_bits(seed + 0x9e3779b97f4a7c15u);
    for (; *name; name++) hash = mix_bits(hash ^ (uint8_t)*name) + 0x9e3779b97f4a7c15u;
    return hash;
}

/* Round to nearest even; for finite values below 65504, which weights are. */
static uint16_t f16_from_f32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x38800000u) { /* below 2^-14: a multiple of 2^-24 */
        return (uint16_t)(sign | (uint32_t)lrintf(fabsf(value) * 0x1p24f));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | ((magnitude >> 13) - (112u << 10)));
}

/* Elements first .. first + n - 1 of the tensor with this key: uniform over mean +- width. first
 * is a multiple of 4; four elements share one hash. */
static void fill(void *out, enum dtype dtype, uint64_t key, uint64_t first, size_t n, float mean,
                 float width) {
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = mix_bits(key + (first + i) / 4 * 0x9e3779b97f4a7c15u);
        uint32_t field = bits >> (first + i) % 4 * 16 & 0xffffu;
        float value = mean + width * (((float)field - 32767.5f) * 0x1p-15f);
        if (dtype == DTYPE_BF16) {
            ((uint16_t *)out)[i] = bf16_from_f32(value);
        } else if (dtype == DTYPE_F16) {
            ((uint16_t *)out)[i] = f16_from_f32(value);
        } else {
            ((float *)out)[i] = value;
        }
    }
}

/* Mean and standard deviation by role: matrices keep the size of what passes through them, logits
 * have a deviation of 4 (a real model's certainty), norms are near 1. */
static void scale_of(float *mean, float *deviation, enum checkpoint_role role, int layer,
                     int64_t cols, const struct make_model_weights *weights) {
    float logits = 4.0f / sqrtf((float)weights->config->hidden);
    *mean = 0;
    switch (role) {
    case CHECKPOINT_EMBEDDING:
        *deviation = weights->config->tied_embeddings ? logits : 1;
        return;
    case CHECKPOINT_LM_HEAD: *deviation = logits; return;
    case CHECKPOINT_FINAL_NORM:
    case CHECKPOINT_ATTN_NORM:
    case CHECKPOINT_MLP_NORM:
    case CHECKPOINT_Q_NORM:
    case CHECKPOINT_K_NORM: *mean = 1; /* fallthrough */
    case CHECKPOINT_Q_BIAS:
    case CHECKPOINT_K_BIAS:
    case CHECKPOINT_V_BIAS:
    case CHECKPOINT_O_BIAS: *deviation = 0.1f; return;
    default: break;
    }
    *deviation = 1.0f / sqrtf((float)cols);
    bool output = role == CHECKPOINT_O || role == CHECKPOINT_DOWN;
    if (output && layer >= weights->scaled_from) *deviation *= weights->scale;
}

/* --- layout --------------------------------------------------------------------------------- */

struct planned_tensor {
    enum checkpoint_role role;
    int layer;
    int64_t rows, cols; /* cols 0: a vector */
    int64_t n_bytes;
    int file;
};

struct plan {
    struct planned_tensor *tensors;
    int n_tensors, n_files;
    int64_t n_bytes;
};

static void plan_tensor(struct plan *plan, enum checkpoint_role role, int layer,
                        const struct make_model_weights *weights, int64_t *file_bytes) {
    if (!weight_is_used(role, weights->config)) return;
    struct planned_tensor *tensor = &plan->tensors[plan->n_tensors++];
    *tensor = (struct planned_tensor){.role = role, .layer = layer};
    weight_shape(&tensor->rows, &tensor->cols, role, weights->config);
    int64_t elements = tensor->rows * (tensor->cols == 0 ? 1 : tensor->cols);
    tensor->n_bytes = elements * (int64_t)dtype_bytes(weights->dtype);
    if (*file_bytes > 0 && *file_bytes + tensor->n_bytes > weights->shard_bytes) {
        plan->n_files++;
        *file_bytes = 0;
    }
    tensor->file = plan->n_files;
    *file_bytes += tensor->n_bytes;
    plan->n_bytes += tensor->n_bytes;
}

/* All tensors in the order in which a forward pass meets them, cut into files. */
static void plan_make(struct plan *plan, const struct make_model_weights *weights) {
    int n_layers = weights->config->n_layers;
    *plan = (struct plan){0};
    plan->tensors = xcalloc((size_t)CHECKPOINT_N_ROLES * (size_t)(n_layers + 1),
                            sizeof *plan->tensors);
    int64_t file_bytes = 0;
    plan_tensor(plan, CHECKPOINT_EMBEDDING, 0, weights, &file_bytes);
    for (int layer = 0; layer < n_layers; layer++) {
        for (int role = 0; role < CHECKPOINT_N_ROLES; role++) {
            if (!weight_is_per_layer((enum checkpoint_role)role)) continue;
            plan_tensor(plan, (enum checkpoint_role)role, layer, weights, &file_bytes);
        }
    }
    plan_tensor(plan, CHECKPOINT_FINAL_NORM, 0, weights, &file_bytes);
    plan_tensor(plan, CHECKPOINT_LM_HEAD, 0, weights, &file_bytes);
    plan->n_files++;
}

static void file_name(char out[64], const struct plan *plan, int file) {
    if (plan->n_files == 1) {
        snprintf(out, 64, "model.safetensors");
    } else {
        snprintf(out, 64, "model-%05d-of-%05d.safetensors", file + 1, plan->n_files);
    }
}

/* --- writing -------------------------------------------------------------------------------- */

static enum status write_failed(const char *path, struct error *err) {
    return error_set(err, STATUS_INTERNAL, "%s: cannot write: %s", path, strerror(errno));
}

/* The JSON header of one file, padded with blanks so that the data is aligned. */
static char *make_header(const struct plan *plan, int file, enum dtype dtype, size_t *n_bytes) {
    static const char *const names[] = {[DTYPE_F32] = "F32", [DTYPE_F16] = "F16",
                                        [DTYPE_BF16] = "BF16"};
    char *text = NULL;
    FILE *stream = open_memstream(&text, n_bytes);
    CHECK(stream != NULL);
    int64_t at = 0;
    fprintf(stream, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < plan->n_tensors; i++) {
        const struct planned_tensor *tensor = &plan->tensors[i];
        if (tensor->file != file) continue;
        char name[WEIGHT_NAME_MAX];
        weight_name(name, tensor->role, tensor->layer);
        fprintf(stream, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%" PRId64, name, names[dtype],
                tensor->rows);
        if (tensor->cols > 0) fprintf(stream, ",%" PRId64, tensor->cols);
        fprintf(stream, "],\"data_offsets\":[%" PRId64 ",%" PRId64 "]}", at, at + tensor->n_bytes);
        at += tensor->n_bytes;
    }
    fprintf(stream, "}");
    for (long n = ftell(stream) + 8; n % ALIGNMENT != 0; n++) fputc(' ', stream);
    CHECK(fclose(stream) == 0);
    return text;
}

static bool write_header(FILE *stream, const struct plan *plan, int file, enum dtype dtype) {
    size_t n_bytes;
    char *header = make_header(plan, file, dtype, &n_bytes);
    uint8_t length[8];
    for (int i = 0; i < 8; i++) length[i] = (uint8_t)((uint64_t)n_bytes >> 8 * i);
    bool written = fwrite(length, 1, sizeof length, stream) == sizeof length &&
                   fwrite(header, 1, n_bytes, stream) == n_bytes;
    free(header);
    return written;
}

static bool write_tensor(FILE *stream, const struct planned_tensor *tensor,
                         const struct make_model_weights *weights, void *buffer) {
    char name[WEIGHT_NAME_MAX];
    weight_name(name, tensor->role, tensor->layer);
    uint64_t key = tensor_key(weights->seed, name);
    float mean, deviation;
    scale_of(&mean, &deviation, tensor->role, tensor->layer, tensor->cols, weights);
    size_t element = dtype_bytes(weights->dtype), chunk = BUFFER_BYTES / element;
    size_t n = (size_t)tensor->n_bytes / element;
    for (size_t done = 0; done < n; done += chunk) {
        size_t now = n - done < chunk ? n - done : chunk;
        fill(buffer, weights->dtype, key, done, now, mean, deviation * sqrtf(3.0f));
        if (fwrite(buffer, element, now, stream) != now) return false;
    }
    return true;
}

static enum status write_file(const struct plan *plan, int file,
                              const struct make_model_weights *weights, struct error *err) {
    char name[64], path[PATH_MAX];
    file_name(name, plan, file);
    snprintf(path, sizeof path, "%s/%s", weights->dir, name);
    FILE *stream = fopen(path, "wb");
    if (stream == NULL) return write_failed(path, err);
    void *buffer = xmalloc(BUFFER_BYTES);
    bool written = write_header(stream, plan, file, weights->dtype);
    for (int i = 0; i < plan->n_tensors && written; i++) {
        if (plan->tensors[i].file != file) continue;
        written = write_tensor(stream, &plan->tensors[i], weights, buffer);
    }
    free(buffer);
    if (fclose(stream) != 0) written = false;
    return written ? STATUS_OK : write_failed(path, err);
}

static enum status write_index(const struct plan *plan, const char *path, struct error *err) {
    FILE *stream = fopen(path, "w");
    if (stream == NULL) return write_failed(path, err);
    fprintf(stream, "{\n  \"metadata\": {\"total_size\": %" PRId64 "},\n  \"weight_map\": {",
            plan->n_bytes);
    for (int i = 0; i < plan->n_tensors; i++) {
        char name[WEIGHT_NAME_MAX], file[64];
        weight_name(name, plan->tensors[i].role, plan->tensors[i].layer);
        file_name(file, plan, plan->tensors[i].file);
        fprintf(stream, "%s\n    \"%s\": \"%s\"", i > 0 ? "," : "", name, file);
    }
    fprintf(stream, "\n  }\n}\n");
    bool failed = ferror(stream) != 0;
    if (fclose(stream) != 0) failed = true;
    return failed ? write_failed(path, err) : STATUS_OK;
}

enum status make_model_write_weights(const struct make_model_weights *weights, int64_t *n_bytes,
                                     struct error *err) {
    char single[PATH_MAX], index[PATH_MAX];
    snprintf(single, sizeof single, "%s/model.safetensors", weights->dir);
    snprintf(index, sizeof index, "%s/model.safetensors.index.json", weights->dir);
    unlink(single);
    unlink(index);
    struct plan plan;
    plan_make(&plan, weights);
    *n_bytes = plan.n_bytes;
    enum status status = STATUS_OK;
    for (int file = 0; file < plan.n_files && status == STATUS_OK; file++) {
        status = write_file(&plan, file, weights, err);
    }
    if (status == STATUS_OK && plan.n_files > 1) status = write_index(&plan, index, err);
    free(plan.tensors);
    return status;
}
