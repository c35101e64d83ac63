/* A drafter on other ranks, as the target's leader sees it: start sends the order and returns,
 * collect receives what was drafted meanwhile. */
#pragma once
#include "worker/comm/comm.h"
#include "worker/draft/drafter.h"

/* pair: rank 0 is the target's leader (this rank), rank 1 the draft's. Borrowed. vocab: entries of
 * a distribution. Measures the line: *handoff_ns is what a message takes one way. */
enum status remote_drafter_create(struct drafter **out, struct comm *pair, int vocab,
                                  int64_t *handoff_ns, struct error *err);
