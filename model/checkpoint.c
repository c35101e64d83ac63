#include "model/checkpoint.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "common/log.h"
#include "model/json.h"
#include "model/safetensors.h"
#include "model/weight_names.h"

enum { MAX_INDEX_BYTES = 256 << 20 };

struct checkpoint {
    struct model_config config;
    char *dir;
    struct safetensors **files; /* sorted by path */
    size_t n_files;
    json_t *weight_map; /* tensor name -> file name; NULL for a single file */
    struct checkpoint_tensor whole[CHECKPOINT_N_ROLES];      /* roles that are there once */
    struct checkpoint_tensor (*layers)[CHECKPOINT_N_ROLES];  /* [n_layers] */
    uint64_t fingerprint;
};

/* --- files ---------------------------------------------------------------------------------- */

static enum status add_file(struct checkpoint *checkpoint, const char *name, struct error *err) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", checkpoint->dir, name);
    size_t bytes = (checkpoint->n_files + 1) * sizeof(struct safetensors *);
    checkpoint->files = xrealloc(checkpoint->files, bytes);
    TRY(safetensors_open(&checkpoint->files[checkpoint->n_files], path, err));
    checkpoint->n_files++;
    return STATUS_OK;
}

static struct safetensors *find_file(const struct checkpoint *checkpoint, const char *name) {
    for (size_t i = 0; i < checkpoint->n_files; i++) {
        const char *slash = strrchr(checkpoint->files[i]->path, '/');
        if (strcmp(slash + 1, name) == 0) return checkpoint->files[i];
    }
    return NULL;
}

static int compare_path(const void *a, const void *b) {
    const struct safetensors *const *x = a, *const *y = b;
    return strcmp((*x)->path, (*y)->path);
}

/* A shard's name as the index may give it: a file of this folder, nothing above or below. */
static enum status check_shard_name(const char *index, const char *tensor, const json_t *value,
                                    struct error *err) {
    const char *name = json_string_value(value);
    size_t n = name != NULL ? strlen(name) : 0;
    if (n > 0 && n < NAME_MAX && strchr(name, '/') == NULL && name[0] != '.') return STATUS_OK;
    char seen[120];
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "%s: field weight_map.\"%.150s\" is %s; expected the name of a file in the "
                     "same folder", index, tensor, json_show(seen, sizeof seen, value));
}

static enum status open_mapped_files(struct checkpoint *checkpoint, const char *index,
                                     struct error *err) {
    const char *tensor;
    json_t *value;
    json_object_foreach(checkpoint->weight_map, tensor, value) {
        TRY(check_shard_name(index, tensor, value, err));
        const char *name = json_string_value(value);
        struct safetensors *file = find_file(checkpoint, name);
        if (file == NULL) {
            enum status status = add_file(checkpoint, name, err);
            if (status == STATUS_NOT_FOUND) {
                return error_set(err, status, "%s: names the file %s, which is not in the folder",
                                 index, name);
            }
            if (status != STATUS_OK) return status;
            file = checkpoint->files[checkpoint->n_files - 1];
        }
        if (safetensors_find(file, tensor) == NULL) {
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "%s: places tensor \"%.150s\" in %s, which does not have it", index,
                             tensor, name);
        }
    }
    qsort(checkpoint->files, checkpoint->n_files, sizeof *checkpoint->files, compare_path);
    return STATUS_OK;
}

static enum status read_index(struct checkpoint *checkpoint, const char *path, struct error *err) {
    char *text;
    size_t n_bytes;
    TRY(json_read_file(&text, &n_bytes, path, MAX_INDEX_BYTES, err));
    json_t *root;
    enum status status = json_parse(&root, path, text, n_bytes, err);
    free(text);
    if (status != STATUS_OK) return status;
    json_t *map = json_object_get(root, "weight_map");
    if (json_is_object(map) && json_object_size(map) > 0) {
        checkpoint->weight_map = json_incref(map);
    } else {
        status = error_set(err, STATUS_INVALID_ARGUMENT,
                           "%s: field weight_map is missing or empty; expected an object from "
                           "tensor names to file names", path);
    }
    json_decref(root);
    return status;
}

