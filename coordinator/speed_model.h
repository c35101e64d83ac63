/* How fast a mode will be: the table of speculation.md 4, from acceptance and step times. Pure.
 *
 * An overlapped round is a chain of three states (worker/spec/round.h): PRE judges the first
 * delay + 1 tokens of a block; if all hold, FIRST judges what PRE left of it and the first token of
 * the next block; from then on POST judges window tokens a round. A failure leads back to PRE. With
 * delay 0, FIRST is POST, and the sums are E(a, g) of PEARL (Liu et al., arXiv 2408.11850, 4) and,
 * with fuzzy acceptance, the combined chain of speculation.md 4. Every state has the time of its own
 * rows, where the table has one time for all. */
#pragma once
#include "common/spec_mode.h"

/* What is known of a pair of models on their ranks. Times in microseconds, of a whole batch. */
struct speed_model {
    double accept_exact;    /* probability that a drafted token holds, 0..1 */
    double accept_fuzzy;    /* of a layer-parallel step */
    double target_us[SPEC_MAX_WINDOW + 2]; /* [r]: a forward pass with r rows a sequence, r >= 1 */
    double draft_us;        /* a draft step */
    double fuzzy_us;        /* a layer-parallel draft step */
    double calibrate_us;    /* the exact pass that gives a layer-parallel block its first token */
    double handoff_us;      /* exchange between draft and target that nothing hides, a round */
};

/* The average round of one sequence. */
struct speed_round {
    double tokens, us;
};

/* window: 1..SPEC_MAX_WINDOW, ignored by plain; delay: 0..window - 1, used by overlapped modes. */
struct speed_round speed_model_round(const struct speed_model *model, enum spec_mode mode,
                                     int window, int delay);

/* A way to run a mode and what it promises. window and delay are 0 for plain. */
struct speed_choice {
    int window, delay;
    struct speed_round round;
    double tokens_per_second;  /* of one sequence */
};

struct speed_choice speed_model_choose(const struct speed_model *model, enum spec_mode mode,
                                       int window, int delay);

/* The fastest window in [low, high] (1..SPEC_MAX_WINDOW) and, for overlapped modes, the fastest
 * delay. Ties go to the smaller. */
struct speed_choice speed_model_best(const struct speed_model *model, enum spec_mode mode, int low,
                                     int high);
