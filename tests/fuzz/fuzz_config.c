/* libFuzzer: any text as config.json; what follows a NUL byte is generation_config.json. What is
 * accepted must be safe to compute with. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "model/config.h"
#include "model/rope.h"
#include "model/shard.h"

static void check_numbers(const struct model_config *c) {
    CHECK(c->hidden > 0 && c->n_layers > 0 && c->n_heads > 0 && c->n_kv_heads > 0);
    CHECK(c->n_heads % c->n_kv_heads == 0 && c->head_dim % 2 == 0 && c->head_dim > 0);
    CHECK(c->intermediate > 0 && c->vocab > 0 && c->max_position > 0 && c->sliding_window >= 0);
    CHECK((int64_t)c->n_heads * c->head_dim * 3 <= INT32_MAX && c->intermediate <= INT32_MAX / 2);
    CHECK(c->rms_eps > 0 && isfinite(c->rms_eps));
    CHECK(c->bos >= -1 && c->bos < c->vocab && c->n_eos >= 0 && c->n_eos <= MODEL_MAX_EOS);
    for (int i = 0; i < c->n_eos; i++) CHECK(c->eos[i] >= 0 && c->eos[i] < c->vocab);
}

static void check_derived(const struct model_config *c) {
    float inv_freq[2048];
    CHECK(c->head_dim / 2 <= 2048);
    model_rope_inv_freq(inv_freq, c);
    for (int i = 0; i < c->head_dim / 2; i++) CHECK(isfinite(inv_freq[i]) && inv_freq[i] >= 0);
    struct shard shard;
    for (int rank = 0; rank < 8; rank++) CHECK(shard_make(&shard, c, rank, 8, NULL) == STATUS_OK);
    CHECK(shard.head_end == c->n_heads && shard.inter_end == c->intermediate);
    CHECK(shard.kv_head_end <= c->n_kv_heads && shard.vocab_end == c->vocab);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes) {
    const uint8_t *end = memchr(bytes, 0, n_bytes);
    const char *text = (const char *)bytes, *generation = NULL;
    size_t n_config = n_bytes, n_generation = 0;
    if (end != NULL) {
        n_config = (size_t)(end - bytes);
        generation = text + n_config + 1;
        n_generation = n_bytes - n_config - 1;
    }
    struct model_config config;
    struct error err;
    enum status status =
        model_config_parse(&config, "fuzz", text, n_config, generation, n_generation, &err);
    if (status != STATUS_OK) {
        CHECK(err.status == STATUS_INVALID_ARGUMENT && err.text[0] != '\0');
        return 0;
    }
    check_numbers(&config);
    check_derived(&config);
    return 0;
}
