/* The links between a replica's ranks, measured at start (comm/comm_links.h) and put as the leader
 * tells them to the coordinator. */
#pragma once
#include "tandem/v1/replica.pb-c.h"
#include "kernels/backend.h"
#include "worker/comm/comm.h"

struct hello_links {
    Tandem__V1__Links message; /* at rank 0, of 2 ranks or more; else without entries */
};

/* The devices that ranks compute on, as struct comm_tensors_options has them. */
struct hello_devices {
    struct comm *group; /* of the same ranks as `world`, for this test alone: it may end in it */
    enum backend_isa isa;
    int device;
    bool shares_device, one_process;
};

/* Collective over `world`, a group of host memory; takes a tenth of a second, longer only where one
 * message to each rank does, or devices are slow to begin. devices: NULL where tensors travel over `world`
 * itself; else a group of the devices is made for the time of the test, and `world` is measured beside it;
 * when that fails, nothing is told and a warning says why. Fails as `world` does. hello_links_free even
 * then. */
enum status hello_links_measure(struct hello_links *out, struct comm *world,
                                const struct hello_devices *devices, struct error *err);
void hello_links_free(struct hello_links *links);
