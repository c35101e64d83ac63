#include "coordinator/router.h"

#include "tests/unit/test.h"

Test(router, picks_the_least_loaded_share) {
    struct router_load loads[] = {{true, 3, 4, 0}, {true, 4, 8, 900}, {true, 6, 10, 0}};
    cr_assert_eq(router_pick(loads, 3), 1);
    loads[1].n_requests = 7;
    cr_assert_eq(router_pick(loads, 3), 2);
}

Test(router, ties_go_to_fewer_tokens_then_to_the_lower_index) {
    struct router_load loads[] = {{true, 1, 4, 50}, {true, 2, 8, 40}, {true, 1, 4, 40}};
    cr_assert_eq(router_pick(loads, 3), 1);
}

Test(router, skips_replicas_that_do_not_serve_or_are_full) {
    struct router_load loads[] = {{false, 0, 4, 0}, {true, 4, 4, 0}, {true, 3, 4, 0}};
    cr_assert_eq(router_pick(loads, 3), 2);
    loads[2].n_requests = 4;
    cr_assert_eq(router_pick(loads, 3), -1);
    cr_assert_eq(router_pick(loads, 0), -1);
}
