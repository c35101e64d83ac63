/* What the module tandem-nccl.so shows: one symbol. Private to worker/comm/; both sides are
 * compiled from one source, which version and sizes check. */
#pragma once
#include "worker/comm/comm_internal.h"
#include "worker/comm/comm_nccl.h"

#define COMM_DEVICE_SYMBOL "tandem_comm_device"
enum { COMM_DEVICE_VERSION = 1 };

struct comm_device_module {
    int version;
    size_t comm_bytes, ops_bytes, options_bytes, error_bytes;
    enum status (*create)(struct comm **out, struct comm *bootstrap, void *stream,
                          const struct comm_nccl_options *options, struct error *err);
};

extern const struct comm_device_module tandem_comm_device;
