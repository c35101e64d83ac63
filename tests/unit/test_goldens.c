/* The engine against a float32 reference computed elsewhere: the bundled pair and a third-party model
 * (../shared/models), and tiny random checkpoints of every family (tests/fixtures/checkpoints, made by
 * tests/fixtures/make_checkpoints.py with Hugging Face transformers).
 *
 * Rule for greedy tokens: fed the reference's own tokens, our argmax must be the reference's wherever
 * the reference's top-1/top-2 gap is at least MARGIN; elsewhere a difference is counted as an exception
 * and printed, and at most one step in twenty may be one. Rule for logits: relative L2 <= 2e-2. */
#include <dirent.h>
#include <jansson.h>
#include <math.h>

#include "tests/reference/model_run.h"
#include "tests/unit/test.h"

#define MARGIN 0.3
#define LOGIT_TOLERANCE 2e-2

static int argmax(const float *row, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) {
        if (row[i] > row[best]) best = i;
    }
    return best;
}

static int read_ids(int32_t *out, const json_t *array) {
    int n = (int)json_array_size(array);
    for (int i = 0; i < n; i++) out[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return n;
}

struct tally {
    int steps, exceptions;
    double worst_top10;
};

/* One golden case: prompt + 64 greedy tokens, teacher-forced. */
static void check_case(struct local_group *group, const json_t *prompt_ids, const json_t *golden,
                       struct tally *tally, double margin) {
    struct error err;
    int32_t tokens[1024];
    int n_prompt = read_ids(tokens, prompt_ids);
    const json_t *greedy = json_object_get(golden, "greedy");
    const json_t *margins = json_object_get(golden, "margins");
    int n = n_prompt + read_ids(tokens + n_prompt, greedy);
    int vocab = local_group_config(group)->vocab;
    float *logits = xcalloc((size_t)n * (size_t)vocab, sizeof *logits);
    cr_assert(model_run_feed(group, logits, tokens, n, 0, 0, 64, &err) == STATUS_OK, "%s", err.text);

    const json_t *top = json_object_get(golden, "top10_last_prompt_position");
    const float *last = logits + (size_t)(n_prompt - 1) * (size_t)vocab;
    double difference = 0, norm = 0;
    for (size_t i = 0; i < json_array_size(top); i++) {
        const json_t *entry = json_array_get(top, i);
        double expected = json_number_value(json_object_get(entry, "logit"));
        double seen = last[json_integer_value(json_object_get(entry, "id"))];
        difference += (seen - expected) * (seen - expected);
        norm += expected * expected;
    }
    double relative = sqrt(difference / norm);
    if (relative > tally->worst_top10) tally->worst_top10 = relative;
    cr_assert(relative <= LOGIT_TOLERANCE, "top-10 logits differ by %.4f", relative);

    for (int i = n_prompt; i < n; i++) {
        int seen = argmax(logits + (size_t)(i - 1) * (size_t)vocab, vocab);
        tally->steps++;
        if (seen == tokens[i]) continue;
        double gap = json_number_value(json_array_get(margins, (size_t)(i - n_prompt)));
        cr_assert(gap < margin, "step %d: token %d, expected %d (gap %.3f)", i - n_prompt, seen,
                  tokens[i], gap);
        tally->exceptions++;
    }
    free(logits);
}

static void check_goldens(const char *dir, const char *goldens_path, const char *member, int degree,
                          enum backend_isa isa, enum dtype weights) {
    json_error_t json_err;
    json_t *goldens = json_load_file(goldens_path, 0, &json_err);
    if (goldens == NULL) cr_skip_test("%s is not there: %s", goldens_path, json_err.text);
    struct error err;
    struct local_group *group;
    cr_assert(model_run_open(&group, dir, degree, isa, weights, 1, 64, 64, &err) == STATUS_OK, "%s",
              err.text);
    struct tally tally = {0};
    size_t i;
    json_t *entry;
    json_array_foreach(json_object_get(goldens, "cases"), i, entry) {
        const json_t *golden = member ? json_object_get(entry, member) : entry;
        check_case(group, json_object_get(entry, "prompt_ids"), golden, &tally, MARGIN);
    }
    local_group_destroy(group);
    json_decref(goldens);
    cr_assert(tally.steps > 0);
    cr_assert(tally.exceptions * 20 <= tally.steps, "%d exceptions of %d", tally.exceptions,
              tally.steps);
    fprintf(stderr, "%s TP %d: %d greedy steps, %d exceptions below a gap of %.1f, top-10 error %.4f\n",
            member ? member : "stories260k", degree, tally.steps, tally.exceptions, MARGIN,
            tally.worst_top10);
}

#define ASSETS TANDEM_SOURCE_DIR "/assets/models/"
#define SHARED TANDEM_SOURCE_DIR "/../shared/models/"

Test(goldens, target) {
    check_goldens(ASSETS "llama-tale-target", SHARED "goldens.json", "llama-tale-target", 1,
                  BACKEND_AUTO, DTYPE_BF16);
}
Test(goldens, target_tp2) {
    check_goldens(ASSETS "llama-tale-target", SHARED "goldens.json", "llama-tale-target", 2,
                  BACKEND_AUTO, DTYPE_BF16);
}
Test(goldens, target_avx2) {
    if (!backend_isa_available(BACKEND_AVX2)) cr_skip_test("no AVX2 on this processor");
    check_goldens(ASSETS "llama-tale-target", SHARED "goldens.json", "llama-tale-target", 1,
                  BACKEND_AVX2, DTYPE_BF16);
}
Test(goldens, target_portable) {
    check_goldens(ASSETS "llama-tale-target", SHARED "goldens.json", "llama-tale-target", 1,
                  BACKEND_PORTABLE, DTYPE_BF16);
}
Test(goldens, draft) {
    check_goldens(ASSETS "llama-tale-draft", SHARED "goldens.json", "llama-tale-draft", 1,
                  BACKEND_AUTO, DTYPE_BF16);
}
Test(goldens, stories260k) {
    check_goldens(SHARED "stories260k", SHARED "stories260k/goldens.json", NULL, 1, BACKEND_AUTO,
                  DTYPE_BF16);
}

/* Int8 is another arithmetic: what it costs is reported, and bounded loosely. */
Test(goldens, int8_drift) {
    struct error err;
    int32_t tokens[64];
    for (int i = 0; i < 64; i++) tokens[i] = (i * 97 + 13) % 4000;
    float *logits[2];
    for (int i = 0; i < 2; i++) {
        struct local_group *group;
        enum dtype weights = i ? DTYPE_I8 : DTYPE_BF16;
        cr_assert(model_run_open(&group, ASSETS "llama-tale-target", 1, BACKEND_AUTO, weights, 1, 64,
                                 64, &err) == STATUS_OK,
                  "%s", err.text);
        logits[i] = xcalloc(64 * (size_t)local_group_config(group)->vocab, sizeof(float));
        cr_assert(model_run_feed(group, logits[i], tokens, 64, 0, 0, 64, &err) == STATUS_OK);
        local_group_destroy(group);
    }
    double difference = 0, norm = 0;
    for (size_t i = 0; i < 64 * 4096; i++) {
        difference += pow((double)logits[1][i] - (double)logits[0][i], 2);
        norm += pow((double)logits[0][i], 2);
    }
    double drift = sqrt(difference / norm);
    fprintf(stderr, "int8 against bf16: relative L2 of the logits %.4f\n", drift);
    cr_assert(drift > 0 && drift < 0.1, "drift %.4f", drift);
    free(logits[0]);
    free(logits[1]);
}

/* --- families, from fixtures ---------------------------------------------------------------- */

static void check_fixture(const char *dir) {
    char path[512];
    snprintf(path, sizeof path, "%s/logits.json", dir);
    json_error_t json_err;
    json_t *fixture = json_load_file(path, 0, &json_err);
    cr_assert(fixture != NULL, "%s: %s", path, json_err.text);
    struct error err;
    for (int degree = 1; degree <= 4; degree *= 2) {
        struct local_group *group;
        cr_assert(model_run_open(&group, dir, degree, BACKEND_AUTO, DTYPE_BF16, 1, 16, 64, &err) ==
                      STATUS_OK,
                  "%s: %s", dir, err.text);
        int32_t tokens[256];
        const json_t *margins = json_object_get(fixture, "margins");
        int n_prompt = read_ids(tokens, json_object_get(fixture, "tokens"));
        int n = n_prompt + read_ids(tokens + n_prompt, json_object_get(fixture, "greedy"));
        int vocab = local_group_config(group)->vocab;
        float *logits = xcalloc((size_t)n * (size_t)vocab, sizeof *logits);
        cr_assert(model_run_feed(group, logits, tokens, n, 0, 0, 7, &err) == STATUS_OK, "%s", err.text);
        const json_t *rows = json_object_get(fixture, "logits");
        cr_assert((int)json_array_size(rows) == n_prompt);
        double difference = 0, norm = 0;
        for (int r = 0; r < n_prompt; r++) {
            const json_t *row = json_array_get(rows, (size_t)r);
            cr_assert((int)json_array_size(row) == vocab);
            for (int v = 0; v < vocab; v++) {
                double expected = json_number_value(json_array_get(row, (size_t)v));
                double seen = logits[(size_t)r * (size_t)vocab + (size_t)v];
                difference += (seen - expected) * (seen - expected);
                norm += expected * expected;
            }
        }
        double relative = sqrt(difference / norm);
        if (degree == 1) fprintf(stderr, "%s: relative L2 %.5f\n", strrchr(dir, '/') + 1, relative);
        cr_assert(relative <= LOGIT_TOLERANCE, "%s TP %d: relative L2 %.4f", dir, degree, relative);
        /* These logits are small: the gap that bf16 may close is scaled to their size. */
        double gap_min = 4 * LOGIT_TOLERANCE * sqrt(norm / (n_prompt * vocab));
        for (int i = n_prompt; i < n; i++) {
            int seen = argmax(logits + (size_t)(i - 1) * (size_t)vocab, vocab);
            double gap = json_number_value(json_array_get(margins, (size_t)(i - n_prompt)));
            cr_assert(seen == tokens[i] || gap < gap_min, "%s TP %d, greedy step %d: token %d, "
                      "expected %d (gap %.3f)", dir, degree, i - n_prompt, seen, tokens[i], gap);
        }
        free(logits);
        local_group_destroy(group);
    }
    json_decref(fixture);
}

Test(goldens, families) {
    const char *root = TANDEM_SOURCE_DIR "/tests/fixtures/checkpoints";
    DIR *folder = opendir(root);
    cr_assert(folder != NULL, "%s", root);
    int n = 0;
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        if (entry->d_name[0] == '.') continue;
        char dir[512];
        snprintf(dir, sizeof dir, "%s/%s", root, entry->d_name);
        check_fixture(dir);
        n++;
    }
    closedir(folder);
    cr_assert(n >= 8, "only %d fixtures", n);
}
