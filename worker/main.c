/* tandem-worker: one rank of a replica, started by mpirun, or several as threads. */
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/device_name.h"
#include "common/log.h"
#include "worker/device.h"
#include "worker/replica.h"

static const char usage[] =
    "usage: mpirun -n RANKS tandem-worker --coordinator HOST:PORT [options]\n"
    "\n"
    "One rank of a replica. Ranks come up without a role: they tell the coordinator what they have\n"
    "and are given model, role and shard by its plan.\n"
    "\n"
    "  --coordinator HOST:PORT  where tandem-coordinator listens (required)\n"
    "  --replica-id NAME        names this replica                            (r0)\n"
    "  --device NAME            auto, cpu, cuda (of several, the one that the rank's number on its\n"
    "                           host counts off), cuda:K, or emulated         (auto)\n"
    "  --isa NAME               of the CPU: auto, amx, avx512, avx2, portable (auto)\n"
    "  --threads N              compute threads of each rank, 1..256          (1)\n"
    "  --local-ranks N          N ranks as threads of this process, without mpirun, 1..16: devices of\n"
    "                           one process exchange faster\n"
    "  --patience SECONDS       how long to wait for the coordinator          (60)\n"
    "  --trace FILE             what each rank did when, for chrome://tracing or Perfetto;\n"
    "                           written when the replica is stopped\n"
    "  --log-level LEVEL        debug, info, warn or error                    (info)\n"
    "  --list-devices           prints what --device can name here, and ends\n"
    "  --help, --version\n";

enum { MAX_LOCAL_RANKS = 16 };

struct arguments {
    struct replica_options replica;
    int log_level;
    int local_ranks; /* 0: ranks are processes of mpirun */
};

static enum status parse(struct arguments *out, int argc, char **argv, struct error *err) {
    static const struct option options[] = {
        {"coordinator", required_argument, NULL, 'c'}, {"replica-id", required_argument, NULL, 'r'},
        {"isa", required_argument, NULL, 'i'},         {"threads", required_argument, NULL, 't'},
        {"patience", required_argument, NULL, 'p'},    {"log-level", required_argument, NULL, 'l'},
        {"trace", required_argument, NULL, 'f'},       {"device", required_argument, NULL, 'd'},
        {"local-ranks", required_argument, NULL, 'n'}, {"list-devices", no_argument, NULL, 'L'},
        {"help", no_argument, NULL, 'h'},              {"version", no_argument, NULL, 'v'},
        {NULL, 0, NULL, 0}};
    *out = (struct arguments){
        .replica = {.id = "r0",
                    .device = "auto",
                    .isa = BACKEND_AUTO,
                    .n_threads = 1,
                    .make_group = comm_mpi_group,
                    .patience_ns = 60LL * 1000000000},
        .log_level = LOG_INFO,
    };
    int isa;
    opterr = 0;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 'c': out->replica.coordinator = optarg; break;
        case 'r': out->replica.id = optarg; break;
        case 'i':
            isa = backend_isa_parse(optarg);
            if (isa < 0 || isa >= BACKEND_CUDA) {
                return error_set(err, STATUS_INVALID_ARGUMENT, "--isa is \"%s\", expected auto, amx, "
                                 "avx512, avx2 or portable", optarg);
            }
            out->replica.isa = (enum backend_isa)isa;
            break;
        case 'd':
            out->replica.device = optarg;
            TRY(device_name_check(optarg, err));
            break;
        case 'n':
            out->local_ranks = atoi(optarg);
            out->replica.make_group = comm_threads_group;
            if (out->local_ranks < 1 || out->local_ranks > MAX_LOCAL_RANKS) {
                return error_set(err, STATUS_INVALID_ARGUMENT,
                                 "--local-ranks is \"%s\", expected 1..%d", optarg, MAX_LOCAL_RANKS);
            }
            break;
        case 't':
            out->replica.n_threads = atoi(optarg);
            if (out->replica.n_threads < 1 || out->replica.n_threads > 256) {
                return error_set(err, STATUS_INVALID_ARGUMENT, "--threads is \"%s\", expected 1..256",
                                 optarg);
            }
            break;
        case 'p':
            out->replica.patience_ns = atoll(optarg) * 1000000000;
            if (out->replica.patience_ns <= 0) {
                return error_set(err, STATUS_INVALID_ARGUMENT, "--patience is \"%s\", expected a "
                                 "number of seconds above 0", optarg);
            }
            break;
        case 'f': out->replica.trace_file = optarg; break;
        case 'l':
            out->log_level = log_level_parse(optarg);
            if (out->log_level < 0) {
                return error_set(err, STATUS_INVALID_ARGUMENT, "--log-level is \"%s\", expected "
                                 "debug, info, warn or error", optarg);
            }
            break;
        case 'L': device_list(stdout); exit(0);
        case 'h': fputs(usage, stdout); exit(0);
        case 'v': puts("tandem-worker " TANDEM_VERSION); exit(0);
        default:
            return error_set(err, STATUS_INVALID_ARGUMENT, "unknown option or missing value: %s",
                             argv[optind - 1]);
        }
    }
    if (optind < argc) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "unexpected argument: %s", argv[optind]);
    }
    if (out->replica.coordinator == NULL) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "--coordinator HOST:PORT is required");
    }
    return STATUS_OK;
}

