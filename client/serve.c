#include "client/serve.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/serve_options.h"
#include "common/clock.h"
#include "common/device_name.h"
#include "common/log.h"

#define SECOND_NS INT64_C(1000000000)
#define STOP_GRACE_NS (10 * SECOND_NS)
#define BACKOFF_MAX_NS (30 * SECOND_NS)
#define STEADY_NS (60 * SECOND_NS)  /* a replica that served this long forgives earlier deaths */

struct supervisor {
    const struct options *options;
    char bin[4096];             /* folder of the sibling programs */
    char scratch[64];           /* a folder of our own for ports and ready files */
    char ports[96], ready[96];  /* inside it */
    pid_t coordinator, replica; /* 0: not running */
    sigset_t signals;           /* SIGINT, SIGTERM, SIGCHLD: blocked, taken with sigtimedwait */
    int grpc_port, http_port;
    int n_ranks;                /* of a replica, as the coordinator says */
    bool one_process;           /* ranks are threads of one worker, not processes of mpirun */
    bool serving;               /* the replica has been ready since it was last started */
    bool ever_served;
    int64_t serving_since_ns;
    unsigned deaths;            /* in a row */
    struct arguments arguments; /* of the child that is started next */
};

/* ---- children -------------------------------------------------------------------------------- */

/* In the child: a process group of its own (Ctrl-C reaches only the supervisor, which ends things
 * in order), death with the parent, ordinary signals. */
static _Noreturn void become(struct supervisor *s, pid_t parent) {
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1);   /* it died before prctl */
    sigprocmask(SIG_UNBLOCK, &s->signals, NULL);
    arguments_exec(&s->arguments);
    fprintf(stderr, "tandem serve: cannot run %s: %s\n", s->arguments.words[0], strerror(errno));
    _exit(127);
}

static enum status spawn(struct supervisor *s, pid_t *child, struct error *err) {
    pid_t parent = getpid();
    *child = fork();
    if (*child < 0) {
        *child = 0;
        return error_set(err, STATUS_UNAVAILABLE, "cannot start %s: %s", s->arguments.words[0],
                         strerror(errno));
    }
    if (*child == 0) become(s, parent);
    return STATUS_OK;
}

static enum status start_coordinator(struct supervisor *s, struct error *err) {
    struct arguments *a = &s->arguments;
    a->n = 0;
    arguments_add(a, "%s/tandem-coordinator", s->bin);
    serve_options_add(a, s->options);
    arguments_add(a, "--ports-file");
    arguments_add(a, "%s", s->ports);
    arguments_add(a, "--ready-file");
    arguments_add(a, "%s", s->ready);
    return spawn(s, &s->coordinator, err);
}

static int usable_cpus(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

/* Whether the worker lists a CUDA device here. */
static bool has_cuda(struct supervisor *s) {
    int ends[2];
    char text[4096] = "\n";
    struct arguments *a = &s->arguments;
    if (pipe(ends) != 0) return false;
    a->n = 0;
    arguments_add(a, "%s/tandem-worker", s->bin);
    arguments_add(a, "--list-devices");
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        arguments_exec(a);
        _exit(127);
    }
    close(ends[1]);
    size_t n = 1;
    for (ssize_t got = 1; child > 0 && got > 0 && n < sizeof text - 1; n += got > 0 ? (size_t)got : 0) {
        got = read(ends[0], text + n, sizeof text - 1 - n);
    }
    close(ends[0]);
    if (child > 0) waitpid(child, NULL, 0);
    return strstr(text, "\ncuda:") != NULL;
}

/* Ranks that compute on devices are threads of one process: on one device their kernels overlap, and several
 * write into each other's memory. */
static bool is_one_process(struct supervisor *s) {
    const char *device = options_text(s->options, "device");
    bool names_isa = strcmp(options_text(s->options, "isa"), "auto") != 0; /* and so the CPU */
    if (strcmp(device, "auto") == 0) return !names_isa && has_cuda(s);
    return strncmp(device, "cuda", 4) == 0 || strcmp(device, "emulated") == 0;
}

/* Ranks are not bound to cores: a second server on the same machine would be bound to the same
 * ones, and a rank with several threads would have one core for all of them. */
