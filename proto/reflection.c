/* grpc.reflection.v1 and v1alpha. See reflection.h. */
#include "proto/reflection.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/reflection/descriptor.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"

/* The descriptor set, placed into this binary by the assembler. */
__asm__(".section .rodata\n"
        ".balign 16\n"
        "reflection_descriptors:\n"
        ".incbin \"" REFLECTION_DESCRIPTORS "\"\n"
        "reflection_descriptors_end:\n"
        ".previous\n");
extern const char reflection_descriptors[], reflection_descriptors_end[];

#define DESCRIPTORS_UNPACKED_MAX (4u << 20)

#define FILES_MAX 64
#define SERVICES_MAX 32

/* The set, parsed once. files[i] describes set->file[i]. */
struct reflection {
    const char *const *services;
    size_t n_services, n_files;
    Tandem__Reflection__FileSet *set;
    Tandem__Reflection__File *files[FILES_MAX];
};

/* ---- looking up symbols ---------------------------------------------------------------------- */

/* Whether `symbol` begins with the part `name`; then `*rest` is what follows its dot, or "". */
static bool part_matches(const char *symbol, const char *name, const char **rest) {
    size_t length = strlen(name);
    if (strncmp(symbol, name, length) != 0) return false;
    if (symbol[length] == '\0') {
        *rest = symbol + length;
        return true;
    }
    *rest = symbol + length + 1;
    return symbol[length] == '.' && **rest != '\0';
}

static bool is_named(Tandem__Reflection__Named *const *named, size_t n, const char *symbol) {
    for (size_t i = 0; i < n; i++) {
        if (strcmp(named[i]->name, symbol) == 0) return true;
    }
    return false;
}

static bool enum_defines(Tandem__Reflection__Enum *const *enums, size_t n, const char *symbol) {
    const char *rest;
    for (size_t i = 0; i < n; i++) {
        if (!part_matches(symbol, enums[i]->name, &rest)) continue;
        if (*rest == '\0' || is_named(enums[i]->value, enums[i]->n_value, rest)) return true;
    }
    return false;
}

static bool message_defines(Tandem__Reflection__Message *const *messages, size_t n,
                            const char *symbol) {
    const char *rest;
    for (size_t i = 0; i < n; i++) {
        const Tandem__Reflection__Message *message = messages[i];
        if (!part_matches(symbol, message->name, &rest)) continue;
        if (*rest == '\0' || is_named(message->field, message->n_field, rest) ||
            message_defines(message->nested_type, message->n_nested_type, rest) ||
            enum_defines(message->enum_type, message->n_enum_type, rest)) {
            return true;
        }
    }
    return false;
}

static bool service_defines(Tandem__Reflection__Service *const *services, size_t n,
                            const char *symbol) {
    const char *rest;
    for (size_t i = 0; i < n; i++) {
        if (!part_matches(symbol, services[i]->name, &rest)) continue;
        if (*rest == '\0') return true;
        if (is_named(services[i]->method, services[i]->n_method, rest)) return true;
    }
    return false;
}

/* The file that defines a full name such as tandem.v1.Generation.Generate, -1: none. */
static long file_with_symbol(const struct reflection *reflection, const char *symbol) {
    for (size_t i = 0; i < reflection->n_files; i++) {
        const Tandem__Reflection__File *file = reflection->files[i];
        const char *rest = symbol;
        if (file->package[0] != '\0' && !part_matches(symbol, file->package, &rest)) continue;
        if (service_defines(file->service, file->n_service, rest) ||
            message_defines(file->message_type, file->n_message_type, rest) ||
            enum_defines(file->enum_type, file->n_enum_type, rest)) {
            return (long)i;
        }
    }
    return -1;
}

static long file_with_name(const struct reflection *reflection, const char *name) {
    for (size_t i = 0; i < reflection->n_files; i++) {
        if (strcmp(reflection->files[i]->name, name) == 0) return (long)i;
    }
    return -1;
}

/* ---- answers --------------------------------------------------------------------------------- */

/* Puts file `i` and, before it, what it imports into files [*n]; `seen` [FILES_MAX]. */
static void collect_files(const struct reflection *reflection, size_t i, bool *seen,
                          ProtobufCBinaryData *files, size_t *n) {
    if (seen[i]) return;
    seen[i] = true;
    const Tandem__Reflection__File *file = reflection->files[i];
    for (size_t d = 0; d < file->n_dependency; d++) {
        long imported = file_with_name(reflection, file->dependency[d]);
        if (imported >= 0) collect_files(reflection, (size_t)imported, seen, files, n);
    }
    files[(*n)++] = reflection->set->file[i];
}

static void answer_file(const struct reflection *reflection, long file, const char *wanted,
                        Grpc__Reflection__V1__ServerReflectionResponse *answer,
                        struct rpc_call *call) {
    if (file < 0) {
        char text[160];
        Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
        snprintf(text, sizeof text, "nothing here is called %.100s", wanted);
        error.error_code = STATUS_NOT_FOUND;
        error.error_message = text;
        answer->message_response_case =
            GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
        answer->error_response = &error;
        rpc_call_send(call, &answer->base);
        return;
    }
    bool seen[FILES_MAX] = {false};
    ProtobufCBinaryData files[FILES_MAX];
    Grpc__Reflection__V1__FileDescriptorResponse found =
        GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    found.file_descriptor_proto = files;
    collect_files(reflection, (size_t)file, seen, files, &found.n_file_descriptor_proto);
    answer->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    answer->file_descriptor_response = &found;
    rpc_call_send(call, &answer->base);
}

