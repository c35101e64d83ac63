#include "worker/engine.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/spec_mode.h"
#include "worker/trace.h"

/* A step on the wire, in this order: header, segments, tokens, logit rows, block tables. The first
 * ENGINE_FIRST_BYTES travel in one broadcast of fixed size, which is all a small step needs. */
enum { ENGINE_FIRST_BYTES = 2048 };

struct step_header {
    int32_t n_rows; /* 0: stop */
    int32_t model;  /* enum engine_model */
    int32_t layer_width;
    uint32_t round; /* for the trace */
    int32_t n_segments;
    int32_t n_logit_rows;
    int32_t n_blocks;
    int64_t n_bytes; /* of the whole message */
};

struct step_segment {
    int32_t row, n_rows, position, n_blocks;
};

struct engine {
    struct engine_options options;
    char *message;
    size_t message_bytes;
    struct backend_segment *segments; /* follower: decoded */
    int64_t tell_ns;
};

static size_t message_capacity(const struct engine_options *options) {
    size_t bytes = sizeof(struct step_header) +
                   (size_t)options->max_segments * sizeof(struct step_segment) +
                   (size_t)(options->max_rows + options->max_logit_rows + options->max_blocks) *
                       sizeof(int32_t);
    return bytes < ENGINE_FIRST_BYTES ? ENGINE_FIRST_BYTES : bytes;
}

struct engine *engine_create(const struct engine_options *options) {
    struct engine *engine = xcalloc(1, sizeof *engine);
    engine->options = *options;
    engine->message_bytes = message_capacity(options);
    engine->message = xcalloc(1, engine->message_bytes);
    engine->segments = xcalloc((size_t)options->max_segments, sizeof *engine->segments);
    return engine;
}

void engine_destroy(struct engine *engine) {
    if (engine == NULL) return;
    free(engine->message);
    free(engine->segments);
    free(engine);
}

static int blocks_of(const struct backend_segment *segment) {
    int last = segment->position + segment->n_rows - 1;
    return last / BACKEND_KV_BLOCK + 1;
}

static char *put(char *out, const void *data, size_t bytes) {
    if (bytes > 0) memcpy(out, data, bytes);
    return out + bytes;
}

static void encode_step(struct engine *engine, enum engine_model model,
                        const struct transformer_batch *batch) {
    const struct engine_options *options = &engine->options;
    CHECK(batch->n_rows <= options->max_rows && batch->n_segments <= options->max_segments);
    CHECK(batch->n_logit_rows <= options->max_logit_rows);
    struct step_header header = {
        .n_rows = batch->n_rows,
        .model = model,
        .layer_width = batch->layer_width,
        .round = trace_round(options->trace),
        .n_segments = batch->n_segments,
        .n_logit_rows = batch->n_logit_rows,
    };
    char *out = engine->message + sizeof header;
    for (int i = 0; i < batch->n_segments; i++) {
        const struct backend_segment *segment = &batch->segments[i];
        struct step_segment told = {segment->row, segment->n_rows, segment->position,
                                    blocks_of(segment)};
        header.n_blocks += told.n_blocks;
        out = put(out, &told, sizeof told);
    }
    CHECK(header.n_blocks <= options->max_blocks);
    out = put(out, batch->tokens, (size_t)batch->n_rows * sizeof(int32_t));
    out = put(out, batch->logit_rows, (size_t)batch->n_logit_rows * sizeof(int32_t));
    for (int i = 0; i < batch->n_segments; i++) {
        const struct backend_segment *segment = &batch->segments[i];
        out = put(out, segment->blocks, (size_t)blocks_of(segment) * sizeof(int32_t));
    }
    header.n_bytes = out - engine->message;
    memcpy(engine->message, &header, sizeof header);
}

/* Both sides: the first part, then the rest where there is one. */
static enum status exchange(struct engine *engine, struct error *err) {
    TRY(comm_broadcast(engine->options.group, engine->message, ENGINE_FIRST_BYTES, 0, err));
    struct step_header header;
    memcpy(&header, engine->message, sizeof header);
    CHECK(header.n_bytes >= 0 && (size_t)header.n_bytes <= engine->message_bytes);
    if (header.n_bytes <= ENGINE_FIRST_BYTES) return STATUS_OK;
    return comm_broadcast(engine->options.group, engine->message + ENGINE_FIRST_BYTES,
                          (size_t)header.n_bytes - ENGINE_FIRST_BYTES, 0, err);
}

/* What the lane of a rank shows for a pass. */
static const char *name_of(enum engine_model model, const struct transformer_batch *batch) {
    /* Rows of rounds want logits but for those that a draft feeds to catch up. */
    bool prefills = batch->n_rows > batch->n_logit_rows + 2 * SPEC_MAX_WINDOW;
    if (model == ENGINE_TARGET) return prefills ? "prefill" : "verify";
    if (batch->layer_width > 1) return "fuzzy step";
    return prefills ? "draft prefill" : "draft step";
}

static enum status compute(struct engine *engine, enum engine_model model,
                           const struct transformer_batch *batch, float **logits,
                           struct error *err) {
    int64_t start = clock_now_ns();
    enum status status =
        transformer_forward(engine->options.transformers[model], batch, logits, err);
    trace_add(engine->options.trace, name_of(model, batch), start, clock_now_ns());
    return status;
}

enum status engine_forward(struct engine *engine, enum engine_model model,
                           const struct transformer_batch *batch, float **logits,
                           struct error *err) {
    if (comm_size(engine->options.group) > 1) {
        int64_t start = clock_now_ns();
        encode_step(engine, model, batch);
        TRY(exchange(engine, err));
        engine->tell_ns += clock_now_ns() - start;
    }
    return compute(engine, model, batch, logits, err);
}

enum status engine_stop(struct engine *engine, struct error *err) {
    if (comm_size(engine->options.group) == 1) return STATUS_OK;
    struct step_header header = {0};
    memcpy(engine->message, &header, sizeof header);
    return exchange(engine, err);
}

static struct transformer_batch decode_step(struct engine *engine,
                                            const struct step_header *header) {
    const struct step_segment *told =
        (const struct step_segment *)(engine->message + sizeof *header);
    const int32_t *tokens = (const int32_t *)(told + header->n_segments);
    const int32_t *logit_rows = tokens + header->n_rows;
    const int32_t *blocks = logit_rows + header->n_logit_rows;
    for (int i = 0; i < header->n_segments; i++) {
        engine->segments[i] = (struct backend_segment){told[i].row, told[i].n_rows,
                                                       told[i].position, blocks};
        blocks += told[i].n_blocks;
    }
    return (struct transformer_batch){
        .tokens = tokens,
        .n_rows = header->n_rows,
        .segments = engine->segments,
        .n_segments = header->n_segments,
        .logit_rows = logit_rows,
        .n_logit_rows = header->n_logit_rows,
        .layer_width = header->layer_width,
    };
}

enum status engine_follow(struct engine *engine, struct error *err) {
    for (;;) {
        TRY(exchange(engine, err));
        struct step_header header;
        memcpy(&header, engine->message, sizeof header);
        if (header.n_rows == 0) return STATUS_OK;
        if (engine->options.transformers[header.model] == NULL) continue;
        struct transformer_batch batch = decode_step(engine, &header);
        float *logits;
        trace_set_round(engine->options.trace, header.round);
        TRY(compute(engine, (enum engine_model)header.model, &batch, &logits, err));
    }
}

int64_t engine_tell_ns(const struct engine *engine) {
    return engine->tell_ns;
}
