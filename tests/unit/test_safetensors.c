/* One safetensors file: what is read, and every way in which a file can lie. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/safetensors.h"
#include "tests/unit/test.h"

struct image { /* a file in memory */
    uint8_t bytes[4096];
    size_t n_bytes;
};

static void put_length(struct image *image, uint64_t length) {
    for (int i = 0; i < 8; i++) image->bytes[i] = (uint8_t)(length >> 8 * i);
}

static struct image make(const char *header, size_t data_bytes) {
    struct image image = {0};
    size_t n = strlen(header);
    if (8 + n + data_bytes > sizeof image.bytes) abort();
    put_length(&image, n);
    memcpy(image.bytes + 8, header, n);
    for (size_t i = 0; i < data_bytes; i++) image.bytes[8 + n + i] = (uint8_t)i;
    image.n_bytes = 8 + n + data_bytes;
    return image;
}

static const char GOOD[] =
    "{\"__metadata__\":{\"format\":\"pt\"},"
    "\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[8,32]},"
    "\"a\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[0,8]},"
    "\"empty\":{\"dtype\":\"F16\",\"shape\":[0,5],\"data_offsets\":[8,8]},"
    "\"scalar\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[32,40]}}   ";

Test(safetensors, reads_a_good_file) {
    struct image image = make(GOOD, 40);
    struct safetensors file;
    struct error err = {0};
    enum status status = safetensors_parse(&file, "x", image.bytes, image.n_bytes, &err);
    cr_assert_eq(status, STATUS_OK, "%s", err.text);
    cr_assert_eq(file.n_tensors, 4);
    const struct safetensors_tensor *b = safetensors_find(&file, "b");
    cr_assert_not_null(b);
    cr_assert_str_eq(b->dtype, "F32");
    cr_assert_eq(b->n_dims, 2);
    cr_assert_eq(b->shape[0], 2);
    cr_assert_eq(b->shape[1], 3);
    cr_assert_eq(file.data[b->begin], 8);
    cr_assert_eq(b->end, 32);
    cr_assert_eq(safetensors_find(&file, "scalar")->n_dims, 0);
    cr_assert_eq(safetensors_find(&file, "empty")->begin, 8);
    cr_assert_null(safetensors_find(&file, "c"));
    cr_assert_null(safetensors_find(&file, "__metadata__"));
    safetensors_parse_free(&file);
}

/* Every prefix of a good file is refused, in words that name the file. */
Test(safetensors, every_truncation_is_refused) {
    struct image image = make(GOOD, 40);
    for (size_t n = 0; n < image.n_bytes; n++) {
        uint8_t *copy = malloc(n ? n : 1); /* exact, so that a sanitizer sees a read beyond */
        memcpy(copy, image.bytes, n);
        struct safetensors file;
        struct error err = {0};
        enum status status = safetensors_parse(&file, "dir/x.safetensors", copy, n, &err);
        free(copy);
        cr_assert_eq(status, STATUS_INVALID_ARGUMENT, "%zu bytes accepted", n);
        cr_assert(strstr(err.text, "dir/x.safetensors: ") == err.text, "%s", err.text);
        cr_assert(strstr(err.text, "truncated") != NULL, "%zu bytes: %s", n, err.text);
    }
}

Test(safetensors, says_both_sizes_of_a_truncated_file) {
    struct image image = make(GOOD, 40);
    struct safetensors file;
    struct error err = {0};
    char expected[64];
    cr_assert_eq(safetensors_parse(&file, "x", image.bytes, image.n_bytes - 5, &err),
                 STATUS_INVALID_ARGUMENT);
    snprintf(expected, sizeof expected, "has %zu bytes; its header describes %zu",
             image.n_bytes - 5, image.n_bytes);
    cr_assert(strstr(err.text, expected) != NULL, "%s", err.text);
}

