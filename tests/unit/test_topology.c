/* What the coordinator refuses at start, and what it makes of options. On the bundled pair. */
#include "coordinator/topology.h"

#include <string.h>

#include "coordinator/coordinator.h"
#include "model/checkpoint.h"
#include "tests/unit/checkpoint_files.h"
#include "tests/unit/test.h"

#define TARGET TANDEM_SOURCE_DIR "/assets/models/llama-tale-target"
#define DRAFT TANDEM_SOURCE_DIR "/assets/models/llama-tale-draft"

struct start {
    struct coordinator_options options;
    struct coordinator_model model;
    struct topology topology;
    struct error err;
};

static struct start *start_create(void) {
    struct start *s = calloc(1, sizeof *s);
    struct checkpoint *checkpoint;
    s->options = coordinator_options_default();
    snprintf(s->model.dir, sizeof s->model.dir, "%s", TARGET);
    CHECK(checkpoint_open(&checkpoint, TARGET, &s->err) == STATUS_OK);
    s->model.config = *checkpoint_config(checkpoint);
    checkpoint_close(checkpoint);
    CHECK(tokenizer_load(&s->model.tokenizer, TARGET, &s->err) == STATUS_OK);
    s->model.context = 1024;
    return s;
}

static void start_free(struct start *s) {
    tokenizer_free(s->model.tokenizer);
    free(s);
}

static enum status make(struct start *s) {
    return topology_make(&s->topology, &s->options, &s->model, &s->err);
}

static void expect_refusal(struct start *s, const char *words) {
    enum status status = make(s);
    cr_assert_neq(status, STATUS_OK, "expected: %s", words);
    cr_assert(strstr(s->err.text, words) != NULL, "%s\nexpected: %s", s->err.text, words);
}

/* A copy of the draft with a patched file. */
static void patched_draft(char *dir, const char *file, const char *patch) {
    files_make(dir, NULL);
    files_each(DRAFT, files_copy_one, dir);
    files_patch_json(dir, file, patch);
}

Test(topology, without_a_draft_as_ever) {
    struct start *s = start_create();
    cr_assert_eq(make(s), STATUS_OK, "%s", s->err.text);
    cr_assert(s->topology.wish.n_ranks == 1 && s->topology.placement.split == PLACEMENT_ALONE);
    cr_assert_eq(s->topology.policy.modes, 1u << SPEC_PLAIN);
    s->options.target_ranks = 4;
    cr_assert_eq(make(s), STATUS_OK);
    cr_assert_eq(s->topology.wish.n_ranks, 4);
    start_free(s);
}

Test(topology, the_mode_says_where_the_draft_stands) {
    static const struct {
        int mode;
        uint32_t target, draft, ranks;
        enum placement_split split;
        uint32_t expected;
    } rows[] = {{-1, 0, 0, 0, PLACEMENT_DISJOINT, 2},
                {-1, 2, 0, 0, PLACEMENT_DISJOINT, 3},
                {-1, 2, 1, 2, PLACEMENT_SHARED, 2},
                {SPEC_PEARL, 1, 1, 0, PLACEMENT_DISJOINT, 2},
                {SPEC_PEARL_LP, 2, 2, 0, PLACEMENT_DISJOINT, 4},
                {SPEC_SD, 2, 0, 0, PLACEMENT_SHARED, 2},
                {SPEC_SD, 2, 1, 3, PLACEMENT_DISJOINT, 3},
                {SPEC_EASYSPEC, 4, 2, 0, PLACEMENT_SHARED, 4},
                {SPEC_PLAIN, 2, 0, 0, PLACEMENT_SHARED, 2}};
    struct start *s = start_create();
    s->options.draft = DRAFT;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        s->options.mode = rows[i].mode;
        s->options.target_ranks = rows[i].target;
        s->options.draft_ranks = rows[i].draft;
        s->options.n_ranks = rows[i].ranks;
        cr_assert_eq(make(s), STATUS_OK, "row %zu: %s", i, s->err.text);
        cr_assert_eq(s->topology.placement.split, rows[i].split, "row %zu", i);
        cr_assert_eq(s->topology.wish.n_ranks, rows[i].expected, "row %zu", i);
        cr_assert_eq(s->topology.policy.wish.mode, rows[i].mode, "row %zu", i);
    }
    start_free(s);
}

Test(topology, the_planner_chooses_what_is_not_given) {
    struct start *s = start_create();
    s->options.draft = DRAFT;
    s->options.n_ranks = 4;
    s->options.mode = SPEC_PEARL;
    cr_assert_eq(make(s), STATUS_OK, "%s", s->err.text);
    const struct topology *t = &s->topology;
    cr_assert(t->placed != NULL && t->placed->mode == SPEC_PEARL);
    cr_assert(t->placement.split == PLACEMENT_DISJOINT && t->wish.n_ranks <= 4);
    s->options.mode = -1;
    s->options.machine.acceptance = 0;   /* plain is fastest; the draft stays at hand */
    cr_assert_eq(make(s), STATUS_OK, "%s", s->err.text);
    cr_assert(t->placement.split == PLACEMENT_SHARED && t->wish.n_ranks == 4);
    cr_assert(t->policy.modes >> SPEC_SD & 1);
    start_free(s);
}