static void answer_services(const struct reflection *reflection,
                            Grpc__Reflection__V1__ServerReflectionResponse *answer,
                            struct rpc_call *call) {
    Grpc__Reflection__V1__ServiceResponse names[SERVICES_MAX];
    Grpc__Reflection__V1__ServiceResponse *pointers[SERVICES_MAX];
    Grpc__Reflection__V1__ListServiceResponse services =
        GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    for (size_t i = 0; i < reflection->n_services; i++) {
        grpc__reflection__v1__service_response__init(&names[i]);
        names[i].name = (char *)reflection->services[i];
        pointers[i] = &names[i];
    }
    services.n_service = reflection->n_services;
    services.service = pointers;
    answer->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    answer->list_services_response = &services;
    rpc_call_send(call, &answer->base);
}

static void answer_unsupported(Grpc__Reflection__V1__ServerReflectionResponse *answer,
                               struct rpc_call *call) {
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    error.error_code = STATUS_UNIMPLEMENTED;
    error.error_message = (char *)"this server has no extensions; ask for files, symbols, services";
    answer->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    answer->error_response = &error;
    rpc_call_send(call, &answer->base);
}

static void info(struct rpc_call *call, const ProtobufCMessage *message, void *user) {
    const struct reflection *reflection = user;
    Grpc__Reflection__V1__ServerReflectionRequest *request = (void *)(uintptr_t)message;
    Grpc__Reflection__V1__ServerReflectionResponse answer =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    answer.valid_host = request->host;
    answer.original_request = request;
    switch (request->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        answer_services(reflection, &answer, call);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        answer_file(reflection, file_with_name(reflection, request->file_by_filename),
                    request->file_by_filename, &answer, call);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        answer_file(reflection, file_with_symbol(reflection, request->file_containing_symbol),
                    request->file_containing_symbol, &answer, call);
        break;
    default:
        answer_unsupported(&answer, call);
    }
}

/* ---- creating -------------------------------------------------------------------------------- */

static enum status check_services(const struct reflection *reflection, struct error *err) {
    for (size_t i = 0; i < reflection->n_services; i++) {
        if (file_with_symbol(reflection, reflection->services[i]) >= 0) continue;
        return error_set(err, STATUS_INTERNAL,
                         "the embedded descriptors lack the service %s; proto/CMakeLists.txt lists "
                         "what they hold", reflection->services[i]);
    }
    return STATUS_OK;
}

static enum status parse_files(struct reflection *reflection, struct error *err) {
    ProtobufCMessage *message;
    TRY(rpc_message_unpack(&message, &tandem__reflection__file_set__descriptor,
                           reflection_descriptors,
                           (size_t)(reflection_descriptors_end - reflection_descriptors),
                           DESCRIPTORS_UNPACKED_MAX, err));
    reflection->set = (void *)message;
    CHECK(reflection->set->n_file <= FILES_MAX);
    for (; reflection->n_files < reflection->set->n_file; reflection->n_files++) {
        ProtobufCBinaryData file = reflection->set->file[reflection->n_files];
        TRY(rpc_message_unpack(&message, &tandem__reflection__file__descriptor, file.data, file.len,
                               DESCRIPTORS_UNPACKED_MAX, err));
        reflection->files[reflection->n_files] = (void *)message;
    }
    return STATUS_OK;
}

enum status reflection_create(struct reflection **out, const char *const *services,
                              size_t n_services, struct error *err) {
    *out = NULL;
    CHECK(n_services <= SERVICES_MAX);
    struct reflection *reflection = xcalloc(1, sizeof *reflection);
    reflection->services = services;
    reflection->n_services = n_services;
    enum status status;
    TRY_OR_FAIL(parse_files(reflection, err));
    TRY_OR_FAIL(check_services(reflection, err));
    *out = reflection;
    return STATUS_OK;
fail:
    reflection_destroy(reflection);
    return status;
}

void reflection_destroy(struct reflection *reflection) {
    if (reflection == NULL) return;
    for (size_t i = 0; i < reflection->n_files; i++) {
        rpc_message_free(&reflection->files[i]->base);
    }
    if (reflection->set != NULL) rpc_message_free(&reflection->set->base);
    free(reflection);
}

static const struct rpc_method methods[] = {
    {.path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
     .kind = RPC_REQUEST_STREAM, .on_message = info, .background = true,
     .request = &grpc__reflection__v1__server_reflection_request__descriptor},
    {.path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
     .kind = RPC_REQUEST_STREAM, .on_message = info, .background = true,
     .request = &grpc__reflection__v1__server_reflection_request__descriptor},
};

struct rpc_service reflection_service(struct reflection *reflection) {
    return (struct rpc_service){methods, sizeof methods / sizeof methods[0], reflection};
}