/* --- ranks as processes ----------------------------------------------------------------------- */

static int run_under_mpi(const struct arguments *arguments, int argc, char **argv) {
    struct error err;
    struct comm *world = NULL;
    if (comm_mpi_init(&argc, &argv, &err) != STATUS_OK ||
        comm_mpi_world(&world, &err) != STATUS_OK) {
        fprintf(stderr, "tandem-worker: %s\n", err.text);
        return 1;
    }
    char name[64];
    snprintf(name, sizeof name, "worker.%s.%d", arguments->replica.id, comm_rank(world));
    log_open(name, (enum log_level)arguments->log_level);

    enum status status = replica_run(&arguments->replica, world, &err);
    if (status != STATUS_OK) {
        /* A rank whose group is broken cannot leave MPI in order: the job ends here, with why. */
        log_error("%s", err.text);
        comm_mpi_kill_job(1);
    }
    comm_destroy(world);
    comm_mpi_finalize();
    return 0;
}

/* --- ranks as threads ------------------------------------------------------------------------- */

struct local_rank {
    const struct arguments *arguments;
    struct comm *world;
    pthread_t thread;
};

/* A failure on one rank ends all, as it does under mpirun. */
static void *run_local_rank(void *arg) {
    struct local_rank *rank = arg;
    struct error err;
    if (replica_run(&rank->arguments->replica, rank->world, &err) != STATUS_OK) {
        log_error("rank %d: %s", comm_rank(rank->world), err.text);
        _exit(1);
    }
    return NULL;
}

static int run_local(const struct arguments *arguments) {
    struct error err;
    struct comm *worlds[MAX_LOCAL_RANKS];
    struct local_rank ranks[MAX_LOCAL_RANKS];
    int n = arguments->local_ranks;
    char name[64];
    snprintf(name, sizeof name, "worker.%s", arguments->replica.id);
    log_open(name, (enum log_level)arguments->log_level);
    if (comm_threads_create(worlds, n, &err) != STATUS_OK) {
        fprintf(stderr, "tandem-worker: %s\n", err.text);
        return 1;
    }
    for (int i = 0; i < n; i++) {
        ranks[i] = (struct local_rank){.arguments = arguments, .world = worlds[i]};
        CHECK(pthread_create(&ranks[i].thread, NULL, run_local_rank, &ranks[i]) == 0);
    }
    for (int i = 0; i < n; i++) pthread_join(ranks[i].thread, NULL);
    for (int i = 0; i < n; i++) comm_destroy(worlds[i]);
    return 0;
}

int main(int argc, char **argv) {
    struct error err;
    struct arguments arguments;
    if (parse(&arguments, argc, argv, &err) != STATUS_OK) {
        fprintf(stderr, "tandem-worker: %s\n\n%s", err.text, usage);
        return 2;
    }
    if (arguments.local_ranks > 0) return run_local(&arguments);
    return run_under_mpi(&arguments, argc, argv);
}
