#include "coordinator/spec_report.h"

#include <string.h>

#include "tests/unit/test.h"

/* Rounds that accepted 0, 1 and 3 tokens: 2, 1 and 4 of them. */
static uint32_t histogram[SPEC_MAX_WINDOW + 2] = {2, 1, 0, 4};

static Tandem__V1__SpecReport said(void) {
    Tandem__V1__SpecReport report = TANDEM__V1__SPEC_REPORT__INIT;
    report.mode = "pearl";
    report.drafts = 7;
    report.drafted_tokens = 20;
    report.accepted_tokens = 13;
    report.histogram = histogram;
    report.n_histogram = SPEC_MAX_WINDOW + 1;
    return report;
}

static void refused(const Tandem__V1__SpecReport *message, const char *words) {
    struct spec_report report;
    struct error err;
    cr_assert_eq(spec_report_take(&report, message, &err), STATUS_INTERNAL);
    cr_assert(strstr(err.text, words) != NULL, "%s", err.text);
}

Test(spec_report, rates_follow_from_the_counts) {
    Tandem__V1__SpecReport message = said();
    Tandem__V1__SpeculationReport out = TANDEM__V1__SPECULATION_REPORT__INIT;
    struct spec_report report;
    struct error err;
    cr_assert_eq(spec_report_take(&report, &message, &err), STATUS_OK, "%s", err.text);
    spec_report_describe(&report, &out);
    cr_assert_str_eq(out.mode, "pearl");
    cr_assert(out.mean_acceptance_length == 1 + 13.0 / 7);
    cr_assert(out.draft_acceptance_rate == 13.0 / 20);
    cr_assert_eq(out.num_spec_steps, 7);
    cr_assert_eq(out.num_draft_tokens, 20);
    cr_assert_eq(out.num_accepted_tokens, 13);
    cr_assert_eq(out.n_acceptance_histogram, 4);
    cr_assert_arr_eq(out.acceptance_histogram, histogram, 4 * sizeof *histogram);
}

Test(spec_report, a_request_that_did_not_speculate_is_plain_with_zeros) {
    Tandem__V1__SpecReport message = TANDEM__V1__SPEC_REPORT__INIT;
    Tandem__V1__SpeculationReport out = TANDEM__V1__SPECULATION_REPORT__INIT;
    struct spec_report report = {.mode = SPEC_SD, .drafts = 1};
    struct error err;
    cr_assert_eq(spec_report_take(&report, &message, &err), STATUS_OK, "%s", err.text);
    spec_report_describe(&report, &out);
    cr_assert_str_eq(out.mode, "plain");
    cr_assert(out.mean_acceptance_length == 0 && out.draft_acceptance_rate == 0);
    cr_assert_eq(out.num_spec_steps + out.num_draft_tokens + out.num_accepted_tokens, 0);
    cr_assert_eq(out.n_acceptance_histogram, 0);
}

Test(spec_report, contradictions_are_refused) {
    Tandem__V1__SpecReport message = said();
    message.mode = "warp";
    refused(&message, "mode \"warp\"");
    message = said();
    message.drafted_tokens = 12;
    refused(&message, "13 tokens accepted of 12 drafted");
    message = said();
    message.drafts = 8;
    refused(&message, "counts 7 rounds and 13 accepted tokens, the report 8 and 13");
    message = said();
    message.accepted_tokens = 14;
    refused(&message, "the report 7 and 14");
    message = said();
    message.n_histogram = SPEC_MAX_WINDOW + 2;
    refused(&message, "18 entries; expected at most 17");
    /* Sums that wrap around 32 bits are not the counts. */
    uint32_t wrapping[] = {UINT32_MAX, 8};
    message = said();
    message.histogram = wrapping;
    message.n_histogram = 2;
    message.accepted_tokens = 8;
    refused(&message, "histogram counts");
}
