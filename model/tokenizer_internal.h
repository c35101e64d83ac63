/* The inside of a tokenizer: tokenizer_json.c fills it, tokenizer.c and bpe.c encode with it,
 * detokenizer.c decodes. Private to model/tokenizer*.c, model/bpe.c and model/detokenizer.c. */
#pragma once
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "model/tokenizer.h"

/* One vocabulary entry. */
struct token {
    char *spelling; /* as in tokenizer.json; NULL: a hole */
    char *bytes;    /* what it stands for in text; special tokens: their spelling */
    uint32_t n_bytes;
    bool special, added;
    int16_t byte; /* 0..255: a byte-fallback token <0xXX>; -1 */
};

/* Open addressing from a spelling to its id. */
struct token_map {
    int32_t *ids; /* -1: empty */
    uint32_t mask;
};

/* Open addressing from a pair of ids to its merge. */
struct merge {
    int32_t left, right; /* left -1: empty */
    int32_t rank, id;
};
struct merge_map {
    struct merge *merges;
    uint32_t mask;
    int n;
};

enum normalizer_kind { NORMALIZE_NFC, NORMALIZE_NFD, NORMALIZE_NFKC, NORMALIZE_NFKD,
                       NORMALIZE_PREPEND, NORMALIZE_REPLACE };
struct normalizer {
    enum normalizer_kind kind;
    char *pattern, *content; /* REPLACE; PREPEND uses content */
};

enum pretokenizer_kind { PRETOKENIZE_SPLIT, PRETOKENIZE_BYTE_LEVEL, PRETOKENIZE_METASPACE,
                         PRETOKENIZE_DIGITS };
struct pretokenizer {
    enum pretokenizer_kind kind;
    pcre2_code *regex;     /* SPLIT and BYTE_LEVEL with a regex; NULL: no splitting */
    bool removes;          /* SPLIT: matches are dropped instead of isolated */
    bool prefix_space;     /* BYTE_LEVEL: puts a space in front */
    bool individual;       /* DIGITS */
    int prepend;           /* METASPACE: 0 never, 1 first piece only, 2 always */
    bool split;            /* METASPACE: every replacement begins a piece */
};

struct added_token {
    int32_t id;
    char *content; /* what is searched (normalised where the token says so) */
    size_t n_bytes;
    bool lstrip, rstrip, single_word, normalized;
};

enum { TOKENIZER_MAX_STEPS = 8, TOKENIZER_MAX_EXTRA = 8 };

struct tokenizer {
    struct token *tokens;
    int n_tokens;
    struct token_map map;
    struct merge_map merges;
    bool byte_level;    /* symbols are bytes; otherwise characters */
    bool byte_fallback, fuse_unk, ignore_merges;
    bool space_starts;  /* characters: no token has U+2581 after anything else, so words part there */
    int32_t unk;        /* -1: none */
    int32_t byte_ids[256];     /* byte-level: of each byte; fallback: of <0xXX>; -1 */
    struct normalizer normalizers[TOKENIZER_MAX_STEPS];
    int n_normalizers;
    struct pretokenizer pretokenizers[TOKENIZER_MAX_STEPS];
    int n_pretokenizers;
    struct added_token *added; /* longest content first */
    int n_added;
    uint8_t added_first[256];  /* some added token's content begins with this byte */
    int32_t prefix[TOKENIZER_MAX_EXTRA], suffix[TOKENIZER_MAX_EXTRA]; /* post-processor */
    int n_prefix, n_suffix;
    bool decodes_metaspace;    /* U+2581 is a space in text */
    bool strips_first_space;   /* one space at the start of the text is the tokenizer's own */
    uint64_t fingerprint;
};

int32_t token_map_find(const struct tokenizer *tokenizer, const char *spelling, size_t n);
const struct merge *merge_map_find(const struct tokenizer *tokenizer, int32_t left, int32_t right);

/* Appends the ids of one piece. Byte-level pieces are raw bytes. */
void bpe_encode(const struct tokenizer *tokenizer, struct token_list *out, const char *piece,
                size_t n);

/* Byte-level alphabet: the character that stands for a byte, and back (-1: none). */
uint32_t byte_level_char(unsigned char byte);
int byte_level_byte(uint32_t character);
