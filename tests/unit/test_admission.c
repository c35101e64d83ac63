#include "coordinator/admission.h"

#include <string.h>

#include "tests/unit/test.h"

static struct admission queue_of(uint32_t requests, uint64_t tokens) {
    struct admission admission;
    admission_init(&admission, &(struct admission_limits){requests, tokens});
    return admission;
}

Test(admission, is_first_come_first_served_and_lets_any_leave) {
    struct admission queue = queue_of(10, 1000);
    struct admission_entry entries[3] = {{.prompt_tokens = 5}, {.prompt_tokens = 7},
                                         {.prompt_tokens = 11}};
    struct error err;
    int64_t retry;
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(admission_enter(&queue, &entries[i], 0, &retry, &err), STATUS_OK);
    }
    cr_assert_eq(queue.n_prompt_tokens, 23);
    admission_leave(&queue, &entries[1]);
    cr_assert(admission_first(&queue) == &entries[0]);
    admission_leave(&queue, &entries[0]);
    cr_assert(admission_first(&queue) == &entries[2]);
    admission_leave(&queue, &entries[2]);
    cr_assert_null(admission_first(&queue));
    cr_assert_eq(queue.n_requests, 0);
    cr_assert_eq(queue.n_prompt_tokens, 0);
}

Test(admission, refuses_one_request_too_many_with_the_numbers_and_a_hint) {
    struct admission queue = queue_of(2, 1000);
    struct admission_entry entries[3] = {{.prompt_tokens = 5}, {.prompt_tokens = 7},
                                         {.prompt_tokens = 11}};
    struct error err;
    int64_t retry = 0;
    admission_enter(&queue, &entries[0], 4, &retry, &err);
    admission_enter(&queue, &entries[1], 4, &retry, &err);
    cr_assert_eq(admission_enter(&queue, &entries[2], 4, &retry, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert_eq(retry, 500);   /* two places of four per second */
    cr_assert(strstr(err.text, "2 requests of at most 2") != NULL);
    cr_assert(strstr(err.text, "try again in 500 ms") != NULL);
    cr_assert_eq(queue.n_requests, 2);
    admission_leave(&queue, &entries[0]);
    cr_assert_eq(admission_enter(&queue, &entries[2], 4, &retry, &err), STATUS_OK);
}

Test(admission, bounds_prompt_tokens_but_lets_a_large_prompt_in_alone) {
    struct admission queue = queue_of(10, 100);
    struct admission_entry large = {.prompt_tokens = 500}, small = {.prompt_tokens = 1};
    struct error err;
    int64_t retry;
    cr_assert_eq(admission_enter(&queue, &large, 0, &retry, &err), STATUS_OK);
    cr_assert_eq(admission_enter(&queue, &small, 0, &retry, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert_eq(retry, 1000);   /* the rate is not known */
    admission_leave(&queue, &large);
    cr_assert_eq(admission_enter(&queue, &small, 0, &retry, &err), STATUS_OK);
    cr_assert_eq(admission_enter(&queue, &large, 0, &retry, &err), STATUS_RESOURCE_EXHAUSTED);
}

Test(admission, hint_stays_within_its_bounds) {
    struct admission queue = queue_of(1, 100);
    struct admission_entry first = {.prompt_tokens = 1}, second = {.prompt_tokens = 1};
    struct error err;
    int64_t retry;
    admission_enter(&queue, &first, 0, &retry, &err);
    admission_enter(&queue, &second, 1e9, &retry, &err);
    cr_assert_eq(retry, 100);
    admission_enter(&queue, &second, 1e-9, &retry, &err);
    cr_assert_eq(retry, 30000);
}

Test(admission, finds_the_first_past_its_deadline) {
    struct admission queue = queue_of(10, 1000);
    struct admission_entry none = {.prompt_tokens = 1}, late = {.prompt_tokens = 1, .deadline_ns = 90},
                           soon = {.prompt_tokens = 1, .deadline_ns = 50};
    struct error err;
    int64_t retry;
    admission_enter(&queue, &none, 0, &retry, &err);
    admission_enter(&queue, &late, 0, &retry, &err);
    admission_enter(&queue, &soon, 0, &retry, &err);
    cr_assert_null(admission_expired(&queue, 49));
    cr_assert(admission_expired(&queue, 50) == &soon);
    cr_assert(admission_expired(&queue, 90) == &late);
}
