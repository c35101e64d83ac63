/* grpc.health.v1.Health: Check, Watch and List over a small table of service names.
 *
 * Threads: any. The owner sets states; the server's queue threads answer and push to watchers. The
 * name "" stands for the server as a whole. */
#pragma once
#include "proto/rpc.h"

#define HEALTH_SERVICES_MAX 16
#define HEALTH_NAME_MAX 80          /* bytes of a service name, NUL included */
#define HEALTH_WATCHERS_MAX 256     /* further Watch calls get RESOURCE_EXHAUSTED */

struct health;

struct health *health_create(void);

/* After the server that serves it has been stopped. NULL is fine. */
void health_destroy(struct health *health);

/* Sets (or adds) a service's state and tells its watchers if that changed. At most
 * HEALTH_SERVICES_MAX names, each shorter than HEALTH_NAME_MAX (checked). */
void health_set(struct health *health, const char *service, bool serving);

/* For rpc_server_create; valid as long as `health`. */
struct rpc_service health_service(struct health *health);
