#!/bin/sh
# Installs, builds, and tells one story in three ways: by a draft and a target that compute at the
# same time (PEARL, one rank each), by that target alone, and by the target on both ranks. The texts
# must be the same. Shows what each took, and stops everything it started.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build="$root/build"
models="$root/assets/models"
work=$(mktemp -d)
prompt="Tell me a story about a fox and a lighthouse."
runs=5
server=""

stop() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=""
    fi
}
leave() {
    stop
    rm -rf "$work"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "demo: $*" >&2
    exit 1
}

# serve NAME OPTION...: starts a server and waits until it serves; sets $grpc and $http.
serve() {
    name=$1
    shift
    "$build/bin/tandem" serve --model "$models/llama-tale-target" --port 0 --http-port 0 \
        --ready-file "$work/$name.json" "$@" >"$work/$name.log" 2>&1 &
    server=$!
    waited=0
    while [ ! -s "$work/$name.json" ]; do
        kill -0 "$server" 2>/dev/null || {
            cat "$work/$name.log" >&2
            fail "the server ended before it was ready; its words stand above"
        }
        [ "$waited" -lt 1200 ] || {
            cat "$work/$name.log" >&2
            fail "the server was not ready after two minutes; its words stand above"
        }
        sleep 0.1
        waited=$((waited + 1))
    done
    grpc=$(sed -n 's/.*"grpc_port": *\([0-9]*\).*/\1/p' "$work/$name.json")
    http=$(sed -n 's/.*"http_port": *\([0-9]*\).*/\1/p' "$work/$name.json")
}

# story NAME OPTION...: generates it; what it took goes to $work/NAME.took.
story() {
    name=$1
    shift
    "$build/bin/tandem" generate --server "127.0.0.1:$grpc" --temperature 0.7 --top-p 0.95 \
        --seed 7 --max-tokens 200 --chat "$prompt" "$@" 2>"$work/$name.took" || {
        cat "$work/$name.took" >&2
        : >"$work/failed"
    }
}

# tell NAME MODE: shows the story as it comes and keeps its text.
tell() {
    story "$1.1" --shade always --speculation "$2" | tee "$work/$1.shaded"
    [ ! -e "$work/failed" ] || fail "the generation failed; the reason stands above"
    sed 's/\x1b\[[0-9;]*m//g' "$work/$1.shaded" >"$work/$1.1.text"
    [ -s "$work/$1.1.text" ] || fail "the generation had no text"
    cat "$work/$1.1.took"
    same "$1.1"
}

# again NAME MODE FIRST: tells it without showing it, from run FIRST to the last.
again() {
    i=$3
    while [ "$i" -le "$runs" ]; do
        story "$1.$i" --speculation "$2" >"$work/$1.$i.text"
        [ ! -e "$work/failed" ] || fail "the generation failed; the reason stands above"
        same "$1.$i"
        i=$((i + 1))
    done
}

# same NAME: fails unless the story is the first one's, byte for byte.
same() {
    cmp -s "$work/pearl.1.text" "$work/$1.text" || {
        diff "$work/pearl.1.text" "$work/$1.text" >&2 || true
        fail "THE TEXTS DIFFER (above: < pearl, > $1); they must not, whatever the mode"
    }
}

# median NAME PATTERN: of a number in the lines of what the runs took.
median() {
    cat "$work/$1".*.took | sed -n "s/.*[ [,]$2.*/\1/p" | sort -n | sed -n "$(((runs + 1) / 2))p"
}
speed='\([0-9.]*\) tokens\/s'
length='mean acceptance length \([0-9.]*\)'

# waits SIDE: seconds of a run that it has waited for the other, from the server's metrics.
waits() {
    /usr/bin/python3 - "$http" "tandem_spec_$1_wait_seconds_total" "$runs" <<'PYTHON' ||
import sys
import urllib.request
port, name, runs = sys.argv[1:]
with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
    lines = page.read().decode().splitlines()
print(*(f"{float(line.split()[1]) / int(runs):.3f} s" for line in lines if line.split()[0] == name))
PYTHON
        fail "the server's metrics cannot be read"
}

row() {
    printf '%-32s %10s %18s %13s %13s\n' "$@"
}

"$root/deploy/install-deps.sh"

echo "demo: building into $build"
if ! cmake -S "$root" -B "$build" -G Ninja >"$work/cmake.log" 2>&1; then
    tail -n 20 "$work/cmake.log" >&2
    fail "the build could not be configured, see above (removing $build starts afresh)"
fi
ninja -C "$build" tandem tandem-coordinator tandem-worker ||
    fail "the build failed; the compiler's words stand above"

echo "demo: starting a coordinator, a target on one rank and its draft on another"
serve pair --draft "$models/llama-tale-draft" --mode pearl --target-ranks 1 --draft-ranks 1
grep 'worker\.r0\.0' "$work/pair.log" || true

echo
echo "demo: \"$prompt\""
echo "demo: in mode pearl; faint is what the draft wrote and the target accepted"
echo
tell pearl pearl
again pearl pearl 2
draft_waits=$(waits draft)
target_waits=$(waits target)

echo
echo "demo: the same prompt and seed on the same server, by the target alone"
echo
tell plain off
again plain off 2
echo
"$build/bin/tandem" status --server "127.0.0.1:$grpc"
stop

echo
echo "demo: the same by a server without a draft, the target on both ranks (text not shown again)"
serve both --target-ranks 2
again both off 1
stop

echo
echo "demo: all texts are identical, byte for byte ($runs runs of each)"
echo
row "" "tokens/s" "acceptance length" "draft waits" "target waits"
row "pearl, target 1 + draft 1 rank" "$(median pearl "$speed")" "$(median pearl "$length")" \
    "$draft_waits" "$target_waits"
row "plain, target 1 rank, draft idle" "$(median plain "$speed")" - - -
row "plain, target 2 ranks" "$(median both "$speed")" - - -
echo
echo "demo: speeds are medians, after the first token; waits are of one run on average"
echo "demo: done, everything is stopped"
