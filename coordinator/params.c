#include "coordinator/params.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "common/spec_mode.h"
#include "coordinator/stream.h"

enum {
    MAX_STOP_BYTES = 256,
    MAX_STOP_TOKENS = 64,
    MAX_BIASES = 1024,
    MAX_LOGPROBS = 20,
    MAX_ID_BYTES = 128,
};

/* Written so that NaN fails. */
static enum status check_float(const char *field, float value, float low, bool low_open, float high,
                               struct error *err) {
    bool fits = (low_open ? value > low : value >= low) && value <= high;
    if (fits) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT, "%s is %g; expected %s%g, %g]", field,
                     (double)value, low_open ? "(" : "[", (double)low, (double)high);
}

static enum status too_many(const char *field, size_t n, size_t max, struct error *err) {
    return error_set(err, STATUS_INVALID_ARGUMENT, "%s has %zu entries; expected at most %zu", field,
                     n, max);
}

static enum status check_token(const char *field, size_t i, int32_t id, int32_t vocab,
                               struct error *err) {
    if (id >= 0 && id < vocab) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "%s[%zu] is token id %" PRId32 "; expected 0 to %" PRId32, field, i, id,
                     vocab - 1);
}

static enum status resolve_floats(struct params *out, const Tandem__V1__SamplingParams *in,
                                  struct error *err) {
    if (in->temperature__case) out->temperature = in->temperature;
    if (in->top_p__case) out->top_p = in->top_p;
    if (in->min_p__case) out->min_p = in->min_p;
    if (in->repetition_penalty__case) out->repetition_penalty = in->repetition_penalty;
    if (in->presence_penalty__case) out->presence_penalty = in->presence_penalty;
    if (in->frequency_penalty__case) out->frequency_penalty = in->frequency_penalty;
    TRY(check_float("temperature", out->temperature, 0, false, 100, err));
    TRY(check_float("top_p", out->top_p, 0, true, 1, err));
    TRY(check_float("min_p", out->min_p, 0, false, 1, err));
    TRY(check_float("repetition_penalty", out->repetition_penalty, 0, true, 10, err));
    TRY(check_float("presence_penalty", out->presence_penalty, -2, false, 2, err));
    return check_float("frequency_penalty", out->frequency_penalty, -2, false, 2, err);
}

static enum status resolve_counts(struct params *out, const Tandem__V1__SamplingParams *in,
                                  struct error *err) {
    if (in->top_k__case) out->top_k = in->top_k;
    if (out->top_k < -1) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "top_k is %" PRId32 "; expected at least 1, or 0 or -1 for off", out->top_k);
    }
    if (out->top_k == -1) out->top_k = 0;
    if (in->max_tokens__case) {
        out->max_tokens = in->max_tokens;
        if (out->max_tokens == 0) {
            return error_set(err, STATUS_INVALID_ARGUMENT, "max_tokens is 0; expected at least 1");
        }
    }
    if (in->min_tokens__case) out->min_tokens = in->min_tokens;
    if (out->max_tokens != 0 && out->min_tokens > out->max_tokens) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "min_tokens is %" PRIu32 "; expected 0 to max_tokens, which is %" PRIu32,
                         out->min_tokens, out->max_tokens);
    }
    if (in->logprobs__case) {
        out->logprobs = in->logprobs;
        if (out->logprobs < 0 || out->logprobs > MAX_LOGPROBS) {
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "logprobs is %" PRId32 "; expected 0 to %d", out->logprobs,
                             MAX_LOGPROBS);
        }
    }
    if (in->n__case && in->n != 1) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "n is %" PRIu32 "; expected 1: send one request for each continuation",
                         in->n);
    }
    return STATUS_OK;
}

static enum status resolve_stops(struct params *out, const Tandem__V1__SamplingParams *in,
                                 int32_t vocab, struct error *err) {
    if (in->n_stop > STREAM_MAX_STOPS) return too_many("stop", in->n_stop, STREAM_MAX_STOPS, err);
    for (size_t i = 0; i < in->n_stop; i++) {
        if (in->stop[i].len >= 1 && in->stop[i].len <= MAX_STOP_BYTES) continue;
        return error_set(err, STATUS_INVALID_ARGUMENT, "stop[%zu] has %zu bytes; expected 1 to %d",
                         i, in->stop[i].len, MAX_STOP_BYTES);
    }
    if (in->n_stop_token_ids > MAX_STOP_TOKENS) {
        return too_many("stop_token_ids", in->n_stop_token_ids, MAX_STOP_TOKENS, err);
    }
    for (size_t i = 0; i < in->n_stop_token_ids; i++) {
        TRY(check_token("stop_token_ids", i, in->stop_token_ids[i], vocab, err));
    }
    out->stops = in->stop;
    out->n_stops = in->n_stop;
    out->stop_token_ids = in->stop_token_ids;
    out->n_stop_token_ids = in->n_stop_token_ids;
    out->include_stop = in->include_stop_str_in_output;
    return STATUS_OK;
}

