#include "client/status.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>

#include "common/clock.h"
#include "common/options.h"
#include "proto/rpc.h"
#include "tandem/v1/operations.pb-c.h"

static const struct options_row rows[] = {
    {.name = "server", .type = OPTIONS_TEXT, .group = "Options", .value = "HOST:PORT",
     .help = "where the coordinator listens", .initial = "127.0.0.1:50051"},
    {.name = "json", .type = OPTIONS_FLAG, .group = "Options",
     .help = "prints one JSON object instead of tables"},
    {.name = "help", .type = OPTIONS_FLAG, .group = "Options", .help = "prints this"},
};
#define N_ROWS (sizeof rows / sizeof *rows)
#define MIB 1048576.0

static enum status fetch(Tandem__V1__GetStatusResponse **out, const char *server,
                         struct error *err) {
    struct rpc_channel_options options = rpc_channel_options_default();
    struct rpc_channel *channel;
    TRY(rpc_channel_create(&channel, server, &options, err));
    Tandem__V1__GetStatusRequest request = TANDEM__V1__GET_STATUS_REQUEST__INIT;
    ProtobufCMessage *response;
    enum status status = rpc_unary(channel, "/tandem.v1.Operations/GetStatus", &request.base,
                                   &tandem__v1__get_status_response__descriptor, &response,
                                   clock_now_ns() + INT64_C(10000000000), NULL, 0, err);
    rpc_channel_destroy(channel);
    *out = (Tandem__V1__GetStatusResponse *)response;
    return status;
}

static void print_speculation(const Tandem__V1__ReplicaStatus *replica) {
    printf("  speculation:");
    if (replica->window > 0) {
        printf(" window %u, layer width %u, delay %u;", replica->window, replica->layer_width,
               replica->delay);
    }
    printf(" acceptance %.2f of late; since start %.1f %% of %" PRIu64 " drafted tokens, "
           "acceptance length %.2f\n", replica->acceptance,
           100.0 * (double)replica->accepted_tokens / (double)replica->draft_tokens,
           replica->draft_tokens, 1 + (double)replica->accepted_tokens / (double)replica->drafts);
    printf("  waited: the draft %.1f s for the target, the target %.1f s for the draft\n",
           replica->draft_wait_seconds, replica->target_wait_seconds);
}

static void print_links(const Tandem__V1__ReplicaStatus *replica) {
    bool group = replica->link_gigabytes_per_second > 0, handoff = replica->handoff_latency_us > 0;
    if (!group && !handoff) return;
    fputs("  links, measured at start:", stdout);
    if (group) {
        printf(" the slowest inside a group %.1f us, %.2f GB/s", replica->link_latency_us,
               replica->link_gigabytes_per_second);
    }
    if (handoff) printf("%s hand-off %.1f us", group ? ";" : "", replica->handoff_latency_us);
    putchar('\n');
}

static void print_replica(const Tandem__V1__ReplicaStatus *replica) {
    printf("\nreplica %s: %s%s%s\n", replica->id, replica->state,
           replica->detail[0] != '\0' ? ", " : "", replica->detail);
    printf("  mode %s, %u running, %u waiting, KV blocks %u of %u, %.1f tokens/s\n", replica->mode,
           replica->running, replica->waiting, replica->kv_blocks_used, replica->kv_blocks,
           replica->tokens_per_second);
    if (replica->drafts > 0) print_speculation(replica);
    print_links(replica);
    printf("  %4s  %-16s %-22s %-12s %5s %12s %9s %11s\n", "rank", "host", "device", "role", "shard",
           "weights MiB", "KV MiB", "scratch MiB");
    for (size_t i = 0; i < replica->n_ranks; i++) {
        const Tandem__V1__RankStatus *rank = replica->ranks[i];
        printf("  %4u  %-16.16s %-22.22s %-12s %5u %12.1f %9.1f %11.1f\n", rank->rank, rank->host,
               rank->device, rank->role, rank->shard, (double)rank->weights_bytes / MIB,
               (double)rank->kv_bytes / MIB, (double)rank->scratch_bytes / MIB);
    }
}

