#!/bin/sh
# Installs what building, running and testing Tandem needs on Debian 12 or Ubuntu 24.04. Skips what
# is there; a second run only looks.
set -eu

packages="build-essential cmake ninja-build pkg-config
    libgrpc-dev protobuf-compiler libprotobuf-dev libprotobuf-c-dev protobuf-c-compiler
    libopenmpi-dev openmpi-bin openssh-client
    libjansson-dev libpcre2-dev libutf8proc-dev libmicrohttpd-dev libxxhash-dev libyaml-dev
    libcriterion-dev python3 python3-grpcio python3-protobuf
    clang llvm libclang-rt-dev"

# Ends with one sentence.
fail() {
    echo "install-deps: $*" >&2
    exit 1
}

. /etc/os-release 2>/dev/null || fail "this is not Debian 12 or Ubuntu 24.04; install by hand: $packages"
command -v apt-get >/dev/null || fail "there is no apt-get on this system; install by hand: $packages"

installed=$(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' 2>/dev/null | awk '/^ii/ {print $2}')
missing=""
for package in $packages; do
    if ! printf '%s\n' "$installed" | grep -qx -- "$package"; then missing="$missing $package"; fi
done
if [ -z "$missing" ]; then
    echo "install-deps: everything is installed"
    exit 0
fi

as_root=""
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "run this as root or install sudo; missing:$missing"
    as_root="sudo"
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "install-deps: installing$missing"
echo "install-deps: reading the package lists ..."
$as_root apt-get update -q >"$log" 2>&1 || {
    tail -n 5 "$log" >&2
    fail "the package lists could not be read; check the network and /etc/apt, then run this again"
}
echo "install-deps: downloading and unpacking (some minutes on a bare machine) ..."
# shellcheck disable=SC2086
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing \
    >"$log" 2>&1 &
installer=$!
while kill -0 "$installer" 2>/dev/null; do
    sleep 5
    echo "install-deps: $(grep -cE '^(Get:|Setting up|Unpacking)' "$log" || true) steps done"
done
wait "$installer" || {
    tail -n 5 "$log" >&2
    fail "a package could not be installed; the reason stands above, mend it and run this again"
}
echo "install-deps: done"
