/* grpc.reflection.v1 and v1alpha: tells clients (grpcurl, Postman) which services this binary
 * serves and what their messages look like, from a descriptor set embedded at build time.
 *
 * Stateless. Threads: any. Answered: list_services, file_by_filename, file_containing_symbol; other
 * questions get an error_response with UNIMPLEMENTED. */
#pragma once
#include "proto/rpc.h"

struct reflection;

/* `services`: the names to list, e.g. "tandem.v1.Generation" (borrowed, [n_services]). INTERNAL:
 * the embedded descriptor set lacks one of them. */
enum status reflection_create(struct reflection **reflection, const char *const *services,
                              size_t n_services, struct error *err);

/* After the server that serves it has been stopped. NULL is fine. */
void reflection_destroy(struct reflection *reflection);

/* Both versions in one table, for rpc_server_create; valid as long as `reflection`. */
struct rpc_service reflection_service(struct reflection *reflection);
