/* Messages in one block of memory, metadata, time, and the loop. See rpc.h and rpc_internal.h. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "proto/rpc_internal.h"

/* ---- messages: an arena whose first allocation is the message itself ------------------------- */

struct block_chunk {
    struct block_chunk *next;
};

/* Stands directly before its message. Memory is taken from the front chunk; all chunks go at
 * once. */
struct block {
    struct block_chunk *chunks;      /* beyond the first, which is the block */
    char *free, *end;
    size_t total, total_max;
    atomic_int holders;              /* who delivers it, and who kept it */
};

#define BLOCK_ALIGN 16
#define BLOCK_UP(n) (((n) + (BLOCK_ALIGN - 1)) & ~(size_t)(BLOCK_ALIGN - 1))
#define BLOCK_HEADER BLOCK_UP(sizeof(struct block))
#define CHUNK_HEADER BLOCK_UP(sizeof(struct block_chunk))

static struct block *block_of(const ProtobufCMessage *message) {
    return (struct block *)((char *)message - BLOCK_HEADER);
}

static bool block_grow(struct block *block, size_t need) {
    if (need > block->total_max - block->total) return false;
    size_t size = block->total > need ? block->total : need;   /* double */
    if (size > block->total_max - block->total) size = block->total_max - block->total;
    struct block_chunk *chunk = malloc(CHUNK_HEADER + size);
    if (chunk == NULL) return false;
    chunk->next = block->chunks;
    block->chunks = chunk;
    block->free = (char *)chunk + CHUNK_HEADER;
    block->end = block->free + size;
    block->total += size;
    return true;
}

static void *block_alloc(void *data, size_t size) {
    struct block *block = data;
    if (size > block->total_max) return NULL;
    size = BLOCK_UP(size);
    if ((size_t)(block->end - block->free) < size && !block_grow(block, size)) return NULL;
    void *memory = block->free;
    block->free += size;
    return memory;
}

static void block_free_one(void *data, void *memory) {
    (void)data, (void)memory;   /* everything goes with the block */
}

static void block_destroy(struct block *block) {
    for (struct block_chunk *chunk = block->chunks, *next; chunk != NULL; chunk = next) {
        next = chunk->next;
        free(chunk);
    }
    free(block);
}

enum status rpc_message_unpack(ProtobufCMessage **message, const ProtobufCMessageDescriptor *type,
                               const void *bytes, size_t n_bytes, size_t unpacked_max,
                               struct error *err) {
    *message = NULL;
    size_t first = BLOCK_UP(type->sizeof_message + 2 * n_bytes + 64);
    if (first > unpacked_max) first = BLOCK_UP(type->sizeof_message);
    struct block *block = malloc(BLOCK_HEADER + first);
    if (block == NULL) {
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for a %s of %zu bytes",
                         type->name, n_bytes);
    }
    *block = (struct block){.free = (char *)block + BLOCK_HEADER, .total = first,
                            .total_max = unpacked_max > first ? unpacked_max : first,
                            .holders = 1};
    block->end = block->free + first;
    ProtobufCAllocator allocator = {block_alloc, block_free_one, block};
    ProtobufCMessage *unpacked = protobuf_c_message_unpack(type, &allocator, n_bytes, bytes);
    if (unpacked != NULL) {
        CHECK(block_of(unpacked) == block);
        *message = unpacked;
        return STATUS_OK;
    }
    block_destroy(block);
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "%zu bytes are not a %s, or unpack to more than %zu bytes", n_bytes,
                     type->name, unpacked_max);
}

/* The keeper may free it on another thread before the callback returns. */
ProtobufCMessage *rpc_message_keep(const ProtobufCMessage *message) {
    atomic_fetch_add(&block_of(message)->holders, 1);
    return (ProtobufCMessage *)message;
}

void rpc_message_free(ProtobufCMessage *message) {
    if (message == NULL) return;
    struct block *block = block_of(message);
    if (atomic_fetch_sub(&block->holders, 1) == 1) block_destroy(block);
}

