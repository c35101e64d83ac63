/* From tokens to the text a client sees: decoding, and stop strings across token borders.
 *
 * Place: the coordinator's thread, one per request, between the replica's steps and the client's
 * chunks. Text that may be the beginning of a stop string is held back until it is known not to be.
 * Pure apart from the detokenizer it owns. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "coordinator/bytes.h"
#include "model/tokenizer.h"

enum { STREAM_MAX_STOPS = 16 };

struct stream_stop {
    const char *text; /* borrowed as long as the stream lives */
    size_t n_bytes;   /* at least 1 */
};

struct stream_options {
    struct stream_stop stops[STREAM_MAX_STOPS];
    size_t n_stops;
    uint32_t min_tokens;   /* a stop string counts only when a later token than this completes it */
    bool include_stop;     /* the matched stop string is part of the text */
    bool skip_special;     /* special tokens have no text */
};

struct stream;

/* `tokenizer` is borrowed as long as the stream lives; NULL: only stream_push_text is used. */
struct stream *stream_create(const struct tokenizer *tokenizer,
                             const struct stream_options *options);
void stream_destroy(struct stream *stream);

/* Adds the next token and appends the text that became certain to `out`. True: a stop string
 * matched; the text ends here and nothing may be pushed any more. Of several matches the one that
 * ends first wins, among those the longest. */
bool stream_push(struct stream *stream, struct bytes *out, int32_t id);

/* The same for a token whose text is known. */
bool stream_push_text(struct stream *stream, struct bytes *out, const char *text, size_t n_bytes);

/* A token that has no text of its own: the end token. */
void stream_push_silent(struct stream *stream);

/* The end: appends what was held back. True: an unfinished character completed a stop string. */
bool stream_end(struct stream *stream, struct bytes *out);

/* Index of the stop string that matched, -1: none. */
int stream_stop(const struct stream *stream);

/* Tokens pushed. */
uint32_t stream_tokens(const struct stream *stream);