static enum status open_files(struct checkpoint *checkpoint, struct error *err) {
    char single[PATH_MAX], index[PATH_MAX];
    snprintf(single, sizeof single, "%s/model.safetensors", checkpoint->dir);
    snprintf(index, sizeof index, "%s/model.safetensors.index.json", checkpoint->dir);
    if (access(single, F_OK) == 0) return add_file(checkpoint, "model.safetensors", err);
    if (access(index, F_OK) != 0) {
        return error_set(err, STATUS_NOT_FOUND,
                         "%s: has neither model.safetensors nor model.safetensors.index.json; "
                         "expected a Hugging Face folder with safetensors weights",
                         checkpoint->dir);
    }
    TRY(read_index(checkpoint, index, err));
    return open_mapped_files(checkpoint, index, err);
}

/* --- tensors -------------------------------------------------------------------------------- */

static const struct safetensors_tensor *find_tensor(const struct checkpoint *checkpoint,
                                                    const struct safetensors **file,
                                                    const char *name) {
    *file = checkpoint->files[0];
    if (checkpoint->weight_map != NULL) {
        const char *where = json_string_value(json_object_get(checkpoint->weight_map, name));
        if (where == NULL) return NULL;
        *file = find_file(checkpoint, where);
    }
    return safetensors_find(*file, name);
}

static enum status check_shape(const struct safetensors *file,
                               const struct safetensors_tensor *tensor, int64_t rows, int64_t cols,
                               struct error *err) {
    int n_dims = cols == 0 ? 1 : 2;
    bool same = tensor->n_dims == n_dims && tensor->shape[0] == rows &&
                (n_dims == 1 || tensor->shape[1] == cols);
    if (same) return STATUS_OK;
    char seen[200] = "[", expected[64];
    size_t n = 1;
    for (int i = 0; i < tensor->n_dims; i++) {
        n += (size_t)snprintf(seen + n, sizeof seen - n, "%s%" PRId64, i ? ", " : "",
                              tensor->shape[i]);
    }
    snprintf(seen + n, sizeof seen - n, "]");
    if (n_dims == 1) {
        snprintf(expected, sizeof expected, "[%" PRId64 "]", rows);
    } else {
        snprintf(expected, sizeof expected, "[%" PRId64 ", %" PRId64 "]", rows, cols);
    }
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "%s: shape of \"%s\" is %s; expected %s, as config.json says", file->path,
                     tensor->name, seen, expected);
}

static enum status read_dtype(enum dtype *out, const struct safetensors *file,
                              const struct safetensors_tensor *tensor, struct error *err) {
    static const struct {
        const char *name;
        enum dtype dtype;
    } readable[] = {{"BF16", DTYPE_BF16}, {"F16", DTYPE_F16}, {"F32", DTYPE_F32}};
    for (size_t i = 0; i < sizeof readable / sizeof *readable; i++) {
        if (strcmp(tensor->dtype, readable[i].name) == 0) {
            *out = readable[i].dtype;
            return STATUS_OK;
        }
    }
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "%s: dtype of \"%s\" is %s; expected BF16, F16 or F32", file->path,
                     tensor->name, tensor->dtype);
}

static enum status bind_tensor(struct checkpoint *checkpoint, enum checkpoint_role role, int layer,
                               struct error *err) {
    char name[WEIGHT_NAME_MAX];
    weight_name(name, role, layer);
    const struct safetensors *file;
    const struct safetensors_tensor *tensor = find_tensor(checkpoint, &file, name);
    if (tensor == NULL) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: tensor \"%s\" is missing; config.json (%s, %d layers) calls for it",
                         checkpoint->weight_map == NULL ? checkpoint->files[0]->path
                                                        : checkpoint->dir,
                         name, model_family_name(checkpoint->config.family),
                         checkpoint->config.n_layers);
    }
    int64_t rows, cols;
    weight_shape(&rows, &cols, role, &checkpoint->config);
    TRY(check_shape(file, tensor, rows, cols, err));
    struct checkpoint_tensor *out = weight_is_per_layer(role) ? &checkpoint->layers[layer][role]
                                                              : &checkpoint->whole[role];
    out->data = file->data + tensor->begin;
    out->rows = rows;
    out->cols = cols == 0 ? 1 : cols;
    return read_dtype(&out->dtype, file, tensor, err);
}

