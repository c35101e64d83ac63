#!/bin/sh
# Installs, builds, serves the bundled model on two CPU ranks, streams a story, shows what it took,
# and stops everything it started.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build="$root/build"
work=$(mktemp -d)
server=""

stop() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=""
    fi
    rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "demo: $*" >&2
    exit 1
}

"$root/deploy/install-deps.sh"

echo "demo: building into $build"
if ! cmake -S "$root" -B "$build" -G Ninja >"$work/cmake.log" 2>&1; then
    tail -n 20 "$work/cmake.log" >&2
    fail "the build could not be configured; the reason stands above (removing $build starts afresh)"
fi
ninja -C "$build" tandem tandem-coordinator tandem-worker ||
    fail "the build failed; the compiler's words stand above"

echo "demo: starting a coordinator and two ranks"
"$build/bin/tandem" serve --model "$root/assets/models/llama-tale-target" --target-ranks 2 \
    --port 0 --http-port 0 --ready-file "$work/ready.json" >"$work/serve.log" 2>&1 &
server=$!
waited=0
while [ ! -s "$work/ready.json" ]; do
    kill -0 "$server" 2>/dev/null || {
        cat "$work/serve.log" >&2
        fail "the server ended before it was ready; its words stand above"
    }
    [ "$waited" -lt 1200 ] || {
        cat "$work/serve.log" >&2
        fail "the server was not ready after two minutes; its words stand above"
    }
    sleep 0.1
    waited=$((waited + 1))
done
grep 'worker\.r0\.0' "$work/serve.log" || true
port=$(sed -n 's/.*"grpc_port": *\([0-9]*\).*/\1/p' "$work/ready.json")

echo
echo "demo: tandem generate --chat \"Tell me a story about a fox and a lighthouse.\""
echo
"$build/bin/tandem" generate --server "127.0.0.1:$port" --temperature 0.7 --top-p 0.95 --seed 7 \
    --max-tokens 200 --chat "Tell me a story about a fox and a lighthouse." ||
    fail "the generation failed; the server's words stand above"
echo
"$build/bin/tandem" status --server "127.0.0.1:$port"
stop
echo
echo "demo: done, everything is stopped"