#define TENSOR(name, dtype, shape, offsets)                                                        \
    "\"" name "\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static const struct {
    const char *header;
    size_t data_bytes;
    const char *words[3];
} lies[] = {
    {"{" TENSOR("a", "\"F32\"", "[2]", "[0,8]") "," TENSOR("b", "\"F32\"", "[2]", "[4,12]") "}", 12,
     {"\"b\"", "begin at 4; expected 8", "overlap"}},
    {"{" TENSOR("a", "\"F32\"", "[2]", "[0,8]") "," TENSOR("b", "\"F32\"", "[2]", "[0,8]") "}", 8,
     {"begin at 0; expected 8", "overlap", ""}},
    {"{" TENSOR("a", "\"F32\"", "[2]", "[4,12]") "}", 12,
     {"\"a\"", "begin at 4; expected 0", "hole"}},
    {"{" TENSOR("a", "\"F32\"", "[2]", "[0,8]") "," TENSOR("b", "\"F32\"", "[2]", "[12,20]") "}",
     20, {"\"b\"", "begin at 12; expected 8", "hole"}},
    {"{" TENSOR("a", "\"F32\"", "[2]", "[0,8]") "}", 9, {"9 bytes of data", "cover 8", ""}},
    {"{}", 1, {"1 bytes of data", "cover 0", ""}},
    {"{" TENSOR("a", "\"F32\"", "[3]", "[0,8]") "}", 8, {"spans 8 bytes", "expected 12", "F32"}},
    {"{" TENSOR("a", "\"BF16\"", "[2,2]", "[0,16]") "}", 16, {"spans 16", "expected 8", "BF16"}},
    {"{" TENSOR("a", "\"F33\"", "[2]", "[0,8]") "}", 8, {"\"a\".dtype", "\"F33\"", "BF16"}},
    {"{" TENSOR("a", "7", "[2]", "[0,8]") "}", 8, {"\"a\".dtype", "is 7", "a string"}},
    {"{" TENSOR("a", "\"F32\"", "[-2]", "[0,8]") "}", 8, {"\"a\".shape", "[-2]", "0 or more"}},
    {"{" TENSOR("a", "\"F32\"", "[2.0]", "[0,8]") "}", 8, {"\"a\".shape", "[2.0]", "sizes"}},
    {"{" TENSOR("a", "\"F32\"", "2", "[0,8]") "}", 8, {"\"a\".shape", "is 2", "a list"}},
    {"{" TENSOR("a", "\"F32\"", "[1,1,1,1,1,1,1,1,2]", "[0,8]") "}", 8,
     {"\"a\".shape", "at most 8", ""}},
    {"{" TENSOR("a", "\"F32\"", "[4294967296,4294967296]", "[0,0]") "}", 0,
     {"\"a\".shape", "4294967296", "2^63"}},
    {"{" TENSOR("a", "\"F32\"", "[4611686018427387904]", "[0,0]") "}", 0,
     {"\"a\".shape", "4611686018427387904", "2^63"}},
    {"{" TENSOR("a", "\"F32\"", "[2]", "[8,0]") "}", 8,
     {"\"a\".data_offsets", "[8,0]", "begin <="}},
    {"{" TENSOR("a", "\"F32\"", "[2]", "[-8,0]") "}", 8, {"\"a\".data_offsets", "[-8,0]", ""}},
    {"{" TENSOR("a", "\"F32\"", "[2]", "[0]") "}", 8, {"\"a\".data_offsets", "[0]", ""}},
    {"{" TENSOR("a", "\"F32\"", "[2]", "[0,8.0]") "}", 8, {"\"a\".data_offsets", "8.0", ""}},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 0, {"\"a\".data_offsets", "missing", ""}},
    {"{\"a\":[]}", 0, {"\"a\"", "not an object", ""}},
    {"{" TENSOR("a", "\"F32\"", "[1]", "[0,4]") "," TENSOR("a", "\"F32\"", "[1]", "[4,8]") "}", 8,
     {"not valid JSON", "duplicate", "\"a\""}},
    {"{\"__metadata__\":{\"n\":1}}", 0, {"__metadata__.n", "not a string", ""}},
    {"{\"__metadata__\":[]}", 0, {"__metadata__", "not an object", ""}},
    {"{\"a\":", 0, {"not valid JSON", "line 1", ""}},
    {"{} {}", 0, {"not valid JSON", "end of file expected", ""}},
    {"[]", 0, {"does not begin with '{'", "", ""}},
    {" {}", 0, {"does not begin with '{'", "", ""}},
    {"", 4, {"does not begin with '{'", "", ""}},
};

Test(safetensors, refuses_every_lie) {
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        struct image image = make(lies[i].header, lies[i].data_bytes);
        struct safetensors file;
        struct error err = {0};
        enum status status = safetensors_parse(&file, "f", image.bytes, image.n_bytes, &err);
        cr_assert_eq(status, STATUS_INVALID_ARGUMENT, "accepted: %s", lies[i].header);
        cr_assert(strstr(err.text, "f: ") == err.text, "%s", err.text);
        for (int j = 0; j < 3; j++) {
            cr_assert(strstr(err.text, lies[i].words[j]) != NULL, "'%s' is not in: %s",
                      lies[i].words[j], err.text);
        }
    }
}

Test(safetensors, refuses_header_lengths_beyond_reason) {
    static const uint64_t lengths[] = {100000001, UINT64_MAX, UINT64_MAX - 7, INT64_MAX};
    for (int i = 0; i < 4; i++) {
        struct image image = make("{}", 0);
        put_length(&image, lengths[i]);
        struct safetensors file;
        struct error err = {0};
        cr_assert_eq(safetensors_parse(&file, "f", image.bytes, image.n_bytes, &err),
                     STATUS_INVALID_ARGUMENT);
        cr_assert(strstr(err.text, "expected at most 100000000") != NULL, "%s", err.text);
    }
}

Test(safetensors, maps_files) {
    char path[] = "/tmp/tandem_safetensors_XXXXXX";
    int fd = mkstemp(path);
    struct image image = make(GOOD, 40);
    cr_assert(fd >= 0 && write(fd, image.bytes, image.n_bytes) == (ssize_t)image.n_bytes);
    struct safetensors *file;
    struct error err = {0};
    cr_assert_eq(safetensors_open(&file, path, &err), STATUS_OK, "%s", err.text);
    cr_assert_eq(file->n_tensors, 4);
    cr_assert_eq(file->data[39], 39);
    safetensors_close(file);
    cr_assert_eq(ftruncate(fd, 0), 0);
    cr_assert_eq(safetensors_open(&file, path, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "the file has 0 bytes") != NULL, "%s", err.text);
    close(fd);
    unlink(path);
    cr_assert_eq(safetensors_open(&file, path, &err), STATUS_NOT_FOUND);
    cr_assert_eq(safetensors_open(&file, "/tmp", &err), STATUS_INVALID_ARGUMENT);
    cr_assert_str_eq(err.text, "/tmp: not a regular file");
}
