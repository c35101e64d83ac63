/* Acceptance of one drafted token (speculation.md 1). Pure: the draws are functions of seed and
 * position.
 *
 * The default rule, `coupled`, needs nothing from here: the target draws its own token at every
 * place, and a candidate holds if it is that token. This is the other rule, `rejection` (Leviathan
 * et al., arXiv 2211.17192, 2.3; Chen et al., arXiv 2302.01318): a candidate x drawn from q holds
 * with probability min(1, p(x)/q(x)), and what replaces a fallen one is drawn from norm((p - q)+).
 * It is exact in distribution, not stable under a change of drafter, window or timing. Every
 * position has its own uniform; none is used twice, because a position is judged at most once. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

enum sampling_rule { SAMPLING_COUPLED, SAMPLING_REJECTION };

/* Whether the candidate of `position` holds. p, q: probabilities of the candidate, target's and
 * drafter's (q > 0: it was drawn). */
bool accept_by_rejection(float p, float q, uint64_t seed, int64_t position);

/* Draws the token that replaces a fallen candidate. p, q: [vocab] distributions. Where rounding
 * leaves nothing of (p - q)+, the draw is from p. */
int32_t accept_residual(const float *p, const float *q, int vocab, uint64_t seed,
                        int64_t position);
