#include "client/shade.h"

enum status shade_check(const Tandem__V1__GenerateChunk *chunk, struct error *err) {
    if (chunk->n_drafted == 0 && chunk->n_text_ends == 0) return STATUS_OK;
    bool fits = chunk->n_drafted == chunk->n_token_ids && chunk->n_text_ends == chunk->n_token_ids;
    for (size_t i = 0; fits && i < chunk->n_text_ends; i++) {
        fits = chunk->text_ends[i] <= chunk->text.len &&
               (i == 0 || chunk->text_ends[i - 1] <= chunk->text_ends[i]);
    }
    if (fits) return STATUS_OK;
    return error_set(err, STATUS_INTERNAL,
                     "the server's chunk has %zu tokens with %zu marks and %zu ends in %zu bytes "
                     "of text; expected one of each for every token, the ends ascending",
                     chunk->n_token_ids, chunk->n_drafted, chunk->n_text_ends, chunk->text.len);
}

static void write_run(const struct shade *shade, FILE *out, const uint8_t *text, size_t n) {
    if (n == 0) return;
    bool faint = shade->on && shade->drafted;
    if (faint) fputs("\033[2m", out);
    fwrite(text, 1, n, out);
    if (faint) fputs("\033[22m", out);
}

void shade_write(struct shade *shade, FILE *out, const Tandem__V1__GenerateChunk *chunk) {
    size_t from = 0, to = 0;
    for (size_t i = 0; i < chunk->n_drafted; i++) {
        bool drafted = chunk->drafted[i] != 0;
        if (drafted != shade->drafted) {
            write_run(shade, out, chunk->text.data + from, to - from);
            from = to;
            shade->drafted = drafted;
        }
        to = chunk->text_ends[i];
    }
    write_run(shade, out, chunk->text.data + from, chunk->text.len - from);
}
