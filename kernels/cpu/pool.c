/* Compute threads of one backend. Between two products they spin for some microseconds, since the
 * next product usually follows at once; then they sleep until woken. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "common/relax.h"
#include "kernels/cpu/cpu.h"

/* Spinning lasts a few microseconds: a thread that was put on this same processor cannot run
 * meanwhile. Yielding, which goes on for about a millisecond, sees the end of a round nearly as soon. */
enum { SPIN_TURNS = 100, AWAKE_TURNS = 3000 };

struct job {
    void (*task)(void *arg, int task_i);
    void *arg;
    int n_tasks;
};

struct pool {
    int n_threads; /* the caller included */
    int n_helpers; /* started */
    pthread_t *helpers;
    struct pool_helper *seats;
    struct job job;
    _Atomic uint32_t round;   /* raised for every job */
    _Atomic int n_working;    /* helpers not done with the current job */
    _Atomic bool stop;
    pthread_mutex_t mutex;    /* guards sleeping only */
    pthread_cond_t wake;
    _Atomic int n_asleep;
    int spin_turns, awake_turns; /* 0 where threads outnumber processors */
};

struct pool_helper {
    struct pool *pool;
    int index;
};

/* Thread i of n takes a fixed stretch of the tasks: no queue, no contention. */
static void run_share(const struct job *job, int index, int n_threads) {
    int begin = (int)((int64_t)job->n_tasks * index / n_threads);
    int end = (int)((int64_t)job->n_tasks * (index + 1) / n_threads);
    for (int i = begin; i < end; i++) job->task(job->arg, i);
}

static void wait_turn(const struct pool *pool, int turn) {
    if (turn < pool->spin_turns) cpu_relax();
    else sched_yield();
}

static void await_round(struct pool *pool, uint32_t seen) {
    for (int turn = 0; turn < pool->awake_turns; turn++) {
        if (atomic_load_explicit(&pool->round, memory_order_acquire) != seen) return;
        wait_turn(pool, turn);
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->n_asleep, 1);
    while (atomic_load(&pool->round) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->n_asleep, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *helper_main(void *arg) {
    struct pool_helper *helper = arg;
    struct pool *pool = helper->pool;
    uint32_t seen = 0;
    for (;;) {
        await_round(pool, seen);
        seen++;
        if (atomic_load_explicit(&pool->stop, memory_order_acquire)) return NULL;
        run_share(&pool->job, helper->index, pool->n_threads);
        atomic_fetch_sub_explicit(&pool->n_working, 1, memory_order_release);
    }
}

static void start_round(struct pool *pool) {
    atomic_fetch_add(&pool->round, 1);
    if (atomic_load(&pool->n_asleep) == 0) return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

void pool_run(struct backend *backend, void (*task)(void *arg, int task_i), void *arg,
              int n_tasks) {
    struct pool *pool = backend->pool;
    if (pool == NULL || n_tasks < 2) {
        for (int i = 0; i < n_tasks; i++) task(arg, i);
        return;
    }
    pool->job = (struct job){task, arg, n_tasks};
    atomic_store(&pool->n_working, pool->n_threads - 1);
    start_round(pool);
    run_share(&pool->job, 0, pool->n_threads);
    int turn = 0;
    while (atomic_load_explicit(&pool->n_working, memory_order_acquire) > 0) {
        wait_turn(pool, turn++);
    }
}

enum status pool_create(struct pool **out, int n_threads, struct error *err) {
    struct pool *pool = xcalloc(1, sizeof *pool);
    pool->n_threads = n_threads;
    pool->helpers = xcalloc((size_t)n_threads, sizeof *pool->helpers);
    pool->seats = xcalloc((size_t)n_threads, sizeof *pool->seats);
    bool roomy = n_threads <= sysconf(_SC_NPROCESSORS_ONLN);
    pool->spin_turns = roomy ? SPIN_TURNS : 0;
    pool->awake_turns = roomy ? AWAKE_TURNS : 0;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (int i = 1; i < n_threads; i++) {
        pool->seats[i] = (struct pool_helper){pool, i};
        if (pthread_create(&pool->helpers[i], NULL, helper_main, &pool->seats[i]) != 0) {
            pool_destroy(pool);
            return error_set(err, STATUS_RESOURCE_EXHAUSTED, "cannot start compute thread %d of %d",
                             i + 1, n_threads);
        }
        pool->n_helpers = i;
    }
    *out = pool;
    return STATUS_OK;
}

void pool_destroy(struct pool *pool) {
    if (pool == NULL) return;
    atomic_store(&pool->stop, true);
    start_round(pool);
    for (int i = 1; i <= pool->n_helpers; i++) pthread_join(pool->helpers[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    free(pool->helpers);
    free(pool->seats);
    free(pool);
}