static enum status bind_tensors(struct checkpoint *checkpoint, struct error *err) {
    const struct model_config *config = &checkpoint->config;
    checkpoint->layers = xcalloc((size_t)config->n_layers, sizeof *checkpoint->layers);
    for (int i = 0; i < CHECKPOINT_N_ROLES; i++) {
        enum checkpoint_role role = (enum checkpoint_role)i;
        if (!weight_is_used(role, config)) continue;
        int n = weight_is_per_layer(role) ? config->n_layers : 1;
        for (int layer = 0; layer < n; layer++) TRY(bind_tensor(checkpoint, role, layer, err));
    }
    if (config->tied_embeddings) {
        checkpoint->whole[CHECKPOINT_LM_HEAD] = checkpoint->whole[CHECKPOINT_EMBEDDING];
    }
    return STATUS_OK;
}

/* --- tensors that nobody asked for ------------------------------------------------------------ */

enum extra { EXTRA_USED, EXTRA_HARMLESS, EXTRA_UNKNOWN, EXTRA_CHANGES_RESULT };

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static enum extra classify_layer_tensor(const struct model_config *config, const char *name,
                                        int layer) {
    for (int i = 0; i < CHECKPOINT_N_ROLES; i++) {
        enum checkpoint_role role = (enum checkpoint_role)i;
        if (!weight_is_per_layer(role)) continue;
        char known[WEIGHT_NAME_MAX];
        weight_name(known, role, layer);
        if (strcmp(name, known) != 0) continue;
        return weight_is_used(role, config) ? EXTRA_USED : EXTRA_CHANGES_RESULT;
    }
    return ends_with(name, ".bias") ? EXTRA_CHANGES_RESULT : EXTRA_UNKNOWN;
}

static enum extra classify(const struct model_config *config, const char *name) {
    static const char *const whole[] = {"model.embed_tokens.weight", "model.norm.weight"};
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) {
        if (strcmp(name, whole[i]) == 0) return EXTRA_USED;
    }
    if (strcmp(name, "lm_head.weight") == 0) {
        return config->tied_embeddings ? EXTRA_HARMLESS : EXTRA_USED;
    }
    if (strcmp(name, "lm_head.bias") == 0) return EXTRA_CHANGES_RESULT;
    if (ends_with(name, "rotary_emb.inv_freq")) return EXTRA_HARMLESS;
    int layer = -1;
    if (sscanf(name, "model.layers.%9d.", &layer) == 1 && layer >= 0 && layer < config->n_layers) {
        return classify_layer_tensor(config, name, layer);
    }
    return EXTRA_UNKNOWN;
}

/* Weights that the config does not account for but whose family would add them to the result are
 * refused (a bias with attention_bias false); others are reported and left alone. */
static enum status check_extras(const struct checkpoint *checkpoint, struct error *err) {
    size_t n_unknown = 0;
    const char *first = NULL;
    for (size_t i = 0; i < checkpoint->n_files; i++) {
        const struct safetensors *file = checkpoint->files[i];
        for (size_t j = 0; j < file->n_tensors; j++) {
            const char *name = file->tensors[j].name;
            enum extra extra = classify(&checkpoint->config, name);
            if (extra == EXTRA_CHANGES_RESULT) {
                return error_set(err, STATUS_INVALID_ARGUMENT,
                                 "%s: has tensor \"%.150s\", which config.json does not account "
                                 "for; leaving it out would change the results", file->path, name);
            }
            if (extra == EXTRA_HARMLESS) log_debug("%s: tensor %s is not used", file->path, name);
            if (extra == EXTRA_UNKNOWN && n_unknown++ == 0) first = name;
        }
    }
    if (n_unknown > 0) {
        log_warn("%s: %zu tensors are unknown and not used, the first is \"%.150s\"",
                 checkpoint->dir, n_unknown, first);
    }
    return STATUS_OK;
}

/* --- identity ------------------------------------------------------------------------------- */

