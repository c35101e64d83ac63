/* The round, exhaustively for small windows: every pattern of right and wrong candidates over
 * several rounds, every window, wait and limit, with a target and a draft side that each keep
 * their own books and apply the same edits. What is committed must be the truth, in order, and
 * both sides must agree. */
#include "tests/unit/test.h"

#include <stdio.h>
#include <stdint.h>
#include <string.h>

#include "worker/spec/policy.h"
#include "worker/spec/round.h"

enum { TRUTH = 1000, MAX_WINDOW = 4, MAX_TOKENS = 64 };

/* The truth at position p is TRUTH + p; any other token there is wrong. */
struct side {
    int tokens[MAX_TOKENS];
    int n_committed, n_candidates;
    int present; /* positions with KV of what stands there */
};

struct game {
    struct side target, draft;
    int n_rounds;
    const char *wrong;
};

static void expect(struct game *game, bool holds, const char *what) {
    if (!holds && game->wrong == NULL) game->wrong = what;
}

/* Bit i of `rights`: whether the i-th token made in this round is the truth (if all before it
 * are). */
static void draft_tokens(struct game *game, int made, unsigned rights) {
    struct side *draft = &game->draft;
    for (int i = 0; i < made; i++) {
        int length = draft->n_committed + draft->n_candidates;
        expect(game, draft->present < length, "nothing to feed");
        draft->present = length; /* everything known is fed, then a token is drawn */
        draft->tokens[length] = TRUTH + length + ((rights >> i & 1) ? 0 : 500);
        draft->n_candidates++;
    }
}

/* The target's pass and walk. */
static int judge(struct game *game, struct round_plan plan) {
    struct side *target = &game->target;
    int rows = round_rows(plan), judged = round_judged(plan), accepted = 0;
    expect(game, target->present == target->n_committed - 1, "the target's KV is not all but one");
    expect(game, rows - 1 <= plan.tail + plan.wait, "a row for an unknown token");
    expect(game, judged == rows || judged == rows - 1, "judged is not rows or rows - 1");
    expect(game, judged <= plan.tail + plan.make, "more judged than there are");
    target->present += rows;
    while (accepted < judged &&
           target->tokens[target->n_committed + accepted] == TRUTH + target->n_committed + accepted) {
        accepted++;
    }
    return accepted;
}

/* Both sides apply the same edit; own: the target's token behind the accepted ones. */
static void apply(struct side *side, const struct round_outcome *outcome) {
    int begin = side->n_committed;
    side->n_committed += outcome->accepted;
    side->n_candidates -= outcome->accepted;
    if (outcome->own) {
        if (side->present > side->n_committed) side->present = side->n_committed;
        side->tokens[side->n_committed] = TRUTH + side->n_committed;
        side->n_committed++;
        side->n_candidates = 0;
    }
    if (side->n_committed - begin != outcome->committed) side->n_committed = -1;
}

static void check_outcome(struct game *game, struct round_plan plan,
                          const struct round_outcome *outcome) {
    const struct side *target = &game->target, *draft = &game->draft;
    expect(game, outcome->committed >= 1, "a round without progress");
    expect(game, outcome->committed == outcome->accepted + outcome->own, "committed is not the sum");
    expect(game, outcome->tail == target->n_candidates, "the target's tail");
    expect(game, outcome->tail == draft->n_candidates, "the draft's tail");
    expect(game, outcome->tail + outcome->dropped + outcome->accepted == plan.tail + plan.make,
           "a candidate is lost");
    expect(game, target->n_committed == draft->n_committed, "other lengths");
    expect(game, target->present >= target->n_committed - 1, "committed tokens without KV");
    for (int p = 1; p < target->n_committed; p++) {
        expect(game, target->tokens[p] == TRUTH + p, "not the truth");
        expect(game, draft->tokens[p] == TRUTH + p, "not the truth on the draft's side");
    }
}

/* One round; made: how many of the planned tokens the draft really makes. */
static void play(struct game *game, int window, int wait, int limit, int made, unsigned rights) {
    struct round_plan plan = round_plan(game->target.n_candidates, window, wait, limit);
    expect(game, plan.make <= window && plan.wait <= plan.make, "plan beyond the window");
    expect(game, plan.tail + plan.make <= limit || plan.make == 0, "candidates beyond the limit");
    expect(game, plan.tail == 0 || plan.wait == 0, "a wait with a tail");
    plan = round_made(plan, made < plan.make ? made : plan.make);
    draft_tokens(game, plan.make, rights);
    struct side *target = &game->target, *draft = &game->draft;
    memcpy(target->tokens + target->n_committed, draft->tokens + draft->n_committed,
           (size_t)draft->n_candidates * sizeof *target->tokens);
    target->n_candidates = draft->n_candidates;
    int accepted = judge(game, plan);
    struct round_outcome outcome = round_settle(plan, accepted);
    apply(target, &outcome);
    apply(draft, &outcome);
    /* What stands behind the committed tokens is cut, all but the last has KV. */
    target->present = target->n_committed - 1;
    game->n_rounds++;
    check_outcome(game, plan, &outcome);
}

static struct game new_game(void) {
    struct game game = {.wrong = NULL};
    game.target.n_committed = game.draft.n_committed = 1;
    game.target.tokens[0] = game.draft.tokens[0] = TRUTH;
    return game;
}