static void print_tables(const Tandem__V1__GetStatusResponse *status) {
    printf("%s: %s, tandem %s, up %.0f s\n", status->model, status->ready ? "ready" : "not ready",
           status->version, status->uptime_seconds);
    printf("%" PRIu64 " requests finished, %" PRIu64 " tokens generated; queued: %u requests, %u "
           "prompt tokens\n", status->finished_requests, status->generated_tokens,
           status->queued_requests, status->queued_prompt_tokens);
    for (size_t i = 0; i < status->n_replicas; i++) print_replica(status->replicas[i]);
    if (status->n_replicas == 0) puts("\nno replica has attached");
}

static json_t *rank_json(const Tandem__V1__RankStatus *rank) {
    return json_pack("{sI ss ss ss sI sI sI sI sI sI}", "rank", (json_int_t)rank->rank, "host",
                     rank->host, "device", rank->device, "role", rank->role, "shard",
                     (json_int_t)rank->shard, "memory_bytes", (json_int_t)rank->memory_bytes,
                     "cores", (json_int_t)rank->cores, "weights_bytes",
                     (json_int_t)rank->weights_bytes, "kv_bytes", (json_int_t)rank->kv_bytes,
                     "scratch_bytes", (json_int_t)rank->scratch_bytes);
}

static json_t *replica_json(const Tandem__V1__ReplicaStatus *replica) {
    json_t *ranks = json_array();
    for (size_t i = 0; i < replica->n_ranks; i++) {
        json_array_append_new(ranks, rank_json(replica->ranks[i]));
    }
    return json_pack("{ss ss ss ss sI sI sI sI sf sI sI sI sI sI sI sf sf sf sf sf sf so}", "id",
                     replica->id, "state", replica->state,
                     "detail", replica->detail, "mode", replica->mode, "running",
                     (json_int_t)replica->running, "waiting", (json_int_t)replica->waiting,
                     "kv_blocks", (json_int_t)replica->kv_blocks, "kv_blocks_used",
                     (json_int_t)replica->kv_blocks_used, "tokens_per_second",
                     replica->tokens_per_second, "window", (json_int_t)replica->window, "layer_width",
                     (json_int_t)replica->layer_width, "delay", (json_int_t)replica->delay,
                     "drafts", (json_int_t)replica->drafts, "draft_tokens",
                     (json_int_t)replica->draft_tokens, "accepted_tokens",
                     (json_int_t)replica->accepted_tokens, "acceptance", replica->acceptance,
                     "draft_wait_seconds", replica->draft_wait_seconds, "target_wait_seconds",
                     replica->target_wait_seconds, "link_latency_us", replica->link_latency_us,
                     "link_gigabytes_per_second", replica->link_gigabytes_per_second,
                     "handoff_latency_us", replica->handoff_latency_us, "ranks", ranks);
}

static void print_json(const Tandem__V1__GetStatusResponse *status) {
    json_t *replicas = json_array();
    for (size_t i = 0; i < status->n_replicas; i++) {
        json_array_append_new(replicas, replica_json(status->replicas[i]));
    }
    json_t *all = json_pack(
        "{ss sf ss sb sI sI sI sI so}", "version", status->version, "uptime_seconds",
        status->uptime_seconds, "model", status->model, "ready", (int)status->ready,
        "queued_requests", (json_int_t)status->queued_requests, "queued_prompt_tokens",
        (json_int_t)status->queued_prompt_tokens, "finished_requests",
        (json_int_t)status->finished_requests, "generated_tokens",
        (json_int_t)status->generated_tokens, "replicas", replicas);
    CHECK(all != NULL);
    json_dumpf(all, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(all);
}

int client_status(int argc, char **argv) {
    struct options *options;
    struct error err;
    if (options_parse(&options, rows, N_ROWS, argc, argv, &err) != STATUS_OK) {
        fprintf(stderr, "tandem status: %s; try tandem status --help\n", err.text);
        return 2;
    }
    int result = 0;
    if (options_flag(options, "help")) {
        puts("Usage: tandem status [options]\n\n"
             "Shows what a server is doing. Exit status 3: it runs, but is not ready.");
        options_help(stdout, rows, N_ROWS);
    } else {
        Tandem__V1__GetStatusResponse *status;
        if (fetch(&status, options_text(options, "server"), &err) != STATUS_OK) {
            fprintf(stderr, "tandem status: %s: %s: %s\n", options_text(options, "server"),
                    status_name(err.status), err.text);
            result = 1;
        } else {
            if (options_flag(options, "json")) print_json(status);
            else print_tables(status);
            result = status->ready ? 0 : 3;
            rpc_message_free(&status->base);
        }
    }
    options_free(options);
    return result;
}