static void hash_config(XXH3_state_t *state, const struct model_config *c) {
    const int numbers[] = {c->family,     c->hidden,       c->n_layers,     c->n_heads,
                           c->n_kv_heads, c->head_dim,     c->intermediate, c->vocab,
                           c->max_position, c->sliding_window, c->rope.scaling,
                           c->rope.original_max_position,  c->tied_embeddings, c->qkv_bias,
                           c->o_bias,     c->qk_norm,      c->bos,          c->n_eos};
    const float reals[] = {c->rms_eps, c->rope.theta, c->rope.factor, c->rope.low_freq_factor,
                           c->rope.high_freq_factor};
    XXH3_64bits_update(state, numbers, sizeof numbers);
    XXH3_64bits_update(state, reals, sizeof reals);
    XXH3_64bits_update(state, c->eos, (size_t)c->n_eos * sizeof *c->eos);
}

static uint64_t compute_fingerprint(const struct checkpoint *checkpoint) {
    XXH3_state_t *state = XXH3_createState();
    CHECK(state != NULL);
    XXH3_64bits_reset(state);
    hash_config(state, &checkpoint->config);
    for (size_t i = 0; i < checkpoint->n_files; i++) {
        const struct safetensors *file = checkpoint->files[i];
        uint64_t n_bytes = file->n_bytes;
        XXH3_64bits_update(state, &n_bytes, sizeof n_bytes);
        XXH3_64bits_update(state, file->bytes, file->header_bytes);
    }
    uint64_t hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    return hash;
}

/* --- the checkpoint --------------------------------------------------------------------------- */

enum status checkpoint_open(struct checkpoint **out, const char *dir, struct error *err) {
    struct checkpoint *checkpoint = xcalloc(1, sizeof *checkpoint);
    checkpoint->dir = xstrdup(dir);
    enum status status;
    TRY_OR_FAIL(model_config_load(&checkpoint->config, dir, err));
    TRY_OR_FAIL(open_files(checkpoint, err));
    TRY_OR_FAIL(bind_tensors(checkpoint, err));
    TRY_OR_FAIL(check_extras(checkpoint, err));
    checkpoint->fingerprint = compute_fingerprint(checkpoint);
    *out = checkpoint;
    return STATUS_OK;

fail:
    checkpoint_close(checkpoint);
    return status;
}

void checkpoint_close(struct checkpoint *checkpoint) {
    if (checkpoint == NULL) return;
    for (size_t i = 0; i < checkpoint->n_files; i++) safetensors_close(checkpoint->files[i]);
    free(checkpoint->files);
    json_decref(checkpoint->weight_map);
    free(checkpoint->layers);
    free(checkpoint->dir);
    free(checkpoint);
}

const struct model_config *checkpoint_config(const struct checkpoint *checkpoint) {
    return &checkpoint->config;
}

struct checkpoint_tensor checkpoint_tensor(const struct checkpoint *checkpoint,
                                           enum checkpoint_role role, int layer) {
    CHECK(role >= 0 && role < CHECKPOINT_N_ROLES);
    struct checkpoint_tensor tensor = checkpoint->whole[role];
    if (weight_is_per_layer(role)) {
        CHECK(layer >= 0 && layer < checkpoint->config.n_layers);
        tensor = checkpoint->layers[layer][role];
    }
    CHECK(tensor.data != NULL);
    return tensor;
}

uint64_t checkpoint_parameters(const struct checkpoint *checkpoint) {
    const struct model_config *config = &checkpoint->config;
    uint64_t n = 0;
    for (int i = 0; i < CHECKPOINT_N_ROLES; i++) {
        enum checkpoint_role role = (enum checkpoint_role)i;
        if (!weight_is_used(role, config)) continue;
        int64_t rows, cols;
        weight_shape(&rows, &cols, role, config);
        uint64_t copies = weight_is_per_layer(role) ? (uint64_t)config->n_layers : 1;
        n += copies * (uint64_t)rows * (uint64_t)(cols == 0 ? 1 : cols);
    }
    return n;
}

uint64_t checkpoint_fingerprint(const struct checkpoint *checkpoint) {
    return checkpoint->fingerprint;
}
