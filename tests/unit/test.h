/* What every unit test includes. Criterion, except under ThreadSanitizer, where Criterion cannot start
 * (its shared arena wants a fixed address): there the same names run in one plain process.
 *
 * Not to be used: gt()/ge() (accept equality in Criterion 2.4.1), .timeout (ctest has it), pointers in
 * parameterised tests. */
#pragma once
#ifndef __SANITIZE_THREAD__

#include <criterion/criterion.h>

#else

#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct plain_test {
    const char *suite, *name;
    void (*run)(void);
    struct plain_test *next;
};
static struct plain_test *plain_tests;
/* Where a failed assertion (1) or a skip (2) goes, from any depth of the main thread. */
static jmp_buf plain_end;

#define Test(suite_, name_, ...)                                                                   \
    static void suite_##_##name_(void);                                                            \
    __attribute__((constructor)) static void suite_##_##name_##_register(void) {                   \
        static struct plain_test test = {#suite_, #name_, suite_##_##name_, NULL};                 \
        test.next = plain_tests;                                                                   \
        plain_tests = &test;                                                                       \
    }                                                                                              \
    static void suite_##_##name_(void)

#define cr_assert(condition, ...)                                                                  \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                         \
            printf("  " __VA_ARGS__);                                                              \
            printf("\n");                                                                          \
            longjmp(plain_end, 1);                                                                 \
        }                                                                                          \
    } while (0)
#define cr_expect cr_assert
#define cr_assert_eq(a, b, ...) cr_assert((a) == (b), __VA_ARGS__)
#define cr_assert_neq(a, b, ...) cr_assert((a) != (b), __VA_ARGS__)
#define cr_assert_not(a, ...) cr_assert(!(a), __VA_ARGS__)
#define cr_assert_null(a, ...) cr_assert((a) == NULL, __VA_ARGS__)
#define cr_assert_not_null(a, ...) cr_assert((a) != NULL, __VA_ARGS__)
#define cr_assert_str_eq(a, b, ...) cr_assert(strcmp((a), (b)) == 0, __VA_ARGS__)
#define cr_assert_arr_eq(a, b, n, ...) cr_assert(memcmp((a), (b), (n)) == 0, __VA_ARGS__)
#define cr_skip(...)                                                                               \
    do {                                                                                           \
        printf("skipped: " __VA_ARGS__);                                                           \
        printf("\n");                                                                              \
        longjmp(plain_end, 2);                                                                     \
    } while (0)
#define cr_skip_test cr_skip

static bool plain_run(const struct plain_test *test) {
    int end = setjmp(plain_end);
    if (end == 0) test->run();
    return end != 1;
}

int main(void) {
    int n = 0, failed = 0;
    for (struct plain_test *test = plain_tests; test != NULL; test = test->next, n++) {
        if (plain_run(test)) continue;
        printf("FAILED %s/%s\n", test->suite, test->name);
        failed++;
    }
    printf("%d passed, %d failed\n", n - failed, failed);
    return failed != 0;
}

#endif
