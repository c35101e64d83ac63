/* One rank of a group of processes: `mpiexec -n N mpi_case CASE`, run as tests by CMakeLists.txt.
 * Rank 0 ends with "N passed, N failed"; the exit status is 0 when nothing failed on any rank. */
#include <mpi.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "tests/reference/comm_checks.h"
#include "worker/comm/comm.h"
#include "worker/comm/comm_mpi.h"

struct tally {
    int passed, failed; /* on this rank */
};

static void note(struct tally *tally, const char *what, const char *wrong) {
    if (wrong == NULL) {
        tally->passed++;
        return;
    }
    int rank;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    printf("rank %d: %s: %s\n", rank, what, wrong);
    fflush(stdout);
    tally->failed++;
}

static struct comm *made(enum status status, struct comm *comm, const struct error *err) {
    if (status == STATUS_OK) return comm;
    printf("no group: %s\n", err->text);
    comm_mpi_kill_job(1);
}

static struct comm *world(bool networked) {
    struct comm *comm = NULL;
    struct error err = {0};
    enum status status = networked ? comm_mpi_world_networked(&comm, &err)
                                   : comm_mpi_world(&comm, &err);
    return made(status, comm, &err);
}

static const char *ranks_agree(const struct comm *comm) {
    int rank, size;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    return comm_rank(comm) == rank && comm_size(comm) == size ? NULL : "another rank or size";
}

static void collectives(struct tally *tally, bool networked) {
    struct comm *comm = world(networked);
    int n_rounds = 600 / comm_size(comm);
    note(tally, "rank and size", ranks_agree(comm));
    note(tally, "sizes", comm_checks_sizes(comm));
    for (uint64_t seed = 1; seed <= 3; seed++) {
        char what[40];
        snprintf(what, sizeof what, "mixed operations, seed %d", (int)seed);
        note(tally, what, comm_checks_mixed(comm, seed, n_rounds));
    }
    comm_destroy(comm);
}

/* The odd ranks and the even ones, both groups at work at once, beside the world's. */
static void subgroups(struct tally *tally) {
    struct comm *all = world(false), *part = NULL;
    int members[COMM_CHECKS_MAX_RANKS], n_members = 0, place = 0;
    for (int i = comm_rank(all) % 2; i < comm_size(all); i += 2) {
        if (i == comm_rank(all)) place = n_members;
        members[n_members++] = i;
    }
    struct error err = {0};
    enum status status = comm_mpi_group(&part, all, members, n_members, &err);
    part = made(status, part, &err);
    bool right = comm_rank(part) == place && comm_size(part) == n_members;
    note(tally, "members", right ? NULL : "another rank or size");
    uint64_t seed = 20 + (uint64_t)(comm_rank(all) % 2);
    note(tally, "mixed operations of a part", comm_checks_mixed(part, seed, 200 / n_members));
    note(tally, "mixed operations of all", comm_checks_mixed(all, 30, 50));
    note(tally, "again of a part", comm_checks_mixed(part, seed + 2, 100 / n_members));
    comm_destroy(part);
    comm_destroy(all);
}

/* The last rank ends the group while the others wait, asleep: all see it, with the reason. */
static void aborted(struct tally *tally) {
    struct comm *comm = world(false);
    struct error err = {0};
    char byte = 0;
    if (comm_rank(comm) == comm_size(comm) - 1) {
        clock_sleep_ns(300 * 1000 * 1000);
        comm_abort(comm, "the test wants it");
    }
    enum status status = comm_broadcast(comm, &byte, 1, comm_size(comm) - 1, &err);
    bool right = status == STATUS_ABORTED && strstr(err.text, "the test wants it") != NULL;
    note(tally, "broadcast", right ? NULL : "not ABORTED");
    right = comm_barrier(comm, &err) == STATUS_ABORTED;
    note(tally, "barrier", right ? NULL : "not ABORTED");
    comm_destroy(comm);
}

/* One rank dies without a word while the others wait for it. Nobody gets past this: that the whole
 * job ends, and soon, is seen from outside (killed.cmake). */
static void killed(bool networked) {
    struct comm *comm = world(networked);
    struct error err = {0};
    char byte = 0;
    comm_barrier(comm, &err);
    if (comm_rank(comm) == comm_size(comm) - 1) {
        clock_sleep_ns(200 * 1000 * 1000);
        kill(getpid(), SIGKILL);
    }
    enum status status = comm_broadcast(comm, &byte, 1, comm_size(comm) - 1, &err);
    printf("rank %d: %s\n", comm_rank(comm), err.text);
    fflush(stdout);
    comm_mpi_kill_job(status == STATUS_OK ? 3 : 2);
}

static int report(const struct tally *tally) {
    int mine[2] = {tally->passed, tally->failed}, all[2], rank;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Allreduce(mine, all, 2, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    if (rank == 0) printf("%d passed, %d failed\n", all[0], all[1]);
    return all[1] > 0 || all[0] == 0;
}

int main(int argc, char **argv) {
    struct error err;
    if (comm_mpi_init(&argc, &argv, &err) != STATUS_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 2;
    }
    const char *name = argc == 2 ? argv[1] : "";
    struct tally tally = {0};
    if (strcmp(name, "shared") == 0) collectives(&tally, false);
    else if (strcmp(name, "networked") == 0) collectives(&tally, true);
    else if (strcmp(name, "subgroups") == 0) subgroups(&tally);
    else if (strcmp(name, "aborted") == 0) aborted(&tally);
    else if (strcmp(name, "killed") == 0) killed(false);
    else if (strcmp(name, "killed_networked") == 0) killed(true);
    else note(&tally, "case", "expected shared, networked, subgroups, aborted, killed[_networked]");
    int failed = report(&tally);
    comm_mpi_finalize();
    return failed;
}