static void add_mpirun(struct supervisor *s) {
    struct arguments *a = &s->arguments;
    arguments_add(a, "mpirun");
    arguments_add(a, "-n");
    arguments_add(a, "%d", s->n_ranks);
    arguments_add(a, "--bind-to");
    arguments_add(a, "none");
    arguments_add(a, "%s", s->n_ranks > usable_cpus() ? "--oversubscribe" : "--use-hwthread-cpus");
    if (geteuid() == 0) arguments_add(a, "--allow-run-as-root");
    arguments_add(a, "%s/tandem-worker", s->bin);
}

static enum status start_replica(struct supervisor *s, struct error *err) {
    struct arguments *a = &s->arguments;
    const char *host = options_text(s->options, "host");
    if (strcmp(host, "0.0.0.0") == 0) host = "127.0.0.1";
    if (strcmp(host, "::") == 0 || strcmp(host, "[::]") == 0) host = "[::1]";
    a->n = 0;
    if (s->one_process) {
        arguments_add(a, "%s/tandem-worker", s->bin);
        arguments_add(a, "--local-ranks");
        arguments_add(a, "%d", s->n_ranks);
    } else {
        add_mpirun(s);
    }
    arguments_add(a, "--device");
    arguments_add(a, "%s", options_text(s->options, "device"));
    arguments_add(a, "--coordinator");
    arguments_add(a, "%s:%d", host, s->grpc_port);
    arguments_add(a, "--isa");
    arguments_add(a, "%s", options_text(s->options, "isa"));
    arguments_add(a, "--threads");
    arguments_add(a, "%" PRIu64, options_count(s->options, "threads"));
    arguments_add(a, "--log-level");
    arguments_add(a, "%s", options_text(s->options, "log-level"));
    if (options_given(s->options, "trace")) {
        arguments_add(a, "--trace");
        arguments_add(a, "%s", options_text(s->options, "trace"));
    }
    s->serving = false;
    unlink(s->ready);
    return spawn(s, &s->replica, err);
}

/* Takes the ends of children; *exit_text says how the last of ours ended. */
static void reap(struct supervisor *s, char *exit_text, size_t size) {
    int state;
    for (pid_t pid; (pid = waitpid(-1, &state, WNOHANG)) > 0;) {
        if (pid == s->coordinator) s->coordinator = 0;
        else if (pid == s->replica) s->replica = 0;
        else continue;
        if (WIFSIGNALED(state)) {
            snprintf(exit_text, size, "was killed by signal %d (%s)", WTERMSIG(state),
                     strsignal(WTERMSIG(state)));
        } else {
            snprintf(exit_text, size, "ended with exit status %d", WEXITSTATUS(state));
        }
    }
}

/* Waits for the coordinator and the replica to be gone, until `until_ns`. */
static bool wait_gone(struct supervisor *s, int64_t until_ns) {
    char ignored[96];
    while (clock_now_ns() < until_ns) {
        reap(s, ignored, sizeof ignored);
        if (s->coordinator == 0 && s->replica == 0) return true;
        sigtimedwait(&s->signals, NULL, &(struct timespec){0, 50000000});
    }
    return false;
}

/* The coordinator tells the replica to stop; what does not obey is ended. */
static void stop_all(struct supervisor *s) {
    if (s->coordinator != 0) kill(s->coordinator, SIGTERM);
    else if (s->replica != 0) kill(s->replica, SIGTERM);
    if (wait_gone(s, clock_now_ns() + STOP_GRACE_NS)) return;
    if (s->replica != 0) kill(s->replica, SIGTERM);
    if (wait_gone(s, clock_now_ns() + STOP_GRACE_NS / 2)) return;
    log_warn("children did not stop in time and are killed");
    if (s->replica != 0) kill(-s->replica, SIGKILL);
    if (s->coordinator != 0) kill(-s->coordinator, SIGKILL);
    wait_gone(s, clock_now_ns() + STOP_GRACE_NS);
}

/* ---- waiting for events ---------------------------------------------------------------------- */

