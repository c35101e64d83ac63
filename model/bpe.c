/* Byte-pair encoding of one piece (Sennrich et al., 2016): the pair of lowest rank is merged first,
 * the leftmost of equals. Short pieces scan for it; long ones keep candidates in a heap, so that a
 * megabyte of one letter costs n log n. */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "model/tokenizer_internal.h"
#include "model/utf8.h"

enum { SHORT_PIECE = 48 };

int32_t token_map_find(const struct tokenizer *t, const char *spelling, size_t n) {
    uint32_t at = (uint32_t)XXH3_64bits(spelling, n);
    for (;; at++) {
        int32_t id = t->map.ids[at & t->map.mask];
        if (id < 0) return -1;
        const char *seen = t->tokens[id].spelling;
        /* strncmp alone would take a NUL in the text for the token's end and read past it. */
        if (strlen(seen) == n && memcmp(seen, spelling, n) == 0) return id;
    }
}

const struct merge *merge_map_find(const struct tokenizer *t, int32_t left, int32_t right) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    uint32_t at = (uint32_t)((key * 0x9E3779B97F4A7C15u) >> 32);
    for (;; at++) {
        const struct merge *merge = &t->merges.merges[at & t->merges.mask];
        if (merge->left < 0) return NULL;
        if (merge->left == left && merge->right == right) return merge;
    }
}

/* --- symbols to begin with ------------------------------------------------------------------- */

static void push_symbol(int32_t *symbols, size_t *n, int32_t id) {
    symbols[(*n)++] = id;
}

/* A byte-fallback token for each byte, or none at all. */
static bool push_fallback(const struct tokenizer *t, int32_t *symbols, size_t *count,
                          const char *character, int length) {
    if (!t->byte_fallback) return false;
    for (int i = 0; i < length; i++) {
        if (t->byte_ids[(unsigned char)character[i]] < 0) return false;
    }
    for (int i = 0; i < length; i++) {
        push_symbol(symbols, count, t->byte_ids[(unsigned char)character[i]]);
    }
    return true;
}

static size_t characters(const struct tokenizer *t, int32_t *symbols, const char *piece, size_t n) {
    size_t count = 0;
    bool after_unk = false;
    for (size_t at = 0; at < n;) {
        int length = utf8_length(piece + at, n - at);
        if (length <= 0) length = 1;
        int32_t id = token_map_find(t, piece + at, (size_t)length);
        bool known = true;
        if (id >= 0) push_symbol(symbols, &count, id);
        else known = push_fallback(t, symbols, &count, piece + at, length);
        bool fused = after_unk && t->fuse_unk;
        if (!known && t->unk >= 0 && !fused) push_symbol(symbols, &count, t->unk);
        after_unk = !known;
        at += (size_t)length;
    }
    return count;
}

static size_t bytes(const struct tokenizer *t, int32_t *symbols, const char *piece, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = t->byte_ids[(unsigned char)piece[i]];
        if (id < 0) id = t->unk;
        if (id >= 0) push_symbol(symbols, &count, id);
    }
    return count;
}

/* --- short pieces ---------------------------------------------------------------------------- */

static size_t merge_short(const struct tokenizer *t, int32_t *symbols, size_t n) {
    const struct merge *pairs[SHORT_PIECE];
    for (size_t i = 0; i + 1 < n; i++) pairs[i] = merge_map_find(t, symbols[i], symbols[i + 1]);
    for (;;) {
        size_t best = n;
        for (size_t i = 0; i + 1 < n; i++) {
            if (pairs[i] != NULL && (best == n || pairs[i]->rank < pairs[best]->rank)) best = i;
        }
        if (best == n) return n;
        symbols[best] = pairs[best]->id;
        n--;
        memmove(symbols + best + 1, symbols + best + 2, (n - best - 1) * sizeof *symbols);
        if (best + 1 < n) {
            memmove(pairs + best + 1, pairs + best + 2, (n - best - 1) * sizeof *pairs);
            pairs[best] = merge_map_find(t, symbols[best], symbols[best + 1]);
        }
        if (best > 0) pairs[best - 1] = merge_map_find(t, symbols[best - 1], symbols[best]);
    }
}

/* --- long pieces ----------------------------------------------------------------------------- */

struct candidate {
    int32_t rank;
    uint32_t left;       /* index of the left symbol: among equal ranks the leftmost first */
    int32_t left_id, right_id; /* what stood there when it was pushed */
};

struct heap {
    struct candidate *items;
    size_t n, capacity;
};

static bool precedes(const struct candidate *a, const struct candidate *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->left < b->left;
}