Test(topology, layer_width_is_what_was_asked_or_planned) {
    struct start *s = start_create();
    s->options.draft = DRAFT;
    s->options.mode = SPEC_EASYSPEC;
    s->options.target_ranks = s->options.draft_ranks = 4;
    cr_assert_eq(make(s), STATUS_OK);
    cr_assert(s->topology.max_layer_width == 2 || s->topology.max_layer_width == 4);
    s->options.layer_width = 1;
    cr_assert_eq(make(s), STATUS_OK);
    cr_assert_eq(s->topology.max_layer_width, 1);
    s->options.mode = SPEC_SD;
    s->options.layer_width = 0;
    cr_assert_eq(make(s), STATUS_OK);
    cr_assert_eq(s->topology.max_layer_width, 1);
    start_free(s);
}

Test(topology, refuses_options_that_make_no_sense) {
    struct start *s = start_create();
    s->options.mode = SPEC_SD;
    expect_refusal(s, "mode sd needs a drafter (--draft DIR or ngram)");
    s->options.mode = -1;
    s->options.window = 4;
    expect_refusal(s, "--window is 4 without a drafter");
    s->options.window = 0;
    s->options.draft = "ngram";
    s->options.mode = SPEC_PEARL;
    expect_refusal(s, "mode pearl needs a draft model, and the drafter is ngram");
    s->options.mode = -1;
    s->options.draft_ranks = 2;
    expect_refusal(s, "--draft-ranks is 2 without a draft model");
    s->options.draft_ranks = 0;
    s->options.layer_width = 2;
    expect_refusal(s, "--layer-width is 2 without a draft model");
    s->options.layer_width = 0;
    s->options.draft = DRAFT;
    s->options.window = 9;
    s->options.max_window = 8;
    expect_refusal(s, "--window is 9 with --max-window 8");
    s->options.window = 0;
    s->options.target_ranks = 3;
    expect_refusal(s, "--target-ranks is 3; expected a tensor-parallel degree");
    s->options.target_ranks = 2;
    s->options.draft_ranks = 1;
    s->options.n_ranks = 4;
    expect_refusal(s, "--ranks is 4 with --target-ranks 2 and --draft-ranks 1; expected 2 (shared) or "
                      "3 (disjoint)");
    s->options.n_ranks = 2;
    s->options.mode = SPEC_PEARL;
    expect_refusal(s, "mode pearl needs a draft on ranks of its own");
    s->options.draft = "/nowhere";
    expect_refusal(s, "--draft /nowhere: No such file");
    start_free(s);
}

Test(topology, refuses_a_draft_with_another_tokenizer) {
    char dir[64];
    struct start *s = start_create();
    s->options.draft = dir;
    patched_draft(dir, "tokenizer.json",
                  "{\"model\":{\"vocab\":{\"ow\":null,\"w\\u00e9\":301},\"merges\":[\"h e\"]}}");
    expect_refusal(s, "id 301 is \"wé\" there and \"ow\" here (4096 and 4096 ids)");
    files_remove(dir);
    start_free(s);
}

Test(topology, refuses_a_draft_that_splits_words_otherwise) {
    char dir[64];
    struct start *s = start_create();
    s->options.draft = dir;
    patched_draft(dir, "tokenizer.json", "{\"model\":{\"merges\":[\"h e\"]}}");
    expect_refusal(s, "all 4096 ids are spelled alike, merges or special tokens differ");
    files_remove(dir);
    start_free(s);
}

Test(topology, refuses_a_draft_with_a_shorter_context) {
    char dir[64];
    struct start *s = start_create();
    s->options.draft = dir;
    patched_draft(dir, "config.json", "{\"max_position_embeddings\":512}");
    expect_refusal(s, "has a context of 512 tokens, 1024 are to be served; use another draft or "
                      "--max-context 512");
    s->model.context = 512;
    cr_assert_eq(make(s), STATUS_OK, "%s", s->err.text);
    files_remove(dir);
    start_free(s);
}

Test(topology, padded_vocabularies_are_allowed) {
    struct start *s = start_create();
    s->options.draft = DRAFT;
    s->model.config.vocab = 4352;   /* the target's embedding is longer than its tokenizer */
    cr_assert_eq(make(s), STATUS_OK, "%s", s->err.text);
    cr_assert(s->topology.target.vocab == 4352 && s->topology.draft.vocab == 4096);
    start_free(s);
}

Test(topology, refuses_what_does_not_fit_with_the_numbers) {
    struct start *s = start_create();
    s->options.draft = DRAFT;
    s->options.machine.memory_bytes = 16 << 20;
    expect_refusal(s, " has 16.0 MiB, of which 1.6 stay free, and needs ");
    start_free(s);
}

Test(topology, prints_a_table_and_the_reason) {
    struct start *s = start_create();
    s->options.draft = DRAFT;
    s->options.n_ranks = 8;
    s->options.machine.memory_bytes = 48 << 20;
    cr_assert_eq(make(s), STATUS_OK, "%s", s->err.text);
    char *text;
    size_t n;
    FILE *out = open_memstream(&text, &n);
    topology_print(&s->topology, out);
    fclose(out);
    static const char *const parts[] = {"\n* ", "  pearl     disjoint ", "  plain     -  ",
                                        " wins: ", "The runner-up, ", "\nServed: target on ",
                                        "no: rank 0 has 48.0 MiB"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        cr_assert(strstr(text, parts[i]) != NULL, "\"%s\" is not in\n%s", parts[i], text);
    }
    free(text);
    start_free(s);
}
