#include "coordinator/spec_report.h"

#include <inttypes.h>
#include <string.h>

static enum status check_histogram(const Tandem__V1__SpecReport *said, struct error *err) {
    uint64_t rounds = 0, tokens = 0;
    for (size_t i = 0; i < said->n_histogram; i++) {
        rounds += said->histogram[i];
        tokens += (uint64_t)i * said->histogram[i];
    }
    if (rounds == said->drafts && tokens == said->accepted_tokens) return STATUS_OK;
    return error_set(err, STATUS_INTERNAL,
                     "a report's histogram counts %" PRIu64 " rounds and %" PRIu64
                     " accepted tokens, the report %" PRIu32 " and %" PRIu32,
                     rounds, tokens, said->drafts, said->accepted_tokens);
}

enum status spec_report_take(struct spec_report *out, const Tandem__V1__SpecReport *said,
                             struct error *err) {
    int mode = said->mode[0] == '\0' ? SPEC_PLAIN : spec_mode_parse(said->mode);
    if (mode < 0) {
        return error_set(err, STATUS_INTERNAL, "a report names the mode \"%.64s\"", said->mode);
    }
    if (said->n_histogram > SPEC_MAX_WINDOW + 1) {
        return error_set(err, STATUS_INTERNAL,
                         "a report's histogram has %zu entries; expected at most %d",
                         said->n_histogram, SPEC_MAX_WINDOW + 1);
    }
    if (said->accepted_tokens > said->drafted_tokens) {
        return error_set(err, STATUS_INTERNAL,
                         "a report has %" PRIu32 " tokens accepted of %" PRIu32 " drafted",
                         said->accepted_tokens, said->drafted_tokens);
    }
    TRY(check_histogram(said, err));
    *out = (struct spec_report){(enum spec_mode)mode, said->drafts, said->drafted_tokens,
                                said->accepted_tokens, {0}};
    for (size_t i = 0; i < said->n_histogram; i++) out->histogram[i] = said->histogram[i];
    return STATUS_OK;
}

void spec_report_describe(const struct spec_report *report, Tandem__V1__SpeculationReport *out) {
    size_t n = SPEC_MAX_WINDOW + 1;
    while (n > 0 && report->histogram[n - 1] == 0) n--;
    out->mode = (char *)spec_mode_name(report->mode);
    out->num_spec_steps = report->drafts;
    out->num_draft_tokens = report->drafted_tokens;
    out->num_accepted_tokens = report->accepted_tokens;
    out->n_acceptance_histogram = n;
    out->acceptance_histogram = (uint32_t *)report->histogram;
    if (report->drafts > 0) {
        out->mean_acceptance_length = 1 + (double)report->accepted_tokens / report->drafts;
    }
    if (report->drafted_tokens > 0) {
        out->draft_acceptance_rate = (double)report->accepted_tokens / report->drafted_tokens;
    }
}
