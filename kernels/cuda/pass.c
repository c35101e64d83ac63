/* What a pass is told, on its way to the device; and passes as graphs.
 *
 * A graph is recorded for the shape of a pass: rows and logit rows rounded up (padding rows compute
 * what nobody reads), pieces of context rounded up to a power of two. Everything else is read from the
 * pass's device memory, so that one graph serves all passes of its shape. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"

/* Room for the blocks of 64 sequences of 128 k tokens. Getting more would wait for the whole device, and in
 * the middle of a pass: other ranks' kernels there may be waiting for this rank's (gather.cu). */
enum { ROUND = 8, FIRST_TABLES = 64 * (128 << 10) / BACKEND_KV_BLOCK };

static size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

/* Tokens, logit rows, places, then block tables. */
static size_t fixed_bytes(const struct backend *backend) {
    size_t rows = round_up((size_t)backend->options.max_rows, ROUND);
    return rows * (2 * sizeof(int32_t) + sizeof(struct row_place));
}

void cuda_drop_graphs(struct backend *backend) {
    for (int i = 0; i < backend->n_graphs; i++) cudaGraphExecDestroy(backend->graphs[i].exec);
    backend->n_graphs = 0;
}

static void release(struct cuda_pass *pass) {
    for (int i = 0; i < CUDA_PASS_SLOTS; i++) {
        cudaFreeHost(pass->host[i]);
        pass->host[i] = NULL;
    }
    cudaFree(pass->device);
    pass->device = NULL;
}

static enum status take(struct backend *backend, size_t bytes, struct error *err) {
    struct cuda_pass *pass = &backend->pass;
    for (int i = 0; i < CUDA_PASS_SLOTS; i++) {
        if (cudaHostAlloc((void **)&pass->host[i], bytes, cudaHostAllocDefault) != cudaSuccess) {
            return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no pinned memory for %zu bytes", bytes);
        }
    }
    TRY(cuda_take((void **)&pass->device, bytes, "the description of a pass", err));
    pass->max_bytes = bytes;
    size_t rows = round_up((size_t)backend->options.max_rows, ROUND);
    pass->tokens = (int32_t *)pass->device;
    pass->logit_rows = pass->tokens + rows;
    pass->places = (struct row_place *)(pass->logit_rows + rows);
    pass->tables = (int32_t *)(pass->places + rows);
    return STATUS_OK;
}

enum status cuda_pass_create(struct backend *backend, struct error *err) {
    for (int i = 0; i < CUDA_PASS_SLOTS; i++) {
        cudaEventCreateWithFlags(&backend->pass.sent[i], cudaEventDisableTiming);
    }
    return take(backend, fixed_bytes(backend) + FIRST_TABLES * sizeof(int32_t), err);
}

void cuda_pass_destroy(struct backend *backend) {
    cuda_drop_graphs(backend);
    release(&backend->pass);
    for (int i = 0; i < CUDA_PASS_SLOTS; i++) {
        if (backend->pass.sent[i] != NULL) cudaEventDestroy(backend->pass.sent[i]);
    }
}

/* Longer block tables than ever before: graphs hold the old addresses. */
static void grow(struct backend *backend, size_t bytes) {
    struct error err;
    cuda_let_go(backend);
    release(&backend->pass);
    CHECK(take(backend, 2 * bytes, &err) == STATUS_OK);
}

static int n_blocks_of(const struct backend_segment *segment) {
    return (segment->position + segment->n_rows - 1) / BACKEND_KV_BLOCK + 1;
}

static void describe_segment(struct row_place *places, int32_t *tables, int at,
                             const struct backend_segment *segment) {
    memcpy(tables + at, segment->blocks, (size_t)n_blocks_of(segment) * sizeof *tables);
    for (int i = 0; i < segment->n_rows; i++) {
        places[segment->row + i] = (struct row_place){segment->position + i, segment->row,
                                                       segment->row + segment->n_rows, at};
    }
}

static size_t describe(struct backend *backend, char *out, const struct backend_pass *pass) {
    size_t rows = round_up((size_t)backend->options.max_rows, ROUND);
    int32_t *tokens = (int32_t *)out, *logit_rows = tokens + rows;
    struct row_place *places = (struct row_place *)(logit_rows + rows);
    int32_t *tables = (int32_t *)(places + rows);
    int n_padded = (int)round_up((size_t)pass->n_rows, ROUND);
    for (int i = 0; i < n_padded; i++) {
        tokens[i] = pass->tokens != NULL && i < pass->n_rows ? pass->tokens[i] : 0;
        places[i] = (struct row_place){-1, i, i + 1, 0};
    }
    int n_logits = (int)round_up((size_t)pass->n_logit_rows, ROUND);
    for (int i = 0; i < n_logits; i++) {
        logit_rows[i] = i < pass->n_logit_rows ? pass->logit_rows[i] : 0;
    }
    int at = 0;
    for (int i = 0; i < pass->n_segments; i++) {
        describe_segment(places, tables, at, &pass->segments[i]);
        at += n_blocks_of(&pass->segments[i]);
    }
    return (size_t)((char *)(tables + at) - out);
}