/* Waits at most `timeout_ns`; true: somebody wants us to end. */
static bool wait_signal(struct supervisor *s, int64_t timeout_ns) {
    struct timespec timeout = {timeout_ns / SECOND_NS, timeout_ns % SECOND_NS};
    int number = sigtimedwait(&s->signals, NULL, &timeout);
    return number == SIGINT || number == SIGTERM;
}

static enum status read_ports(struct supervisor *s, struct error *err) {
    json_error_t problem;
    json_t *ports = json_load_file(s->ports, 0, &problem);
    if (ports == NULL) {
        return error_set(err, STATUS_INTERNAL, "%s: %s", s->ports, problem.text);
    }
    s->grpc_port = (int)json_integer_value(json_object_get(ports, "grpc_port"));
    s->http_port = (int)json_integer_value(json_object_get(ports, "http_port"));
    s->n_ranks = (int)json_integer_value(json_object_get(ports, "ranks"));
    json_decref(ports);
    return STATUS_OK;
}

/* CANCELLED: asked to end before the coordinator listened. */
static enum status wait_for_ports(struct supervisor *s, struct error *err) {
    char how[96] = "";
    while (access(s->ports, R_OK) != 0) {
        if (wait_signal(s, 20000000)) return error_set(err, STATUS_CANCELLED, "stopped");
        reap(s, how, sizeof how);
        if (s->coordinator == 0) {
            return error_set(err, STATUS_UNAVAILABLE,
                             "tandem-coordinator %s before it listened; the reason stands above",
                             how);
        }
    }
    return read_ports(s, err);
}

/* The file that the user asked for appears by a rename, so nobody reads half of it. */
static enum status write_ready_file(const struct supervisor *s, struct error *err) {
    const char *path = options_text(s->options, "ready-file");
    if (path == NULL) return STATUS_OK;
    char temporary[4096];
    snprintf(temporary, sizeof temporary, "%s.%d", path, (int)getpid());
    FILE *file = fopen(temporary, "w");
    if (file == NULL) {
        return error_set(err, STATUS_UNAVAILABLE, "--ready-file %s: %s", path, strerror(errno));
    }
    fprintf(file, "{\"grpc_port\": %d, \"http_port\": %d, \"pid\": %d}\n", s->grpc_port,
            s->http_port, (int)getpid());
    if (fclose(file) != 0 || rename(temporary, path) != 0) {
        unlink(temporary);
        return error_set(err, STATUS_UNAVAILABLE, "--ready-file %s: %s", path, strerror(errno));
    }
    return STATUS_OK;
}

/* The coordinator writes the ready file once; after a restart, the replica's return shows in its
 * health, and here in the replica staying alive. */
static enum status note_ready(struct supervisor *s, struct error *err) {
    if (s->serving || access(s->ready, R_OK) != 0) return STATUS_OK;
    s->serving = true;
    s->serving_since_ns = clock_now_ns();
    if (s->ever_served) return STATUS_OK;
    s->ever_served = true;
    TRY(write_ready_file(s, err));
    const char *host = options_text(s->options, "host");
    printf("Serving %s: gRPC on %s:%d, metrics on http://%s:%d/metrics. Ctrl-C stops.\n",
           options_text(s->options, "model"), host, s->grpc_port, host, s->http_port);
    fflush(stdout);
    return STATUS_OK;
}

/* The replica has died: waits a while and starts it again, or gives up. */
static enum status revive(struct supervisor *s, const char *how, struct error *err) {
    if (!s->ever_served) {
        return error_set(err, STATUS_UNAVAILABLE,
                         "the replica %s before it served; the reason stands above", how);
    }
    if (clock_now_ns() - s->serving_since_ns > STEADY_NS) s->deaths = 0;
    if (++s->deaths > options_count(s->options, "restarts")) {
        return error_set(err, STATUS_UNAVAILABLE, "the replica %s; given up after %u deaths in a "
                         "row (--restarts)", how, s->deaths);
    }
    int64_t pause_ns = SECOND_NS / 2 << (s->deaths < 8 ? s->deaths - 1 : 7);
    if (pause_ns > BACKOFF_MAX_NS) pause_ns = BACKOFF_MAX_NS;
    log_warn("the replica %s; starting it again in %.1f s (death %u of %" PRIu64 ")", how,
             (double)pause_ns / SECOND_NS, s->deaths, options_count(s->options, "restarts"));
    int64_t until_ns = clock_now_ns() + pause_ns;
    for (int64_t now_ns; (now_ns = clock_now_ns()) < until_ns;) {
        if (wait_signal(s, until_ns - now_ns)) return error_set(err, STATUS_CANCELLED, "stopped");
    }
    s->serving_since_ns = clock_now_ns();
    return start_replica(s, err);
}

