/* libFuzzer: any bytes as a safetensors file. What is accepted must hold what the header promises:
 * every tensor inside the file, all together the whole data, each found again by its name. */
#include <stddef.h>
#include <stdint.h>

#include "model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n_bytes) {
    struct safetensors file;
    struct error err;
    if (safetensors_parse(&file, "fuzz", bytes, n_bytes, &err) != STATUS_OK) {
        CHECK(err.status == STATUS_INVALID_ARGUMENT && err.text[0] != '\0');
        return 0;
    }
    uint64_t covered = 0, sum = 0;
    for (size_t i = 0; i < file.n_tensors; i++) {
        const struct safetensors_tensor *tensor = &file.tensors[i];
        CHECK(tensor->begin <= tensor->end && tensor->end <= n_bytes - file.header_bytes);
        CHECK(safetensors_find(&file, tensor->name) == tensor);
        for (uint64_t at = tensor->begin; at < tensor->end; at++) sum += file.data[at];
        covered += tensor->end - tensor->begin;
    }
    CHECK(covered == n_bytes - file.header_bytes);
    CHECK(sum <= 255 * covered);
    safetensors_parse_free(&file);
    return 0;
}
