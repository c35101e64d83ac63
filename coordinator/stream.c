#include "coordinator/stream.h"

struct stream {
    struct stream_options options;
    struct detokenizer *detokenizer;
    struct bytes held;    /* decoded, not yet given out */
    uint32_t n_tokens;
    int stop;
};

struct stream *stream_create(const struct tokenizer *tokenizer,
                             const struct stream_options *options) {
    struct stream *stream = xcalloc(1, sizeof *stream);
    stream->options = *options;
    stream->stop = -1;
    if (tokenizer != NULL) {
        stream->detokenizer = detokenizer_create(tokenizer, options->skip_special);
    }
    return stream;
}

void stream_destroy(struct stream *stream) {
    if (stream == NULL) return;
    if (stream->detokenizer != NULL) detokenizer_free(stream->detokenizer);
    bytes_free(&stream->held);
    free(stream);
}

/* The stop string that ends at byte `end` of the held text, the longest; -1: none. */
static int stop_ending_at(const struct stream *stream, size_t end) {
    int best = -1;
    for (size_t i = 0; i < stream->options.n_stops; i++) {
        const struct stream_stop *stop = &stream->options.stops[i];
        if (stop->n_bytes > end) continue;
        if (memcmp(stream->held.data + end - stop->n_bytes, stop->text, stop->n_bytes) != 0) continue;
        if (best < 0 || stop->n_bytes > stream->options.stops[best].n_bytes) best = (int)i;
    }
    return best;
}

/* How many bytes at the end of the held text may still become a stop string. */
static size_t held_back(const struct stream *stream) {
    size_t longest = 0;
    for (size_t i = 0; i < stream->options.n_stops; i++) {
        const struct stream_stop *stop = &stream->options.stops[i];
        size_t n = stop->n_bytes - 1 < stream->held.n ? stop->n_bytes - 1 : stream->held.n;
        for (; n > longest; n--) {
            if (memcmp(stream->held.data + stream->held.n - n, stop->text, n) == 0) longest = n;
        }
    }
    return longest;
}

static void give_out(struct stream *stream, struct bytes *out, size_t n) {
    bytes_append(out, stream->held.data, n);
    bytes_drop(&stream->held, n);
}

/* Appends text and looks for a stop string that it completes. */
static bool add_text(struct stream *stream, struct bytes *out, const char *text, size_t n_bytes) {
    size_t before = stream->held.n;
    bytes_append(&stream->held, text, n_bytes);
    if (stream->n_tokens > stream->options.min_tokens) {
        for (size_t end = before + 1; end <= stream->held.n; end++) {
            int stop = stop_ending_at(stream, end);
            if (stop < 0) continue;
            stream->stop = stop;
            size_t cut = stream->options.include_stop ? 0 : stream->options.stops[stop].n_bytes;
            give_out(stream, out, end - cut);
            stream->held.n = 0;
            return true;
        }
    }
    give_out(stream, out, stream->held.n - held_back(stream));
    return false;
}

bool stream_push_text(struct stream *stream, struct bytes *out, const char *text, size_t n_bytes) {
    CHECK(stream->stop < 0);
    stream->n_tokens++;
    return add_text(stream, out, text, n_bytes);
}

bool stream_push(struct stream *stream, struct bytes *out, int32_t id) {
    const char *text;
    size_t n_bytes;
    detokenizer_push(stream->detokenizer, id, &text, &n_bytes);
    return stream_push_text(stream, out, text, n_bytes);
}

void stream_push_silent(struct stream *stream) {
    stream->n_tokens++;
}

bool stream_end(struct stream *stream, struct bytes *out) {
    if (stream->stop >= 0) return true;
    const char *text = "";
    size_t n_bytes = 0;
    if (stream->detokenizer != NULL) detokenizer_finish(stream->detokenizer, &text, &n_bytes);
    if (add_text(stream, out, text, n_bytes)) return true;
    give_out(stream, out, stream->held.n);
    return false;
}

int stream_stop(const struct stream *stream) {
    return stream->stop;
}

uint32_t stream_tokens(const struct stream *stream) {
    return stream->n_tokens;
}