enum status rpc_buffer_unpack(ProtobufCMessage **message, const ProtobufCMessageDescriptor *type,
                              grpc_byte_buffer *buffer, size_t unpacked_max, struct error *err) {
    *message = NULL;
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer)) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "a %s cannot be decompressed", type->name);
    }
    enum status status;
    size_t length = grpc_byte_buffer_length(buffer);
    grpc_slice *whole = NULL;
    if (length > 0 && grpc_byte_buffer_reader_peek(&reader, &whole) &&
        GRPC_SLICE_LENGTH(*whole) == length) {
        status = rpc_message_unpack(message, type, GRPC_SLICE_START_PTR(*whole), length,
                                    unpacked_max, err);
    } else {
        grpc_byte_buffer_reader_destroy(&reader);
        CHECK(grpc_byte_buffer_reader_init(&reader, buffer));
        grpc_slice joined = grpc_byte_buffer_reader_readall(&reader);
        status = rpc_message_unpack(message, type, GRPC_SLICE_START_PTR(joined),
                                    GRPC_SLICE_LENGTH(joined), unpacked_max, err);
        grpc_slice_unref(joined);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    return status;
}

grpc_byte_buffer *rpc_buffer_pack(const ProtobufCMessage *message, size_t n_bytes) {
    grpc_slice slice = grpc_slice_malloc(n_bytes);
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

/* ---- metadata -------------------------------------------------------------------------------- */

static char *put_slice(char *out, grpc_slice slice) {
    memcpy(out, GRPC_SLICE_START_PTR(slice), GRPC_SLICE_LENGTH(slice));
    out += GRPC_SLICE_LENGTH(slice);
    *out = '\0';
    return out + 1;
}

char *rpc_metadata_copy(const grpc_metadata_array *metadata) {
    size_t bytes = 1;
    for (size_t i = 0; i < metadata->count; i++) {
        bytes += GRPC_SLICE_LENGTH(metadata->metadata[i].key) +
                 GRPC_SLICE_LENGTH(metadata->metadata[i].value) + 2;
    }
    char *block = xmalloc(bytes), *out = block;
    for (size_t i = 0; i < metadata->count; i++) {
        out = put_slice(out, metadata->metadata[i].key);
        out = put_slice(out, metadata->metadata[i].value);
    }
    *out = '\0';
    return block;
}

bool rpc_metadata_find(const char *block, const char *key, char *value, size_t size) {
    for (const char *at = block; at != NULL && *at != '\0';) {
        const char *found = at + strlen(at) + 1;
        if (strcmp(at, key) == 0) {
            size_t length = strnlen(found, size - 1);
            memcpy(value, found, length);
            value[length] = '\0';
            return true;
        }
        at = found + strlen(found) + 1;
    }
    return false;
}

/* ---- time and arguments ---------------------------------------------------------------------- */

gpr_timespec rpc_deadline_to_core(int64_t deadline_ns) {
    if (deadline_ns == 0) return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    int64_t left = deadline_ns - clock_now_ns();
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_nanos(left, GPR_TIMESPAN));
}

int64_t rpc_deadline_from_core(gpr_timespec deadline) {
    if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0) return 0;
    gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
    const int64_t year = 365LL * 24 * 3600;
    if (left.tv_sec > 100 * year) return 0;
    return clock_now_ns() + left.tv_sec * 1000000000LL + left.tv_nsec;
}

grpc_arg rpc_arg_int(const char *key, int value) {
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)key, .value.integer = value};
}

/* ---- loop ------------------------------------------------------------------------------------ */

void rpc_loop_init(struct rpc_loop *loop) {
    *loop = (struct rpc_loop){.queue = grpc_completion_queue_create_for_next(NULL),
                              .empty_queue = grpc_completion_queue_create_for_next(NULL),
                              .events_left = RPC_LOOP_EVENTS};
}

enum rpc_loop_event rpc_loop_step(struct rpc_loop *loop, gpr_timespec deadline) {
    if (--loop->events_left == 0) {
        loop->events_left = RPC_LOOP_EVENTS;
        grpc_completion_queue_next(loop->empty_queue, gpr_inf_past(GPR_CLOCK_MONOTONIC), NULL);
    }
    grpc_event event = grpc_completion_queue_next(loop->queue, deadline, NULL);
    if (event.type == GRPC_QUEUE_SHUTDOWN) return RPC_LOOP_SHUT_DOWN;
    if (event.type == GRPC_QUEUE_TIMEOUT) return RPC_LOOP_TIMEOUT;
    RPC_TAKE_OVER(event.tag);
    struct rpc_op *op = event.tag;
    op->done(op, event.success != 0);
    return RPC_LOOP_WORKED;
}

void rpc_loop_destroy(struct rpc_loop *loop) {
    grpc_completion_queue_destroy(loop->queue);
    grpc_completion_queue_shutdown(loop->empty_queue);
    gpr_timespec never = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    CHECK(grpc_completion_queue_next(loop->empty_queue, never, NULL).type == GRPC_QUEUE_SHUTDOWN);
    grpc_completion_queue_destroy(loop->empty_queue);
}