void cuda_pass_begin(struct backend *backend, const struct backend_pass *in) {
    struct cuda_pass *pass = &backend->pass;
    CHECK(in->n_rows <= backend->options.max_rows && in->n_logit_rows <= backend->options.max_rows);
    size_t n_blocks = 0;
    pass->max_pieces = 1;
    for (int i = 0; i < in->n_segments; i++) {
        int own = n_blocks_of(&in->segments[i]);
        int pieces = (own * BACKEND_KV_BLOCK - 1) / PIECE + 1;
        n_blocks += (size_t)own;
        if (pieces > pass->max_pieces) pass->max_pieces = pieces;
    }
    size_t bytes = fixed_bytes(backend) + n_blocks * sizeof(int32_t);
    if (bytes > pass->max_bytes) grow(backend, bytes);
    pass->n_rows = in->n_rows;
    pass->n_logit_rows = in->n_logit_rows;
    pass->n_segments = in->n_segments;
    backend->n_passes++;
    backend->packed_of = NULL;

    unsigned slot = pass->n_sent++ % CUDA_PASS_SLOTS;
    if (pass->n_sent > CUDA_PASS_SLOTS) cudaEventSynchronize(pass->sent[slot]);
    size_t used = describe(backend, pass->host[slot], in);
    cuda_went_well(backend,
                   cudaMemcpyAsync(pass->device, pass->host[slot], used, cudaMemcpyHostToDevice,
                                   backend->stream),
                   "sending a pass");
    cudaEventRecord(pass->sent[slot], backend->stream);
}

int cuda_padded_rows(const struct backend *backend, int n_rows) {
    (void)backend;
    return n_rows > CUDA_GRAPH_ROWS ? n_rows : (int)round_up((size_t)n_rows, ROUND);
}

int cuda_pass_rows(const struct backend *backend) {
    int n_rows = backend->pass.n_rows;
    return backend->recording ? cuda_padded_rows(backend, n_rows) : n_rows;
}

static int next_power(int n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

int cuda_pass_slots(const struct backend *backend, int n_heads, int padded) {
    int n_rows = cuda_pass_rows(backend), slots = next_power(backend->pass.max_pieces);
    if (slots == 1 || n_rows > CUDA_GRAPH_ROWS) return 0;
    size_t floats = (size_t)n_rows * (size_t)n_heads * (size_t)slots * (size_t)(padded + 2);
    return floats <= backend->attention_floats ? slots : 0;
}

/* --- graphs ----------------------------------------------------------------------------------- */

static uint64_t shape_key(const struct backend *backend, uint64_t key) {
    const struct cuda_pass *pass = &backend->pass;
    uint64_t rows = (uint64_t)cuda_padded_rows(backend, pass->n_rows) / ROUND;
    uint64_t logit_rows = (uint64_t)cuda_padded_rows(backend, pass->n_logit_rows) / ROUND;
    uint64_t shape = (rows << 8 | logit_rows) << 16 | (uint64_t)next_power(pass->max_pieces);
    return (key ^ shape << 20) * 0x9e3779b97f4a7c15u ^ shape;
}

static bool records(const struct backend *backend) {
    return backend->pass.n_rows <= CUDA_GRAPH_ROWS && backend->pass.n_logit_rows <= CUDA_GRAPH_ROWS;
}

bool cuda_replay(struct backend *backend, uint64_t key) {
    if (!records(backend)) return false;
    uint64_t wanted = shape_key(backend, key);
    for (int i = 0; i < backend->n_graphs; i++) {
        struct cuda_graph *graph = &backend->graphs[i];
        if (graph->key != wanted) continue;
        graph->used = backend->n_passes;
        cuda_went_well(backend, cudaGraphLaunch(graph->exec, backend->stream), "starting a graph");
        return true;
    }
    return false;
}

void cuda_record_begin(struct backend *backend, uint64_t key) {
    if (!records(backend)) return;
    backend->record_key = shape_key(backend, key);
    backend->recording = cuda_went_well(
        backend, cudaStreamBeginCapture(backend->stream, cudaStreamCaptureModeThreadLocal),
        "recording a pass");
}

/* A place for one more graph: the one that rested longest goes. */
static struct cuda_graph *free_graph(struct backend *backend) {
    if (backend->n_graphs < CUDA_MAX_GRAPHS) return &backend->graphs[backend->n_graphs++];
    struct cuda_graph *oldest = &backend->graphs[0];
    for (int i = 1; i < backend->n_graphs; i++) {
        if (backend->graphs[i].used < oldest->used) oldest = &backend->graphs[i];
    }
    cudaStreamSynchronize(backend->stream);
    cudaGraphExecDestroy(oldest->exec);
    return oldest;
}

void cuda_record_end(struct backend *backend) {
    if (!backend->recording) return;
    backend->recording = false;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    if (!cuda_went_well(backend, cudaStreamEndCapture(backend->stream, &graph), "recording a pass")) {
        return;
    }
    if (cuda_went_well(backend, cudaGraphInstantiate(&exec, graph, 0), "preparing a graph")) {
        *free_graph(backend) = (struct cuda_graph){backend->record_key, exec, backend->n_passes};
        cuda_went_well(backend, cudaGraphLaunch(exec, backend->stream), "starting a graph");
    }
    cudaGraphDestroy(graph);
}