static void heap_push(struct heap *heap, struct candidate item) {
    if (heap->n == heap->capacity) {
        heap->capacity *= 2;
        heap->items = xrealloc(heap->items, heap->capacity * sizeof *heap->items);
    }
    size_t i = heap->n++;
    while (i > 0 && precedes(&item, &heap->items[(i - 1) / 2])) {
        heap->items[i] = heap->items[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap->items[i] = item;
}

static struct candidate heap_pop(struct heap *heap) {
    struct candidate top = heap->items[0], last = heap->items[--heap->n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= heap->n) break;
        if (child + 1 < heap->n && precedes(&heap->items[child + 1], &heap->items[child])) child++;
        if (!precedes(&heap->items[child], &last)) break;
        heap->items[i] = heap->items[child];
        i = child;
    }
    heap->items[i] = last;
    return top;
}

struct links {
    uint32_t previous, next; /* UINT32_MAX: none */
};

static void offer(const struct tokenizer *t, struct heap *heap, const int32_t *symbols,
                  uint32_t left, uint32_t right) {
    const struct merge *merge = merge_map_find(t, symbols[left], symbols[right]);
    if (merge == NULL) return;
    heap_push(heap, (struct candidate){merge->rank, left, symbols[left], symbols[right]});
}

static size_t merge_long(const struct tokenizer *t, int32_t *symbols, size_t n) {
    struct links *links = xmalloc(n * sizeof *links);
    struct heap heap = {xmalloc(n * sizeof *heap.items), 0, n};
    for (size_t i = 0; i < n; i++) {
        links[i].previous = i > 0 ? (uint32_t)i - 1 : UINT32_MAX;
        links[i].next = i + 1 < n ? (uint32_t)i + 1 : UINT32_MAX;
        if (i + 1 < n) offer(t, &heap, symbols, (uint32_t)i, (uint32_t)i + 1);
    }
    while (heap.n > 0) {
        struct candidate c = heap_pop(&heap);
        uint32_t right = links[c.left].next;
        if (symbols[c.left] != c.left_id || right == UINT32_MAX || symbols[right] != c.right_id) {
            continue; /* an earlier merge has changed one of them */
        }
        symbols[c.left] = merge_map_find(t, c.left_id, c.right_id)->id;
        symbols[right] = -1;
        uint32_t next = links[right].next;
        links[c.left].next = next;
        if (next != UINT32_MAX) {
            links[next].previous = c.left;
            offer(t, &heap, symbols, c.left, next);
        }
        uint32_t previous = links[c.left].previous;
        if (previous != UINT32_MAX) offer(t, &heap, symbols, previous, c.left);
    }
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        if (symbols[i] >= 0) symbols[count++] = symbols[i];
    }
    free(heap.items);
    free(links);
    return count;
}

/* --- the piece ------------------------------------------------------------------------------- */

static void encode_whole(const struct tokenizer *t, struct token_list *out, const char *piece,
                         size_t n) {
    int32_t few[SHORT_PIECE];
    int32_t *symbols = n <= SHORT_PIECE ? few : xmalloc(n * sizeof *symbols);
    size_t count = t->byte_level ? bytes(t, symbols, piece, n) : characters(t, symbols, piece, n);
    count = count <= SHORT_PIECE ? merge_short(t, symbols, count) : merge_long(t, symbols, count);
    for (size_t i = 0; i < count; i++) token_list_push(out, symbols[i]);
    if (symbols != few) free(symbols);
}

/* ignore_merges: a piece that is a token is that token. */
static bool encode_as_token(const struct tokenizer *t, struct token_list *out, const char *piece,
                            size_t n) {
    char spelling[512];
    size_t length = 0;
    if (!t->byte_level) {
        int32_t id = token_map_find(t, piece, n);
        if (id >= 0) token_list_push(out, id);
        return id >= 0;
    }
    if (2 * n > sizeof spelling) return false;
    for (size_t i = 0; i < n; i++) {
        uint32_t c = byte_level_char((unsigned char)piece[i]);
        if (c < 0x80) {
            spelling[length++] = (char)c;
        } else {
            spelling[length++] = (char)(0xC0 | c >> 6);
            spelling[length++] = (char)(0x80 | (c & 0x3F));
        }
    }
    int32_t id = token_map_find(t, spelling, length);
    if (id >= 0) token_list_push(out, id);
    return id >= 0;
}

void bpe_encode(const struct tokenizer *t, struct token_list *out, const char *piece, size_t n) {
    if (n == 0) return;
    if (t->ignore_merges && encode_as_token(t, out, piece, n)) return;
    if (!t->space_starts) {
        encode_whole(t, out, piece, n);
        return;
    }
    /* No token continues past the beginning of a word: words can be encoded one by one. */
    static const char mark[] = "\xE2\x96\x81";
    size_t begin = 0;
    for (size_t at = 1; at + 2 < n; at++) {
        bool starts = memcmp(piece + at, mark, 3) == 0;
        bool after_mark = at >= 3 && memcmp(piece + at - 3, mark, 3) == 0;
        if (!starts || after_mark) continue;
        encode_whole(t, out, piece + begin, at - begin);
        begin = at;
    }
    encode_whole(t, out, piece + begin, n - begin);
}
