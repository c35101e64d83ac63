#!/bin/bash
# Checks and measures the CUDA backend on a machine with a GPU, in under 8 minutes on an H200:
#
#   tests/gpu/run.sh [--quick] [--out DIR] [BIN]
#
# BIN: a folder with gpu_check, lossless_suite, tandem-bench and the modules: a build's bin, or what
# tests/gpu/bundle.sh packed (then nothing but the driver is needed; python3 with torch and transformers for
# the comparison). Prints a table; DIR (default: gpu-results) gets device.csv, engine.csv, spec.csv and the
# whole log. --quick: parity alone.
# Every part is run, also behind one that failed; the exit status is that of all.
set -uo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
out=$PWD/gpu-results quick="" bin=""
while [ $# -gt 0 ]; do
    case "$1" in
    --quick) quick=--quick ;;
    --out) out=$2; shift ;;
    --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) bin=$1 ;;
    esac
    shift
done
bin=${bin:-$root/build/bin}
[ -x "$bin/gpu_check" ] || { echo "tests/gpu/run.sh: no gpu_check in $bin; build first (tests/run.sh, or tests/gpu/bundle.sh)" >&2; exit 1; }
[ -d "$bin/lib" ] && export LD_LIBRARY_PATH="$bin/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
mkdir -p "$out"
out=$(cd "$out" && pwd)
models=$(mktemp -d "${TMPDIR:-/tmp}/tandem-gpu.XXXXXX")
trap 'rm -rf "$models"' EXIT
target=$root/assets/models/llama-tale-target
failed=()
begin=$SECONDS

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo
    echo "== $name"
    if timeout "$limit" "$@"; then
        echo "== $name: passed, $((SECONDS - start)) s"
    else
        echo "== $name: FAILED with status $?, $((SECONDS - start)) s"
        failed+=("$name")
    fi
}

sanitize() {
    local tool=$1
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || {
        echo "compute-sanitizer is not installed here"
        return 1
    }
    "$sanitizer" --tool "$tool" --error-exitcode 9 "$bin/gpu_check" --quick
}

# The same random weights for both; tokens/s of one request.
compare() {
    local model=$1
    python3 "$root/tests/gpu/transformers_generate.py" "$model" --csv "$out/engine.csv"
}

everything() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
    fi
    part "parity and logit bits" 240 "$bin/gpu_check" $quick --model "$target"
    if [ -z "$quick" ]; then
        part "lossless" 120 env -C "$root" "$bin/lossless_suite" lossless --isa cuda
        part "memcheck" 100 sanitize memcheck
        part "racecheck" 100 sanitize racecheck
        part "kernels" 90 "$bin/tandem-bench" device --passes 7 --csv "$out/device.csv"
        echo
        echo "== writing random models"
        "$bin/tandem-bench" make-model --out "$models/8b" --shape llama-3.1-8b --draft "$models/1b" \
            --draft-layers 4 --eps 0.1 || failed+=("make-model")
        for weights in bf16 fp8; do
            part "engine, 8B $weights" 120 "$bin/tandem-bench" engine --model "$models/8b" --isa cuda \
                --weights "$weights" --passes 5 --csv "$out/engine.csv"
        done
        part "transformers on the same weights" 120 compare "$models/8b"
        for accuracy in 0.6 0.8 0.9; do
            part "one GPU, acceptance $accuracy" 60 "$bin/tandem-bench" spec --model "$models/8b" \
                --draft "$models/1b" --device cuda --synthetic "$accuracy" --temperatures 0 \
                --windows 2,4,6 --n-prompts 2 --tokens 96 --passes 3 --ignore-eos \
                --label "8B and its first 4 layers, synthetic acceptance $accuracy" \
                --csv "$out/spec.csv"
        done
    fi
    echo
    echo "tests/gpu/run.sh: $((SECONDS - begin)) s; failed: ${failed[*]:-nothing}"
    [ ${#failed[@]} -eq 0 ]
}

everything 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
