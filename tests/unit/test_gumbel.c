/* Random bits and the arithmetic of the noise (common/philox.h, common/gumbel.h). */
#include <math.h>

#include "common/gumbel.h"
#include "tests/reference/random.h"
#include "tests/unit/test.h"

/* Known answers that the authors of Philox publish with it. */
Test(gumbel, philox_gives_the_known_answers) {
    static const struct {
        uint32_t counter[4], key[2], words[4];
    } answers[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t words[4];
        philox4x32_10(words, answers[i].counter, answers[i].key);
        for (int w = 0; w < 4; w++) {
            cr_assert(words[w] == answers[i].words[w], "answer %d word %d: %08x", i, w, words[w]);
        }
    }
}

Test(gumbel, words_take_every_bit_of_seed_position_and_token) {
    uint32_t base[4], words[4];
    gumbel_words(base, 5, 9, 3);
    for (int bit = 0; bit < 64; bit++) {
        gumbel_words(words, 5 ^ (uint64_t)1 << bit, 9, 3);
        cr_assert(words[0] != base[0], "seed bit %d", bit);
        gumbel_words(words, 5, (int64_t)(9 ^ (uint64_t)1 << bit), 3);
        cr_assert(words[0] != base[0], "position bit %d", bit);
        if (bit < 32) gumbel_words(words, 5, 9, 3 ^ (uint32_t)1 << bit);
        cr_assert(words[0] != base[0], "token bit %d", bit);
    }
}

Test(gumbel, uniform_stays_inside) {
    cr_assert_eq(philox_uniform(0), 0x1p-24f);
    cr_assert_eq(philox_uniform(0xffffffffu), 1 - 0x1p-24f);
    struct test_random random = {1};
    double sum = 0;
    for (int i = 0; i < 100000; i++) sum += (double)philox_uniform((uint32_t)random_u64(&random));
    cr_assert(fabs(sum / 100000 - 0.5) < 0.005);
}

/* One unit in the last place of a normal value. */
static double ulp(double value) {
    int exponent;
    frexp(value, &exponent);
    return ldexp(1, exponent - 24);
}

Test(gumbel, log_is_within_2_ulp) {
    struct test_random random = {2};
    for (int i = 0; i < 400000; i++) {
        float x = ldexpf(random_f32(&random, 1, 2), random_below(&random, 252) - 125);
        if (i % 2) x = random_f32(&random, 0.4f, 2.5f);
        double exact = log((double)x), error = fabs((double)gumbel_log(x) - exact);
        cr_assert(error <= 2 * ulp(exact) || error <= 1e-7, "log %.9g: off by %.3g", x, error);
    }
    cr_assert_eq(gumbel_log(1), 0.0f);
}

Test(gumbel, exp_is_within_2_ulp) {
    struct test_random random = {3};
    for (int i = 0; i < 400000; i++) {
        float x = i % 2 ? random_f32(&random, -87.2f, 88) : random_f32(&random, -2, 2);
        double exact = exp((double)x), error = fabs((double)gumbel_exp(x) - exact);
        cr_assert(error <= 2 * ulp(exact), "exp %.9g: off by %.3g", x, error);
    }
    cr_assert_eq(gumbel_exp(0), 1.0f);
    cr_assert_eq(gumbel_exp(-87.4f), 0.0f);
    cr_assert_eq(gumbel_exp(-INFINITY), 0.0f);
    cr_assert_eq(gumbel_exp(NAN), 0.0f);
}

/* Against double; near its ends the inner logarithm is what it is of a float. */
Test(gumbel, noise_is_the_double_logarithm_of_the_logarithm) {
    struct test_random random = {4};
    for (int i = 0; i < 400000; i++) {
        uint32_t bits = (uint32_t)random_u64(&random);
        double exact = -log(-log((double)philox_uniform(bits)));
        double error = fabs((double)gumbel_noise(bits) - exact);
        /* An error e of log u becomes e / |log u|. */
        double bound = 1e-6 + 1.2e-7 / -log((double)philox_uniform(bits));
        cr_assert(error <= bound, "bits %08x: off by %.3g", bits, error);
    }
}

/* The limits by which a draw passes tokens over. */
Test(gumbel, noise_stays_between_its_limits_and_grows_with_the_bits) {
    cr_assert(gumbel_noise(0) >= GUMBEL_MIN && gumbel_noise(0) < GUMBEL_MIN + 0.01f);
    cr_assert(gumbel_noise(0xffffffffu) <= GUMBEL_MAX);
    cr_assert(gumbel_noise(0xffffffffu) > GUMBEL_MAX - 0.01f);
    float before = -INFINITY;
    for (uint32_t h = 0; h < 1u << 23; h++) {
        float noise = gumbel_noise(h << 9);
        cr_assert(noise >= before - 1e-5f && noise <= GUMBEL_MAX, "step %u", h);
        before = noise > before ? noise : before;
    }
}
