/* Opening the module for ranks on devices: what is said when it is missing or foreign, and, where
 * it was built, that it is this build's and says why it cannot make a group here. */
#include "tests/unit/test.h"

#include <string.h>
#include <unistd.h>

#include "worker/comm/comm_device.h"

static void check_refused(const char *path, const char *words) {
    const struct comm_device_module *module;
    struct error err = {0};
    enum status status = comm_device_open(&module, path, &err);
    cr_assert_eq(status, STATUS_UNAVAILABLE, "%s", status_name(status));
    cr_assert_null(module);
    cr_assert_not_null(strstr(err.text, words), "'%s' says nothing of '%s'", err.text, words);
    cr_assert_null(strchr(err.text, '\n'), "%s", err.text);
}

Test(comm_device, a_missing_module) {
    check_refused("/nowhere/tandem-nccl.so", "/nowhere/tandem-nccl.so: cannot open shared object");
}

Test(comm_device, a_file_that_is_no_module) {
    check_refused(TANDEM_SOURCE_DIR "/README.md", "cannot be loaded");
    check_refused("libm.so.6", "is of another build");
}

/* The tests stand in tests/, the module in bin/ beside it. */
Test(comm_device, the_module_of_this_build) {
    const struct comm_device_module *module;
    struct comm *host, *comm = NULL;
    struct error err = {0};
    char program[4096];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    CHECK(n > 0);
    program[n] = '\0';
    char *slash = strrchr(program, '/');
    CHECK(slash != NULL && slash - program < 4000);
    strcpy(slash, "/../bin/tandem-nccl.so");
    if (access(program, R_OK) != 0) {
        check_refused(NULL, "tandem-nccl.so is not beside this program: build Tandem where");
        cr_skip("tandem-nccl.so was not built");
    }
    cr_assert_eq(comm_device_open(&module, NULL, &err), STATUS_OK, "%s", err.text);
    cr_assert_eq(comm_device_open(&module, program, &err), STATUS_OK, "%s", err.text);
    CHECK(comm_threads_create(&host, 1, &err) == STATUS_OK);
    struct comm_nccl_options options = {"target", 0, 20000000000};
    enum status status = comm_device_create(&comm, module, host, NULL, &options, &err);
    if (status == STATUS_OK) {
        cr_assert_eq(comm_barrier(comm, &err), STATUS_OK, "%s", err.text);
    } else {
        cr_assert_eq(status, STATUS_UNAVAILABLE, "%s", err.text);
        cr_assert_not_null(strstr(err.text, "target group, rank 0 of 1: "), "%s", err.text);
    }
    comm_destroy(comm);
    comm_destroy(host);
}
