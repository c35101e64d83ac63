#include "client/policy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/options.h"
#include "proto/rpc.h"
#include "tandem/v1/operations.pb-c.h"

static const struct options_row rows[] = {
    {.name = "server", .type = OPTIONS_TEXT, .group = "Options", .value = "HOST:PORT",
     .help = "where the coordinator listens", .initial = "127.0.0.1:50051"},
    {.name = "mode", .type = OPTIONS_CHOICE, .group = "Options",
     .choices = "auto|plain|sd|easyspec|pearl|pearl+lp",
     .help = "from the next round on; without it the policy is only shown"},
    {.name = "window", .type = OPTIONS_COUNT, .group = "Options", .value = "G",
     .help = "tokens drafted for a sequence in a round; without it chosen from what is measured",
     .low = 1, .high = 16},
    {.name = "layer-width", .type = OPTIONS_COUNT, .group = "Options", .value = "N",
     .help = "draft layers at once in easyspec and pearl+lp; without it the plan's", .low = 1,
     .high = 4},
    {.name = "delay", .type = OPTIONS_COUNT, .group = "Options", .value = "K",
     .help = "pearl, pearl+lp: draft steps that a target without drafted tokens waits for; without "
             "it chosen", .low = 0, .high = 15},
    {.name = "replica", .type = OPTIONS_TEXT, .group = "Options", .value = "NAME",
     .help = "only this one; without it all, and those that come later"},
    {.name = "help", .type = OPTIONS_FLAG, .group = "Options", .help = "prints this"},
};
#define N_ROWS (sizeof rows / sizeof *rows)

static enum status call(ProtobufCMessage **out, const char *server, const char *method,
                        const ProtobufCMessage *request,
                        const ProtobufCMessageDescriptor *response, struct error *err) {
    struct rpc_channel_options options = rpc_channel_options_default();
    struct rpc_channel *channel;
    TRY(rpc_channel_create(&channel, server, &options, err));
    enum status status = rpc_unary(channel, method, request, response, out,
                                   clock_now_ns() + INT64_C(10000000000), NULL, 0, err);
    rpc_channel_destroy(channel);
    return status;
}

static void print_estimate(const Tandem__V1__ModeEstimate *mode) {
    char window[16] = "-", measured[32] = "-";
    if (mode->window > 0) snprintf(window, sizeof window, "%u", mode->window);
    if (mode->measured > 0) snprintf(measured, sizeof measured, "%.1f", mode->measured);
    printf("  %-9s  %6s  %5u  %10.1f  %10.1f  %10s\n", mode->mode, window, mode->delay,
           mode->predicted, mode->expected, measured);
}

static void print_replica(const Tandem__V1__ReplicaPolicy *replica) {
    printf("\nreplica %s: %s", replica->id, replica->mode);
    if (strcmp(replica->mode, "plain") != 0) {
        printf(", window %u, layer width %u, delay %u", replica->window, replica->layer_width,
               replica->delay);
    }
    printf(" (%s)\n", replica->phase);
    printf("  %-9s  %6s  %5s  %10s  %10s  %10s\n", "mode", "window", "delay", "predicted",
           "expected", "measured");
    for (size_t i = 0; i < replica->n_modes; i++) print_estimate(replica->modes[i]);
}

static void print_replicas(Tandem__V1__ReplicaPolicy **replicas, size_t n) {
    for (size_t i = 0; i < n; i++) print_replica(replicas[i]);
    if (n == 0) puts("\nno replica with a drafter is here");
    else puts("\ntokens/s over all sequences: predicted from acceptance and step times, expected "
              "with\nwhat was measured, measured when the mode last ran");
}

static enum status show(const char *server, struct error *err) {
    Tandem__V1__GetPlanRequest request = TANDEM__V1__GET_PLAN_REQUEST__INIT;
    ProtobufCMessage *message;
    TRY(call(&message, server, "/tandem.v1.Operations/GetPlan", &request.base,
             &tandem__v1__get_plan_response__descriptor, err));
    const Tandem__V1__GetPlanResponse *plan = (const Tandem__V1__GetPlanResponse *)message;
    printf("mode %s; target on %u rank%s", plan->mode, plan->target_degree,
           plan->target_degree == 1 ? "" : "s");
    if (plan->draft_degree > 0) {
        printf(", draft %s on %u (%s)", plan->draft, plan->draft_degree, plan->split);
    } else if (plan->drafter[0] != '\0') {
        printf(", drafter %s", plan->drafter);
    }
    putchar('\n');
    print_replicas(plan->replicas, plan->n_replicas);
    rpc_message_free(message);
    return STATUS_OK;
}

static enum status set(const char *server, const struct options *options, struct error *err) {
    Tandem__V1__SetPolicyRequest request = TANDEM__V1__SET_POLICY_REQUEST__INIT;
    request.mode = (char *)options_text(options, "mode");
    request.window = (uint32_t)options_count(options, "window");
    request.layer_width = (uint32_t)options_count(options, "layer-width");
    if (options_given(options, "delay")) {
        request.delay_choice_case = TANDEM__V1__SET_POLICY_REQUEST__DELAY_CHOICE_DELAY;
        request.delay = (uint32_t)options_count(options, "delay");
    }
    if (options_given(options, "replica")) {
        request.replica = (char *)options_text(options, "replica");
    }
    ProtobufCMessage *message;
    TRY(call(&message, server, "/tandem.v1.Operations/SetPolicy", &request.base,
             &tandem__v1__set_policy_response__descriptor, err));
    const Tandem__V1__SetPolicyResponse *response = (const Tandem__V1__SetPolicyResponse *)message;
    printf("mode %s from the next round on\n", request.mode);
    print_replicas(response->replicas, response->n_replicas);
    rpc_message_free(message);
    return STATUS_OK;
}

static enum status check_options(const struct options *options, struct error *err) {
    static const char *const with_mode[] = {"window", "layer-width", "delay", "replica"};
    if (options_given(options, "mode")) return STATUS_OK;
    for (size_t i = 0; i < sizeof with_mode / sizeof *with_mode; i++) {
        if (!options_given(options, with_mode[i])) continue;
        return error_set(err, STATUS_INVALID_ARGUMENT, "--%s without --mode", with_mode[i]);
    }
    return STATUS_OK;
}

static int run(const struct options *options) {
    struct error err;
    if (check_options(options, &err) != STATUS_OK) {
        fprintf(stderr, "tandem policy: %s; try tandem policy --help\n", err.text);
        return 2;
    }
    const char *server = options_text(options, "server");
    enum status status = options_given(options, "mode") ? set(server, options, &err)
                                                        : show(server, &err);
    if (status == STATUS_OK) return 0;
    fprintf(stderr, "tandem policy: %s: %s: %s\n", server, status_name(status), err.text);
    return 1;
}

int client_policy(int argc, char **argv) {
    struct options *options;
    struct error err;
    if (options_parse(&options, rows, N_ROWS, argc, argv, &err) != STATUS_OK) {
        fprintf(stderr, "tandem policy: %s; try tandem policy --help\n", err.text);
        return 2;
    }
    int result = 0;
    if (options_flag(options, "help")) {
        puts("Usage: tandem policy [options]\n"
             "       tandem policy --mode MODE [--window G] [--layer-width N] [--delay K]\n\n"
             "Shows how the replicas of a server speculate; with --mode, sets it. Texts stay the\n"
             "same, whatever the mode.");
        options_help(stdout, rows, N_ROWS);
    } else {
        result = run(options);
    }
    options_free(options);
    return result;
}
