/* tandem-bench make-model: what it writes opens as a checkpoint, is the same every time, and a
 * pair is one model and its first layers. The sources are included: the bench is a program, not a
 * library. */
#include "bench/make_model.c"
#include "bench/make_model_tokenizer.c"
#include "bench/make_model_weights.c"

#include <math.h>

#include "model/checkpoint.h"
#include "tests/unit/checkpoint_files.h"
#include "tests/unit/test.h"

enum { MAX_ARGS = 32 };

/* Runs make-model with `options` (words separated by blanks) and --out dir; output is discarded. */
static int make_in(const char *dir, const char *options) {
    char words[1024];
    char *argv[MAX_ARGS + 1] = {"make-model", "--out", (char *)dir};
    int argc = dir != NULL ? 3 : 1;
    snprintf(words, sizeof words, "%s", options);
    for (char *rest = words, *word; (word = strtok_r(rest, " ", &rest)) != NULL;) {
        if (argc < MAX_ARGS) argv[argc++] = word;
    }
    return bench_make_model(argc, argv);
}

static struct checkpoint *open_made(const char *dir) {
    struct checkpoint *checkpoint = NULL;
    struct error err = {0};
    if (checkpoint_open(&checkpoint, dir, &err) != STATUS_OK) printf("%s\n", err.text);
    return checkpoint;
}

static double deviation_of(struct checkpoint_tensor tensor, double mean) {
    double sum = 0;
    int64_t n = tensor.rows * tensor.cols;
    for (int64_t i = 0; i < n; i++) {
        double value = dtype_load_f32(tensor.data, tensor.dtype, (size_t)i) - mean;
        sum += value * value;
    }
    return sqrt(sum / (double)n);
}

static bool same_tensor(struct checkpoint_tensor a, struct checkpoint_tensor b) {
    size_t n_bytes = (size_t)(a.rows * a.cols) * dtype_bytes(a.dtype);
    return a.dtype == b.dtype && a.rows == b.rows && a.cols == b.cols &&
           memcmp(a.data, b.data, n_bytes) == 0;
}

Test(make_model, writes_every_family_and_dtype) {
    static const struct {
        const char *options;
        enum model_family family;
        enum dtype dtype;
    } cases[] = {
        {"--family llama --dtype bf16", MODEL_LLAMA, DTYPE_BF16},
        {"--family mistral --dtype f16 --tied", MODEL_MISTRAL, DTYPE_F16},
        {"--family qwen2 --dtype f32 --heads 14 --kv-heads 2 --head-dim 8", MODEL_QWEN2, DTYPE_F32},
        {"--family qwen3 --layers 1 --vocab 258 --ffn 100", MODEL_QWEN3, DTYPE_BF16},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[64], options[256];
        files_make(dir, NULL);
        snprintf(options, sizeof options, "--shape tiny %s", cases[i].options);
        cr_assert_eq(make_in(dir, options), 0);
        struct checkpoint *checkpoint = open_made(dir);
        cr_assert_not_null(checkpoint);
        const struct model_config *config = checkpoint_config(checkpoint);
        cr_assert_eq(config->family, cases[i].family);
        cr_assert_eq(config->sliding_window, 0);
        cr_assert_eq(config->bos, config->vocab - 2);
        cr_assert_eq(config->n_eos, 1);
        cr_assert_eq(config->eos[0], config->vocab - 1);
        struct checkpoint_tensor q = checkpoint_tensor(checkpoint, CHECKPOINT_Q, 0);
        cr_assert_eq(q.dtype, cases[i].dtype);
        cr_assert(fabs(deviation_of(q, 0) * sqrt(config->hidden) - 1) < 0.05);
        struct checkpoint_tensor norm = checkpoint_tensor(checkpoint, CHECKPOINT_MLP_NORM, 0);
        cr_assert(fabs(deviation_of(norm, 1) / 0.1 - 1) < 0.3);
        struct checkpoint_tensor head = checkpoint_tensor(checkpoint, CHECKPOINT_LM_HEAD, 0);
        cr_assert(fabs(deviation_of(head, 0) * sqrt(config->hidden) / 4 - 1) < 0.05);
        checkpoint_close(checkpoint);
        files_remove(dir);
    }
}

