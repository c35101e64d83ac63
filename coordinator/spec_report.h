/* What speculation did for one request: from the replica's word to the client's last chunk. Pure.
 *
 * Place: the coordinator's thread; generate.c takes it from the step that finishes the request. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"
#include "common/spec_mode.h"
#include "tandem/v1/generation.pb-c.h"
#include "tandem/v1/replica.pb-c.h"

struct spec_report {
    enum spec_mode mode;                     /* of most of its rounds */
    uint32_t drafts;                         /* rounds that judged drafted tokens */
    uint32_t drafted_tokens, accepted_tokens; /* judged; of these, held */
    uint32_t histogram[SPEC_MAX_WINDOW + 1]; /* [i]: rounds that accepted i tokens */
};

/* INTERNAL when the numbers contradict each other: more accepted than drafted, a histogram that counts
 * other rounds or tokens, a mode that does not exist. An empty mode is plain. */
enum status spec_report_take(struct spec_report *out, const Tandem__V1__SpecReport *said,
                             struct error *err);

/* The client's view; its histogram ends with the last entry that is not 0 and is borrowed from
 * `report`. Rates of a request that judged nothing are 0. */
void spec_report_describe(const struct spec_report *report, Tandem__V1__SpeculationReport *out);
