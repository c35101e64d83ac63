#include "worker/spec/round.h"

#include "common/error.h"

static int least(int a, int b) {
    return a < b ? a : b;
}

struct round_plan round_plan(int tail, int window, int wait, int limit) {
    CHECK(tail >= 0 && window >= 0 && wait >= 0 && limit >= 1);
    int room = limit > tail ? limit - tail : 0;
    struct round_plan plan = {.tail = tail, .make = least(window, room)};
    plan.wait = tail > 0 ? 0 : least(wait, plan.make);
    return plan;
}

struct round_plan round_made(struct round_plan plan, int made) {
    CHECK(made >= 0 && made <= plan.make);
    plan.make = made;
    plan.wait = least(plan.wait, made);
    return plan;
}

struct round_outcome round_settle(struct round_plan plan, int accepted) {
    int judged = round_judged(plan);
    CHECK(accepted >= 0 && accepted <= judged);
    bool held = accepted == judged;
    bool own = !held || round_has_bonus(plan);
    int left = plan.tail + plan.make - accepted;
    return (struct round_outcome){
        .accepted = accepted,
        .own = own,
        .committed = accepted + own,
        .tail = own ? 0 : left,
        .dropped = own ? left : 0,
    };
}