Test(make_model, known_shapes_have_their_sizes) {
    char dir[64];
    files_make(dir, NULL);
    cr_assert_eq(make_in(dir, "--layers 1"), 0); /* the default shape is 216m */
    struct checkpoint *checkpoint = open_made(dir);
    cr_assert_not_null(checkpoint);
    cr_assert_eq(checkpoint_parameters(checkpoint),
                 2048 * 1024 + 1024 * 1024 + 3 * 3072 * 1024 + 3 * 1024 + 2 * 32000 * 1024);
    cr_assert(!checkpoint_config(checkpoint)->tied_embeddings);
    checkpoint_close(checkpoint);
    const char *narrow = "--shape llama-3.2-1b --hidden 64 --ffn 64 --layers 1 --vocab 300";
    cr_assert_eq(make_in(dir, narrow), 0);
    checkpoint = open_made(dir);
    cr_assert_not_null(checkpoint);
    const struct model_config *config = checkpoint_config(checkpoint);
    cr_assert_eq(config->rope.scaling, MODEL_ROPE_LLAMA3);
    cr_assert_eq(config->rope.factor, 32.0f);
    cr_assert_eq(config->n_heads, 32);
    cr_assert_eq(config->head_dim, 64);
    cr_assert(config->tied_embeddings);
    checkpoint_close(checkpoint);
    files_remove(dir);
}

static uint64_t hash_of_weights(const char *dir) {
    char path[128];
    size_t n_bytes;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    char *bytes = files_read(path, &n_bytes);
    uint64_t hash = 0;
    for (size_t i = 0; i < n_bytes; i++) hash = mix_bits(hash + (uint8_t)bytes[i]);
    free(bytes);
    return hash;
}

Test(make_model, the_seed_decides_the_weights) {
    char a[64], b[64];
    files_make(a, NULL);
    files_make(b, NULL);
    cr_assert_eq(make_in(a, "--shape tiny --seed 7"), 0);
    cr_assert_eq(make_in(b, "--shape tiny --seed 7"), 0);
    uint64_t first = hash_of_weights(a);
    cr_assert_eq(first, hash_of_weights(b));
    cr_assert_eq(make_in(b, "--shape tiny --seed 8"), 0);
    cr_assert_neq(first, hash_of_weights(b));
    files_remove(a);
    files_remove(b);
}

Test(make_model, sharding_changes_files_and_nothing_else) {
    char whole_dir[64], cut_dir[64], path[128];
    files_make(whole_dir, NULL);
    files_make(cut_dir, NULL);
    cr_assert_eq(make_in(whole_dir, "--shape tiny"), 0);
    cr_assert_eq(make_in(cut_dir, "--shape tiny"), 0);
    cr_assert_eq(make_in(cut_dir, "--shape tiny --shard-bytes 500k"), 0);
    snprintf(path, sizeof path, "%s/model.safetensors", cut_dir);
    cr_assert(access(path, F_OK) != 0); /* the earlier run's file would win over the index */
    struct checkpoint *whole = open_made(whole_dir), *cut = open_made(cut_dir);
    cr_assert(whole != NULL && cut != NULL);
    for (int role = 0; role < CHECKPOINT_N_ROLES; role++) {
        enum checkpoint_role r = (enum checkpoint_role)role;
        if (!weight_is_used(r, checkpoint_config(whole))) continue;
        cr_assert(same_tensor(checkpoint_tensor(whole, r, 3), checkpoint_tensor(cut, r, 3)));
    }
    checkpoint_close(whole);
    checkpoint_close(cut);
    files_remove(whole_dir);
    files_remove(cut_dir);
}

