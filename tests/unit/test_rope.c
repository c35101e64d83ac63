/* Rotary frequencies against the formulas of the papers and values computed by transformers. */
#include <math.h>

#include "model/rope.h"
#include "tests/unit/test.h"

static struct model_config config_of(int head_dim, struct model_rope rope) {
    return (struct model_config){.head_dim = head_dim, .rope = rope};
}

static double relative(double a, double b) {
    return fabs(a - b) / fabs(b);
}

Test(rope, plain_is_a_geometric_series) {
    struct model_config config = config_of(128, (struct model_rope){.theta = 10000});
    float freq[64];
    model_rope_inv_freq(freq, &config);
    cr_assert_eq(freq[0], 1.0f);
    for (int i = 1; i < 64; i++) {
        cr_assert(relative(freq[i] / freq[i - 1], pow(10000.0, -1.0 / 64)) < 1e-6, "pair %d", i);
    }
}

Test(rope, linear_divides_every_frequency) {
    struct model_rope rope = {.theta = 10000};
    struct model_config plain = config_of(16, rope);
    rope.scaling = MODEL_ROPE_LINEAR;
    rope.factor = 4;
    struct model_config linear = config_of(16, rope);
    float a[8], b[8];
    model_rope_inv_freq(a, &plain);
    model_rope_inv_freq(b, &linear);
    for (int i = 0; i < 8; i++) cr_assert_eq(b[i], a[i] / 4);
}

/* transformers 5.23.0, ROPE_INIT_FUNCTIONS["llama3"], head_dim 64, factor 32, as Llama-3.2-1B. */
static const float llama32[32] = {
    1.0f, 0.663601279f, 0.440366626f, 0.292227834f,
    0.193922758f, 0.128687382f, 0.0853971019f, 0.0566696189f,
    0.0376060307f, 0.0249554086f, 0.0165604409f, 0.0109895291f,
    0.00729266508f, 0.00483942125f, 0.00321144611f, 0.00129054801f,
    0.000429556705f, 9.70828623e-05f, 1.94616387e-05f, 1.29147675e-05f,
    8.57025589e-06f, 5.68723226e-06f, 3.77405445e-06f, 2.50446715e-06f,
    1.66196742e-06f, 1.10288363e-06f, 7.31874934e-07f, 4.85673127e-07f,
    3.22293289e-07f, 2.1387423e-07f, 1.41927202e-07f, 9.41830649e-08f,
};

Test(rope, llama3_agrees_with_transformers) {
    struct model_rope rope = {.theta = 500000, .scaling = MODEL_ROPE_LLAMA3, .factor = 32,
                              .low_freq_factor = 1, .high_freq_factor = 4,
                              .original_max_position = 8192};
    struct model_config config = config_of(64, rope);
    float freq[32];
    model_rope_inv_freq(freq, &config);
    for (int i = 0; i < 32; i++) {
        cr_assert(relative(freq[i], llama32[i]) < 2e-6, "pair %d: %.9g, expected %.9g", i, freq[i],
                  llama32[i]);
    }
}

Test(rope, llama3_keeps_short_and_stretches_long_wavelengths) {
    struct model_rope rope = {.theta = 500000};
    struct model_config plain = config_of(128, rope);
    rope = (struct model_rope){.theta = 500000, .scaling = MODEL_ROPE_LLAMA3, .factor = 8,
                               .low_freq_factor = 1, .high_freq_factor = 4,
                               .original_max_position = 8192};
    struct model_config scaled = config_of(128, rope);
    float a[64], b[64];
    model_rope_inv_freq(a, &plain);
    model_rope_inv_freq(b, &scaled);
    int kept = 0, divided = 0, blended = 0;
    for (int i = 0; i < 64; i++) {
        double wavelength = 2 * 3.14159265358979 / a[i];
        if (wavelength < 8192.0 / 4) {
            cr_assert_eq(b[i], a[i]);
            kept++;
        } else if (wavelength > 8192) {
            cr_assert_eq(b[i], a[i] / 8);
            divided++;
        } else {
            cr_assert(b[i] < a[i] && b[i] > a[i] / 8);
            blended++;
        }
    }
    cr_assert(kept > 0 && divided > 0 && blended > 0);
}
