/* The links between a replica's ranks, measured at start (comm/comm_links.h) and put as the leader
 * tells them to the coordinator. */
#pragma once
#include "tandem/v1/replica.pb-c.h"
#include "worker/comm/comm.h"

struct hello_links {
    Tandem__V1__Links message; /* at rank 0, of 2 ranks or more; else without entries */
};

/* Collective over `world`, a group of host memory; takes a tenth of a second, longer only where one
 * message to each rank does. Fails as the group does. hello_links_free even then. */
enum status hello_links_measure(struct hello_links *out, struct comm *world, struct error *err);
void hello_links_free(struct hello_links *links);