/* Every weight of `made` is the plain one times `scale`, up to bf16 rounding of either. */
static bool scaled_by(struct checkpoint_tensor made, struct checkpoint_tensor plain, float scale) {
    for (int64_t i = 0; i < made.rows * made.cols; i++) {
        float expected = scale * dtype_load_f32(plain.data, plain.dtype, (size_t)i);
        float value = dtype_load_f32(made.data, made.dtype, (size_t)i);
        if (!(fabsf(value - expected) <= fabsf(expected) * 0x1p-7f)) return false;
    }
    return true;
}

Test(make_model, a_pair_is_a_model_and_its_first_layers) {
    char plain_dir[64], target_dir[64], draft_dir[64], options[256];
    files_make(plain_dir, NULL);
    files_make(target_dir, NULL);
    files_make(draft_dir, NULL);
    cr_assert_eq(make_in(plain_dir, "--shape tiny"), 0);
    snprintf(options, sizeof options, "--shape tiny --draft %s --draft-layers 2 --eps 0.125",
             draft_dir);
    cr_assert_eq(make_in(target_dir, options), 0);
    struct checkpoint *plain = open_made(plain_dir), *target = open_made(target_dir);
    struct checkpoint *draft = open_made(draft_dir);
    cr_assert(plain != NULL && target != NULL && draft != NULL);
    cr_assert_eq(checkpoint_config(target)->n_layers, 4);
    cr_assert_eq(checkpoint_config(draft)->n_layers, 2);
    for (int i = 0; i < CHECKPOINT_N_ROLES; i++) {
        enum checkpoint_role role = (enum checkpoint_role)i;
        if (!weight_is_used(role, checkpoint_config(target))) continue;
        for (int layer = 0; layer < 4; layer++) {
            struct checkpoint_tensor made = checkpoint_tensor(target, role, layer);
            struct checkpoint_tensor original = checkpoint_tensor(plain, role, layer);
            bool output = role == CHECKPOINT_O || role == CHECKPOINT_DOWN;
            if (layer >= 2 && output) {
                cr_assert(scaled_by(made, original, 0.125f), "role %d, layer %d", i, layer);
                cr_assert(!same_tensor(made, original));
                continue;
            }
            cr_assert(same_tensor(made, original), "role %d, layer %d", i, layer);
            if (layer < 2) cr_assert(same_tensor(made, checkpoint_tensor(draft, role, layer)));
        }
    }
    checkpoint_close(plain);
    checkpoint_close(target);
    checkpoint_close(draft);
    files_remove(plain_dir);
    files_remove(target_dir);
    files_remove(draft_dir);
}

static json_t *load_json(const char *dir, const char *name) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return json_load_file(path, JSON_REJECT_DUPLICATES, NULL);
}

/* Every id below vocab has one spelling; every merge makes a word of two that come before. */
Test(make_model, the_generated_tokenizer_is_complete) {
    char dir[64];
    enum { VOCAB = 20000 }; /* past the three-letter words */
    files_make(dir, NULL);
    cr_assert_eq(make_in(dir, "--shape tiny --hidden 16 --head-dim 4 --ffn 32 --vocab 20000"), 0);
    json_t *root = load_json(dir, "tokenizer.json");
    cr_assert_not_null(root);
    json_t *model = json_object_get(root, "model"), *vocab = json_object_get(model, "vocab");
    json_t *merges = json_object_get(model, "merges"), *merge, *value;
    cr_assert_eq(json_object_size(vocab), VOCAB - 2);
    cr_assert_eq(json_array_size(merges), VOCAB - 2 - 256);
    static bool seen[VOCAB];
    const char *token;
    json_object_foreach(vocab, token, value) seen[json_integer_value(value)] = true;
    for (int id = 0; id < VOCAB - 2; id++) cr_assert(seen[id], "id %d has no token", id);
    size_t i;
    json_array_foreach(merges, i, merge) {
        char left[32], right[32], joined[64];
        cr_assert_eq(sscanf(json_string_value(merge), "%31s %31s", left, right), 2);
        snprintf(joined, sizeof joined, "%s%s", left, right);
        json_int_t id = json_integer_value(json_object_get(vocab, joined));
        cr_assert_eq(id, (json_int_t)(256 + i), "%s", joined);
        json_t *parts[] = {json_object_get(vocab, left), json_object_get(vocab, right)};
        for (int p = 0; p < 2; p++) cr_assert(parts[p] && json_integer_value(parts[p]) < id);
    }
    cr_assert_eq(json_integer_value(json_object_get(vocab, "!")), 33);
    cr_assert_eq(json_integer_value(json_object_get(vocab, "\xc4\xa0")), 32);
    cr_assert_eq(json_integer_value(json_object_get(vocab, "\xc3\xbf")), 255);
    json_t *added = json_object_get(root, "added_tokens");
    json_t *end = json_array_get(added, 1);
    cr_assert_eq(json_integer_value(json_object_get(end, "id")), VOCAB - 1);
    json_decref(root);
    files_remove(dir);
}

