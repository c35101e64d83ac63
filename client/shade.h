/* Text on a terminal, with accepted draft tokens fainter than the target's own.
 *
 * Faint (SGR 2) is relative to the terminal's own colours, so it reads on dark and light ones alike. A
 * token's text ends where the server's text_ends says; text that a stop string or an unfinished character
 * held back is shown with the token that let it go. Every call leaves the terminal plain. */
#pragma once
#include <stdbool.h>
#include <stdio.h>

#include "common/error.h"
#include "tandem/v1/generation.pb-c.h"

struct shade {
    bool on;       /* false: text as it is */
    bool drafted;  /* the last token was */
};

/* INTERNAL: the chunk's columns do not fit each other or its text. */
enum status shade_check(const Tandem__V1__GenerateChunk *chunk, struct error *err);

/* Writes the chunk's text, which shade_check has passed. */
void shade_write(struct shade *shade, FILE *out, const Tandem__V1__GenerateChunk *chunk);
