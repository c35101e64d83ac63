/* The way to communicators of devices: they live in a module of their own (tandem-nccl.so), opened
 * when a replica has devices, so that no program needs NCCL or CUDA to start. Any thread. */
#pragma once
#include "worker/comm/comm.h"
#include "worker/comm/comm_nccl.h"

struct comm_device_module;

/* Opens the module: the file `path`, or where that is NULL, tandem-nccl.so beside the program (or
 * in ../bin or ../lib/tandem of it). It stays open until the process ends. UNAVAILABLE, in one
 * sentence, when it is missing, cannot be loaded, or is of another build. */
enum status comm_device_open(const struct comm_device_module **out, const char *path,
                             struct error *err);

/* comm_nccl_create of an opened module: the same arguments, statuses and promises. */
enum status comm_device_create(struct comm **out, const struct comm_device_module *module,
                               struct comm *bootstrap, void *stream,
                               const struct comm_nccl_options *options, struct error *err);
