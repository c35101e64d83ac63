#!/bin/bash
# All tests, from a bare machine:
#
#   tests/run.sh            installs, builds, runs everything that needs no GPU
#   tests/run.sh FILTER     only the tests whose name matches (ctest -R)
#   tests/run.sh asan|tsan  the unit tests under sanitizers
#   tests/run.sh fuzz       every fuzzer, about a minute together
#   tests/run.sh lossless   the whole exactness suite (speculation): hours on 2 cores
#
# Where there is a GPU, the CUDA backend is checked on it first; tests/gpu/run.sh also measures.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
jobs=$(nproc)
# Under sanitizers these take minutes: whole models. `asan` runs them, the default run only plainly.
heavy='^test_(goldens|logit_bits|step_loop)$'
# Under ThreadSanitizer the default run takes what has threads of its own.
threaded='^test_(comm_threads|rpc|rpc_flow|rpc_services|metrics|stream|fleet|linear|trace|generate)$'

fail() {
    echo "tests/run.sh: $*" >&2
    exit 1
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# ctest hides what passing programs print: what this machine cannot test is said here.
say_what_is_left_out() {
    local flag
    for flag in amx_tile avx512_bf16 avx2; do
        grep -qwm1 "$flag" /proc/cpuinfo ||
            echo "tests/run.sh: this processor has no $flag: those kernels do not run natively"
    done
    [ -d "$root/../shared/data" ] ||
        echo "tests/run.sh: ../shared is absent: tokenizer vectors and third-party goldens are skipped"
    has_gpu || echo "tests/run.sh: no GPU here: CUDA kernels run on the emulated device only"
    command -v nvcc >/dev/null || echo "tests/run.sh: no nvcc here: the CUDA and NCCL modules are not built"
}

# build FOLDER SANITIZER TARGET...
build() {
    local folder=$1 sanitizer=$2 log
    shift 2
    log=$(mktemp)
    echo "tests/run.sh: building into $folder"
    cmake -S "$root" -B "$folder" -G Ninja -DTANDEM_SANITIZE="$sanitizer" >"$log" 2>&1 || {
        cat "$log" >&2
        rm -f "$log"
        fail "the build in $folder could not be configured; the reason stands above"
    }
    rm -f "$log"
    ninja -C "$folder" "$@" || fail "the build in $folder failed; the compiler's words stand above"
}

# LeakSanitizer's suppressions name what libraries keep until the process ends.
run_asan() {
    build "$root/build-asan" address unit-tests
    ASAN_OPTIONS=detect_stack_use_after_return=0 \
        LSAN_OPTIONS="suppressions=$root/tests/lsan.supp:print_suppressions=0" \
        ctest --test-dir "$root/build-asan" --output-on-failure -j "$jobs" -R "$1" -E "${2:-^$}"
}

# setarch -R: ThreadSanitizer wants addresses where it expects them.
run_tsan() {
    build "$root/build-tsan" thread unit-tests
    TSAN_OPTIONS="suppressions=$root/tests/tsan.supp ignore_noninstrumented_modules=1" \
        setarch -R ctest --test-dir "$root/build-tsan" --output-on-failure -j "$jobs" -R "$1" \
        -E "$heavy"
}

run_fuzz() {
    local folder="$root/build-fuzz" fuzzer seconds name n=0
    "$root/tests/fuzz/build.sh" "$folder"
    for fuzzer in "$folder"/fuzz_*; do [ -x "$fuzzer" ] && n=$((n + 1)); done
    [ "$n" -gt 0 ] || fail "tests/fuzz/build.sh built no fuzzer"
    seconds=$((60 / n))
    for fuzzer in "$folder"/fuzz_*; do
        name=$(basename "$fuzzer")
        echo "tests/run.sh: $name for $seconds s"
        (cd "$folder" && "$fuzzer" -max_total_time=$seconds -print_final_stats=1 -verbosity=0 \
            "corpus/$name") || fail "$name found a defect; the input stands in $folder"
    done
    echo "tests/run.sh: $n fuzzers found nothing in $((seconds * n)) s"
}

# Every part is run, also behind one that failed.
run_lossless() {
    local part failed=""
    build "$root/build" "" lossless_suite test_logit_bits
    "$root/build/tests/test_logit_bits" || failed="$failed logit_bits"
    for part in law calibration ends sync lossless; do
        "$root/build/tests/lossless_suite" "$part" --full || failed="$failed $part"
    done
    [ -z "$failed" ] || fail "failed:$failed"
    echo "tests/run.sh: the whole exactness suite passed"
}

"$root/deploy/install-deps.sh"
say_what_is_left_out
case "${1:-}" in
fuzz) run_fuzz ;;
lossless) run_lossless ;;
asan) run_asan '^test_' ;;
tsan) run_tsan '^test_' ;;
"")
    # Sanitizers first: ctest's closing lines of the whole are the last thing printed.
    run_asan '^test_' "$heavy"
    run_tsan "$threaded"
    build "$root/build" "" all
    if has_gpu; then
        "$root/tests/gpu/run.sh" --quick --out "$root/build/gpu-results" "$root/build/bin" || fail "GPU checks failed"
    fi
    ctest --test-dir "$root/build" --output-on-failure
    ;;
*)
    build "$root/build" "" all
    ctest --test-dir "$root/build" --output-on-failure --no-tests=error -R "$1"
    ;;
esac
