/* Checkpoint folders for tests: a copy of a fixture in a temporary folder, whose JSON can be
 * patched. */
#pragma once
#include <dirent.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FIXTURES TANDEM_SOURCE_DIR "/tests/fixtures/checkpoints/"

static inline void files_write(const char *path, const void *bytes, size_t n_bytes) {
    FILE *out = fopen(path, "wb");
    if (out == NULL || fwrite(bytes, 1, n_bytes, out) != n_bytes || fclose(out) != 0) abort();
}

/* The whole file, malloc'd. */
static inline char *files_read(const char *path, size_t *n_bytes) {
    FILE *in = fopen(path, "rb");
    if (in == NULL || fseek(in, 0, SEEK_END) != 0) {
        fprintf(stderr, "cannot read %s\n", path);
        abort();
    }
    *n_bytes = (size_t)ftell(in);
    char *bytes = malloc(*n_bytes + 1);
    rewind(in);
    if (fread(bytes, 1, *n_bytes, in) != *n_bytes) abort();
    fclose(in);
    return bytes;
}

static inline void files_each(const char *dir, void (*visit)(const char *path, const char *name,
                                                             void *user), void *user) {
    DIR *stream = opendir(dir);
    if (stream == NULL) abort();
    struct dirent *entry;
    while ((entry = readdir(stream)) != NULL) {
        char path[4096];
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", dir, entry->d_name);
        visit(path, entry->d_name, user);
    }
    closedir(stream);
}

static inline void files_copy_one(const char *path, const char *name, void *user) {
    char to[4096];
    size_t n_bytes;
    char *bytes = files_read(path, &n_bytes);
    snprintf(to, sizeof to, "%s/%s", (const char *)user, name);
    files_write(to, bytes, n_bytes);
    free(bytes);
}

/* A fresh folder in `dir` (at least 64 bytes), empty or with the fixture's files. */
static inline void files_make(char *dir, const char *fixture) {
    strcpy(dir, "/tmp/tandem_test_XXXXXX");
    if (mkdtemp(dir) == NULL) abort();
    if (fixture == NULL) return;
    char from[4096];
    snprintf(from, sizeof from, "%s%s", FIXTURES, fixture);
    files_each(from, files_copy_one, dir);
}

static inline void files_remove_one(const char *path, const char *name, void *user) {
    (void)name;
    (void)user;
    unlink(path);
}

static inline void files_remove(const char *dir) {
    files_each(dir, files_remove_one, NULL);
    rmdir(dir);
}

/* Fields of `patch` over those of `root`; null takes a field out; objects are merged. */
static inline void files_merge(json_t *root, const json_t *patch) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)patch, key, value) {
        json_t *inner = json_object_get(root, key);
        if (json_is_null(value)) {
            json_object_del(root, key);
        } else if (json_is_object(inner) && json_is_object(value)) {
            files_merge(inner, value);
        } else {
            json_object_set(root, key, value);
        }
    }
}

static inline json_t *files_parse(const char *text, size_t n_bytes) {
    json_t *value = json_loadb(text, n_bytes, 0, NULL);
    if (value == NULL) abort();
    return value;
}

static inline void files_patch_json(const char *dir, const char *name, const char *patch) {
    char path[4096];
    size_t n_bytes;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    char *text = files_read(path, &n_bytes);
    json_t *root = files_parse(text, n_bytes), *over = files_parse(patch, strlen(patch));
    files_merge(root, over);
    if (json_dump_file(root, path, 0) != 0) abort();
    json_decref(root);
    json_decref(over);
    free(text);
}

/* The same for the header of model.safetensors; the data stays. */
static inline void files_patch_header(const char *dir, const char *patch) {
    char path[4096];
    size_t n_bytes, header = 0;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    unsigned char *bytes = (unsigned char *)files_read(path, &n_bytes);
    for (int i = 7; i >= 0; i--) header = header << 8 | bytes[i];
    json_t *root = files_parse((char *)bytes + 8, header);
    json_t *over = files_parse(patch, strlen(patch));
    files_merge(root, over);
    char *text = json_dumps(root, JSON_COMPACT);
    size_t n_text = strlen(text), n_data = n_bytes - 8 - header;
    unsigned char *out = malloc(8 + n_text + n_data);
    for (int i = 0; i < 8; i++) out[i] = (unsigned char)((unsigned long long)n_text >> 8 * i);
    memcpy(out + 8, text, n_text);
    memcpy(out + 8 + n_text, bytes + 8 + header, n_data);
    files_write(path, out, 8 + n_text + n_data);
    json_decref(root);
    json_decref(over);
    free(text);
    free(out);
    free(bytes);
}