/* Every pattern of rights over as many rounds as `depth`, from a given game. */
static uint64_t play_all(const struct game *from, int window, int wait, int made, int depth,
                         const char **wrong) {
    if (depth == 0 || *wrong != NULL) return 0;
    uint64_t n = 0;
    for (unsigned rights = 0; rights < 1u << window; rights++) {
        struct game game = *from;
        play(&game, window, wait, MAX_TOKENS, made, rights);
        if (game.wrong != NULL) *wrong = game.wrong;
        n += 1 + play_all(&game, window, wait, made, depth - 1, wrong);
    }
    return n;
}

Test(round, every_pattern_of_small_windows) {
    uint64_t n = 0;
    for (int window = 0; window <= MAX_WINDOW; window++) {
        int depth = window <= 2 ? 6 : window == 3 ? 5 : 4;
        for (int wait = 0; wait <= window; wait++) {
            for (int made = 0; made <= window; made++) {
                struct game game = new_game();
                const char *wrong = NULL;
                n += play_all(&game, window, wait, made, depth, &wrong);
                cr_assert_null(wrong, "window %d, wait %d, made %d: %s", window, wait, made, wrong);
            }
        }
    }
    cr_assert(n > 500000, "only %llu rounds", (unsigned long long)n);
}

/* Windows, waits, limits and what is made change from round to round. */
Test(round, changing_windows) {
    uint32_t x = 12345;
    for (int trial = 0; trial < 20000; trial++) {
        struct game game = new_game();
        uint32_t seed = x;
        while (game.target.n_committed < MAX_TOKENS - 16) {
            x = x * 1664525u + 1013904223u;
            int window = (int)(x >> 28) % 6, wait = (int)(x >> 25) % 6, made = (int)(x >> 22) % 6;
            play(&game, window, wait, 1 + (int)(x >> 19) % 8, made, x >> 8 | x >> 13);
            cr_assert_null(game.wrong, "seed %u, round %d: %s", seed, game.n_rounds, game.wrong);
        }
    }
}

/* speculation.md 2, the table, row by row. */
Test(round, the_table) {
    int g = 4;
    struct round_plan pre = round_plan(0, g, 0, 100);
    cr_assert(round_rows(pre) == 1 && round_judged(pre) == 1 && !round_has_bonus(pre));
    struct round_outcome held = round_settle(pre, 1), fell = round_settle(pre, 0);
    cr_assert(held.committed == 1 && held.tail == g - 1 && !held.own);
    cr_assert(fell.committed == 1 && fell.tail == 0 && fell.own && fell.dropped == g);
    struct round_plan post = round_plan(g - 1, g, 0, 100);
    cr_assert(round_rows(post) == g && round_judged(post) == g && !round_has_bonus(post));
    for (int k = 0; k < g; k++) {
        struct round_outcome outcome = round_settle(post, k);
        cr_assert(outcome.committed == k + 1 && outcome.own && outcome.tail == 0);
        cr_assert_eq(outcome.dropped, g + g - 1 - k);
    }
    held = round_settle(post, g);
    cr_assert(held.committed == g && !held.own && held.tail == g - 1);
    struct round_plan plain = round_plan(0, 0, 0, 100);
    cr_assert(round_rows(plain) == 1 && round_judged(plain) == 0 && round_has_bonus(plain));
    struct round_plan sd = round_plan(0, g, g, 100);
    cr_assert(round_rows(sd) == g + 1 && round_judged(sd) == g && round_has_bonus(sd));
    struct round_plan delayed = round_plan(0, g, 2, 100);
    cr_assert(round_rows(delayed) == 3 && round_judged(delayed) == 3 && !round_has_bonus(delayed));
    cr_assert_eq(round_settle(delayed, 3).tail, g - 3);
}

Test(round, policy_and_wishes) {
    struct spec_policy pearl = {SPEC_PEARL, 4, 1, 2}, sd = {SPEC_SD, 4, 1, 0};
    struct spec_wish none = {-1, 0}, off = {SPEC_PLAIN, 0}, small = {-1, 2}, own = {SPEC_SD, 0};
    struct round_plan plan = spec_policy_round(&pearl, &none, 0, false, 16, 100);
    cr_assert(plan.make == 6 && plan.wait == 2, "a whole window behind what is waited for");
    cr_assert_eq(round_settle(plan, 3).tail, 3);
    plan = spec_policy_round(&pearl, &none, 0, false, 5, 100);
    cr_assert(plan.make == 5 && plan.wait == 2, "within the batch's budget");
    plan = spec_policy_round(&pearl, &none, 0, true, 16, 100);
    cr_assert(plan.make == 4 && plan.wait == 0, "nobody waits while another has a tail");
    plan = spec_policy_round(&pearl, &off, 0, false, 16, 100);
    cr_assert(plan.make == 0 && round_rows(plan) == 1);
    plan = spec_policy_round(&pearl, &small, 0, false, 16, 100);
    cr_assert(plan.make == 2 && plan.wait == 2, "no more than the request allows");
    plan = spec_policy_round(&pearl, &small, 1, true, 16, 100);
    cr_assert(plan.tail == 1 && plan.make == 2);
    plan = spec_policy_round(&pearl, &own, 0, false, 16, 100);
    cr_assert(plan.make == 4 && plan.wait == 4);
    plan = spec_policy_round(&pearl, &own, 3, true, 16, 100);
    cr_assert(plan.make == 0 && plan.tail == 3, "a serial round first lets the tail be judged");
    plan = spec_policy_round(&sd, &none, 0, false, 3, 100);
    cr_assert(plan.make == 3 && plan.wait == 3, "the batch's budget");
    plan = spec_policy_round(&sd, &none, 0, false, 16, 2);
    cr_assert(plan.make == 2, "the request's limit");
}
