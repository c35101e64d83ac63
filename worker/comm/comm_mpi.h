/* For tests: a group that talks over MPI although its members stand on one host. */
#pragma once
#include "worker/comm/comm.h"

enum status comm_mpi_world_networked(struct comm **out, struct error *err);
