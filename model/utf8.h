/* UTF-8, strictly (no surrogates, no overlong forms, at most U+10FFFF). Pure. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Length in bytes of the character at text[0..n), 1..4; 0: the bytes can not begin one; -1: they are
 * the beginning of one that is cut off. n >= 1. */
int utf8_length(const char *text, size_t n);

/* Bytes that a decoder replaces by one U+FFFD when utf8_length is 0: the longest beginning of a
 * character, at least 1 (Unicode 15, section 3.9, "maximal subpart"). */
int utf8_invalid_length(const char *text, size_t n);

/* Offset of the first byte that is not part of a valid character; n when all are. */
size_t utf8_check(const char *text, size_t n);
