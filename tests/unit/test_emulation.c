/* The emulated device finds what it is there to find: each planted bug shows in at least one scheduling
 * order, and the same kernel without it in none. */
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/dtype.h"
#include "kernels/emulation/order.h"
#include "tests/reference/random.h"
#include "tests/unit/test.h"

void planted_reversed(float *out, bool with_barrier);
void planted_rounds(float *out, bool with_barrier);
void planted_copies(float *out, const float *in, bool with_wait);
void planted_diverged(float *out);
void planted_unreached(float *out);
void planted_overrun(float *out, int past);
void planted_fragments(float *c, const uint16_t *a, const uint16_t *b);

enum { N = 256 };

static float ramp[N];

static void reversed(float *out, bool right) {
    planted_reversed(out, right);
}

static void rounds(float *out, bool right) {
    planted_rounds(out, right);
}

static void copies(float *out, bool right) {
    planted_copies(out, ramp, right);
}

/* In how many orders the kernel is wrong anywhere. */
static int wrong_orders(void (*kernel)(float *out, bool right), bool right,
                        float (*expected)(int i)) {
    int n = 0;
    for (int order = 0; order < EMULATION_ORDERS; order++) {
        float out[N];
        bool wrong = false;
        emulation_set_order(order, 5);
        kernel(out, right);
        for (int i = 0; i < N; i++) wrong = wrong || out[i] != expected(i);
        n += wrong;
    }
    return n;
}

static float mirror(int i) {
    return (float)(N - 1 - i);
}

static float mirrored_rounds(int i) {
    return (float)(4 * (N - 1 - i) + 6 * N);
}

static float same(int i) {
    return (float)i;
}

Test(emulation, a_missing_barrier_is_seen) {
    cr_assert_eq(wrong_orders(reversed, true, mirror), 0);
    cr_assert(wrong_orders(reversed, false, mirror) > 0);
}

/* Only when one warp runs ahead of the others. */
Test(emulation, a_missing_barrier_at_a_loops_end_is_seen) {
    cr_assert_eq(wrong_orders(rounds, true, mirrored_rounds), 0);
    cr_assert(wrong_orders(rounds, false, mirrored_rounds) > 0);
}

Test(emulation, a_copy_that_nobody_waits_for_is_seen) {
    for (int i = 0; i < N; i++) ramp[i] = (float)i;
    cr_assert_eq(wrong_orders(copies, true, same), 0);
    cr_assert(wrong_orders(copies, false, same) >= 3, "in all orders where copies land late");
}

/* The emulator ends the program where a device would hang; true: it did. */
static bool ends_program(void (*kernel)(float *out)) {
    float out[N];
    pid_t child = fork();
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        if (freopen("/dev/null", "w", stderr) == NULL) _exit(3);
        alarm(60);
        kernel(out);
        _exit(0);
    }
    int state;
    cr_assert_eq(waitpid(child, &state, 0), child);
    return WIFSIGNALED(state) && WTERMSIG(state) == SIGABRT;
}

Test(emulation, a_diverged_warp_is_named) {
    cr_assert(ends_program(planted_diverged));
}

Test(emulation, a_barrier_that_not_all_reach_is_named) {
    cr_assert(ends_program(planted_unreached));
}

#if defined(__SANITIZE_ADDRESS__)
static void overrun(float *out) {
    planted_overrun(out, 1);
}

/* ASan ends the program with an exit status of its own. */
Test(emulation, shared_memory_has_an_end) {
    float out[N];
    planted_overrun(out, 0);
    pid_t child = fork();
    if (child == 0) {
        if (freopen("/dev/null", "w", stderr) == NULL) _exit(0);
        overrun(out);
        _exit(0);
    }
    int state;
    cr_assert_eq(waitpid(child, &state, 0), child);
    cr_assert(!WIFEXITED(state) || WEXITSTATUS(state) != 0);
}
#endif

Test(emulation, fragments_lie_as_the_manual_says) {
    struct test_random random = {3};
    uint16_t a[256], b[128];
    float c[128];
    for (int i = 0; i < 256; i++) a[i] = bf16_from_f32((float)random_below(&random, 15) - 7);
    for (int i = 0; i < 128; i++) b[i] = bf16_from_f32((float)random_below(&random, 15) - 7);
    planted_fragments(c, a, b);
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 8; column++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) {
                sum += bf16_to_f32(a[row * 16 + k]) * bf16_to_f32(b[k * 8 + column]);
            }
            cr_assert(c[row * 8 + column] == sum, "row %d column %d", row, column);
        }
    }
}