static enum status resolve_biases(struct params *out, const Tandem__V1__SamplingParams *in,
                                  int32_t vocab, struct error *err) {
    if (in->n_logit_bias > MAX_BIASES) return too_many("logit_bias", in->n_logit_bias, MAX_BIASES, err);
    for (size_t i = 0; i < in->n_logit_bias; i++) {
        const Tandem__V1__LogitBias *bias = in->logit_bias[i];
        TRY(check_token("logit_bias", i, bias->token_id, vocab, err));
        TRY(check_float("logit_bias's bias", bias->bias, -100, false, 100, err));
        for (size_t j = 0; j < i; j++) {
            if (in->logit_bias[j]->token_id != bias->token_id) continue;
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "logit_bias names token id %" PRId32 " twice; expected once",
                             bias->token_id);
        }
    }
    out->biases = in->logit_bias;
    out->n_biases = in->n_logit_bias;
    return STATUS_OK;
}

/* The names of the modes in the mask, ", "-separated. */
static void list_modes(char *out, size_t size, uint32_t modes) {
    size_t n = 0;
    out[0] = '\0';
    for (int mode = 0; mode < SPEC_N_MODES && n < size; mode++) {
        if ((modes >> mode & 1) == 0) continue;
        n += (size_t)snprintf(out + n, size - n, ", %s", spec_mode_name((enum spec_mode)mode));
    }
}

static enum status resolve_speculation(struct params *out,
                                       const Tandem__V1__GenerateRequest *request, uint32_t modes,
                                       struct error *err) {
    const char *asked = request->speculation;
    int mode = strcmp(asked, "off") == 0 ? SPEC_PLAIN : spec_mode_parse(asked);
    bool automatic = asked[0] == '\0' || strcmp(asked, "auto") == 0;
    if (!automatic && (mode < 0 || (modes >> mode & 1) == 0)) {
        char names[100];
        list_modes(names, sizeof names, modes);
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "speculation is \"%.64s\"; expected one that this server can run: "
                         "auto, off%s", asked, names);
    }
    if (request->num_speculative_tokens > SPEC_MAX_WINDOW) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "num_speculative_tokens is %" PRIu32 "; expected 1 to %d, or 0 for the "
                         "server's choice", request->num_speculative_tokens, SPEC_MAX_WINDOW);
    }
    out->speculation = automatic ? "" : spec_mode_name((enum spec_mode)mode);
    out->num_speculative_tokens = request->num_speculative_tokens;
    return STATUS_OK;
}

static enum status check_id(const char *id, struct error *err) {
    size_t n = strlen(id);
    bool printable = true;
    for (size_t i = 0; i < n; i++) printable &= id[i] > ' ' && id[i] <= '~';
    if (n <= MAX_ID_BYTES && printable) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "request_id has %zu bytes%s; expected at most %d, printable ASCII without spaces",
                     n, printable ? "" : ", not all of them printable ASCII", MAX_ID_BYTES);
}

enum status params_resolve(struct params *out, const Tandem__V1__GenerateRequest *request,
                           int32_t vocab, uint32_t modes, struct error *err) {
    static const Tandem__V1__SamplingParams defaults = TANDEM__V1__SAMPLING_PARAMS__INIT;
    const Tandem__V1__SamplingParams *in = request->sampling ? request->sampling : &defaults;
    *out = (struct params){.temperature = 1, .top_p = 1, .repetition_penalty = 1, .logprobs = -1};
    TRY(check_id(request->request_id, err));
    TRY(resolve_floats(out, in, err));
    TRY(resolve_counts(out, in, err));
    TRY(resolve_stops(out, in, vocab, err));
    TRY(resolve_biases(out, in, vocab, err));
    TRY(resolve_speculation(out, request, modes, err));
    out->ignore_eos = in->ignore_eos;
    out->skip_special = !in->skip_special_tokens_off;
    out->has_seed = in->seed__case != 0;
    out->seed = out->has_seed ? in->seed : 0;
    return STATUS_OK;
}

enum status params_check_tokens(const int32_t *ids, size_t n_ids, int32_t vocab, struct error *err) {
    for (size_t i = 0; i < n_ids; i++) TRY(check_token("tokens", i, ids[i], vocab, err));
    return STATUS_OK;
}

enum status params_fit_context(struct params *params, size_t n_prompt, uint32_t context,
                               struct error *err) {
    if (n_prompt == 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "the prompt has 0 tokens; expected at least 1");
    }
    if (n_prompt >= context) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "the prompt has %zu tokens; expected at most %" PRIu32
                         ": the context holds %" PRIu32 " tokens and one must be left to generate",
                         n_prompt, context - 1, context);
    }
    uint32_t room = context - (uint32_t)n_prompt;
    if (params->min_tokens > room) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "min_tokens is %" PRIu32 "; expected 0 to %" PRIu32
                         ", what a context of %" PRIu32 " tokens holds after a prompt of %zu",
                         params->min_tokens, room, context, n_prompt);
    }
    if (params->max_tokens == 0 || params->max_tokens > room) params->max_tokens = room;
    return STATUS_OK;
}
