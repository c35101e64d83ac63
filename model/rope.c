#include "model/rope.h"

#include <math.h>

static double scale_llama3(double freq, const struct model_rope *rope) {
    const double pi = 3.14159265358979323846;
    double wavelength = 2.0 * pi / freq;
    double context = rope->original_max_position;
    double low = rope->low_freq_factor, high = rope->high_freq_factor;
    if (wavelength > context / low) return freq / rope->factor;
    if (wavelength < context / high) return freq;
    double kept = (context / wavelength - low) / (high - low);
    return (1.0 - kept) * freq / rope->factor + kept * freq;
}

void model_rope_inv_freq(float *out, const struct model_config *config) {
    const struct model_rope *rope = &config->rope;
    int n = config->head_dim / 2;
    for (int i = 0; i < n; i++) {
        double freq = pow(rope->theta, -(double)i / n);
        if (rope->scaling == MODEL_ROPE_LINEAR) freq /= rope->factor;
        if (rope->scaling == MODEL_ROPE_LLAMA3) freq = scale_llama3(freq, rope);
        out[i] = (float)freq;
    }
}