Test(make_model, a_copied_tokenizer_gives_its_end_token) {
    char dir[64];
    const char *from = " --tokenizer " TANDEM_SOURCE_DIR "/assets/models/llama-tale-target";
    char options[512];
    files_make(dir, NULL);
    snprintf(options, sizeof options, "--shape tiny --vocab 4100%s", from);
    cr_assert_eq(make_in(dir, options), 0);
    struct checkpoint *checkpoint = open_made(dir);
    cr_assert_not_null(checkpoint);
    cr_assert_eq(checkpoint_config(checkpoint)->bos, 4088);
    cr_assert_eq(checkpoint_config(checkpoint)->eos[0], 4092);
    checkpoint_close(checkpoint);
    snprintf(options, sizeof options, "--shape tiny --vocab 4095%s", from);
    cr_assert_eq(make_in(dir, options), 1);
    files_remove(dir);
}

Test(make_model, wrong_usage_is_told_from_failure) {
    static const char *const wrong[] = {
        "--shape huge", "--heads 0", "--heads -1", "--heads 3x", "--heads 99999999999", "--eps 2",
        "--eps 0.5", "--draft x", "--draft x --draft-layers 4 --eps 0.5 --shape tiny",
        "--draft-layers 2 --eps 0.5", "--dtype int8", "--family gpt2", "--seed -1", "--seed x",
        "--shard-bytes 0", "--shard-bytes 5T", "--shard-bytes 99999999999999G", "--nonsense",
        "--heads", "stray",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        cr_assert_eq(make_in("/nonexistent/folder", wrong[i]), 2, "accepted: %s", wrong[i]);
    }
    cr_assert_eq(make_in(NULL, "--shape tiny"), 2);
    cr_assert_eq(make_in(NULL, "--help"), 0);
    cr_assert_eq(make_in("/nonexistent/folder", "--shape tiny"), 1);
    char dir[64];
    files_make(dir, NULL);
    cr_assert_eq(make_in(dir, "--shape tiny --heads 3 --kv-heads 2"), 1);
    cr_assert_eq(make_in(dir, "--shape tiny --vocab 257"), 1);
    cr_assert_eq(make_in(dir, "--shape tiny --head-dim 7"), 1);
    files_remove(dir);
}

Test(make_model, rounds_to_half_precision) {
    for (uint32_t half = 0; half < 0x7c00; half++) {
        float value = f16_to_f32((uint16_t)half);
        cr_assert_eq(f16_from_f32(value), half);
        cr_assert_eq(f16_from_f32(-value), half | 0x8000u);
        if (half + 1 == 0x7c00) continue;
        float middle = (value + f16_to_f32((uint16_t)(half + 1))) / 2; /* exact; goes to even */
        cr_assert_eq(f16_from_f32(middle), half + (half & 1u));
        cr_assert_eq(f16_from_f32(nextafterf(middle, 0)), half);
        cr_assert_eq(f16_from_f32(nextafterf(middle, 1e9f)), half + 1);
    }
}
