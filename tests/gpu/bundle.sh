#!/bin/bash
# Packs what tests/gpu/run.sh needs for a machine that has a driver but none of the libraries:
#
#   tests/gpu/bundle.sh BUILD OUT      BUILD: a build folder (tests/run.sh makes build/), OUT: a folder
#
# Binaries, modules, and the shared libraries they are linked to, but for the C library's own and
# NVIDIA's driver.
set -euo pipefail

[ $# -eq 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
build=$1 out=$2
mkdir -p "$out/lib"
cp "$build"/bin/{gpu_check,tandem-bench,tandem-cuda.so} "$build/tests/lossless_suite" "$out/"
for file in "$out"/gpu_check "$out"/tandem-bench "$out"/lossless_suite; do
    strip "$file"
done
ldd "$out"/gpu_check "$out"/tandem-bench "$out"/lossless_suite |
    awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u |
    grep -vE '/(libc|libm|libdl|libpthread|librt|ld-linux[^/]*|libcuda)\.so' |
    while read -r library; do cp -L "$library" "$out/lib/"; done
# Every library that is found in the bundle, none that is missing.
LD_LIBRARY_PATH="$out/lib" ldd "$out/tandem-bench" | { ! grep 'not found'; }
echo "$out: $(du -sh "$out" | cut -f1)"