/* Returns CANCELLED when a signal asked for the end. */
static enum status supervise(struct supervisor *s, struct error *err) {
    TRY(start_coordinator(s, err));
    TRY(wait_for_ports(s, err));
    TRY(start_replica(s, err));
    for (;;) {
        char how[96] = "";
        if (wait_signal(s, s->ever_served ? SECOND_NS : SECOND_NS / 50)) {
            return error_set(err, STATUS_CANCELLED, "stopped");
        }
        reap(s, how, sizeof how);
        if (s->coordinator == 0) {
            return error_set(err, STATUS_UNAVAILABLE, "tandem-coordinator %s", how);
        }
        TRY(note_ready(s, err));
        if (s->replica == 0) TRY(revive(s, how, err));
    }
}

/* ---- start and end --------------------------------------------------------------------------- */

static enum status prepare(struct supervisor *s, struct error *err) {
    TRY(serve_options_folder(s->bin, sizeof s->bin, err));
    const char *ready = options_text(s->options, "ready-file");
    if (ready != NULL && unlink(ready) != 0 && errno != ENOENT) {
        return error_set(err, STATUS_UNAVAILABLE, "--ready-file %s: %s", ready, strerror(errno));
    }
    snprintf(s->scratch, sizeof s->scratch, "/tmp/tandem-serve-XXXXXX");
    if (mkdtemp(s->scratch) == NULL) {
        return error_set(err, STATUS_UNAVAILABLE, "cannot make a folder in /tmp: %s",
                         strerror(errno));
    }
    snprintf(s->ports, sizeof s->ports, "%s/ports.json", s->scratch);
    snprintf(s->ready, sizeof s->ready, "%s/ready.json", s->scratch);
    sigemptyset(&s->signals);
    sigaddset(&s->signals, SIGINT);
    sigaddset(&s->signals, SIGTERM);
    sigaddset(&s->signals, SIGCHLD);
    sigprocmask(SIG_BLOCK, &s->signals, NULL);
    s->one_process = is_one_process(s);
    return STATUS_OK;
}

static void clean_up(struct supervisor *s) {
    stop_all(s);
    unlink(s->ports);
    unlink(s->ready);
    if (s->scratch[0] != '\0') rmdir(s->scratch);
    const char *ready = options_text(s->options, "ready-file");
    if (ready != NULL && s->ever_served) unlink(ready);
}

int client_serve(int argc, char **argv) {
    struct options *options;
    struct error err;
    if (options_parse(&options, serve_option_rows, n_serve_option_rows, argc, argv, &err) !=
        STATUS_OK) {
        fprintf(stderr, "tandem serve: %s; try tandem serve --help\n", err.text);
        return 2;
    }
    if (options_flag(options, "help")) {
        puts("Usage: tandem serve --model DIR [options]\n\n"
             "Serves a model in the foreground: starts the coordinator and a replica of ranks.");
        options_help(stdout, serve_option_rows, n_serve_option_rows);
        options_free(options);
        return 0;
    }
    int result = 2;
    if (serve_options_check(options, &err) == STATUS_OK) {
        log_open("serve", (enum log_level)log_level_parse(options_text(options, "log-level")));
        struct supervisor *s = xcalloc(1, sizeof *s);
        s->options = options;
        enum status status = prepare(s, &err);
        if (status == STATUS_OK) status = supervise(s, &err);
        clean_up(s);
        free(s);
        result = status == STATUS_CANCELLED ? 0 : 1;
    }
    if (result != 0) fprintf(stderr, "tandem serve: %s\n", err.text);
    options_free(options);
    return result;
}
