#!/bin/sh
# Builds every fuzz_*.c here with clang's libFuzzer, AddressSanitizer and UBSan, and makes a seed
# corpus for each from the fixtures:
#
#   tests/fuzz/build.sh BUILD_DIR
#   BUILD_DIR/fuzz_config -max_total_time=60 BUILD_DIR/corpus/fuzz_config
set -eu

if [ $# -ne 1 ]; then
    echo "usage: tests/fuzz/build.sh BUILD_DIR" >&2
    exit 2
fi
build=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
if ! command -v clang >/dev/null; then
    echo "tests/fuzz/build.sh: clang is missing; install the packages clang and libclang-rt-dev" >&2
    exit 1
fi
mkdir -p "$build/objects" "$build/corpus"

packages="jansson libpcre2-8 libutf8proc libxxhash yaml-0.1"
flags="-std=gnu17 -D_GNU_SOURCE -g -O1 -fno-omit-frame-pointer -ffp-contract=off -I$root"
flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=undefined"
flags="$flags $(pkg-config --cflags $packages)"

compile_sources() {
    for source in "$root"/model/*.c "$root"/common/*.c; do
        object="$build/objects/$(basename "$(dirname "$source")")_$(basename "$source" .c).o"
        clang $flags -fsanitize=fuzzer-no-link -c "$source" -o "$object"
    done
}

link_fuzzers() {
    for source in "$root"/tests/fuzz/fuzz_*.c; do
        name=$(basename "$source" .c)
        clang $flags -fsanitize=fuzzer "$source" "$build"/objects/*.o \
            $(pkg-config --libs $packages) -lpthread -lm -o "$build/$name"
        echo "built $build/$name"
    done
}

# copy_seeds CORPUS FILE...: each file under a name of its own; what does not exist is left out.
copy_seeds() {
    corpus="$build/corpus/$1"
    shift
    mkdir -p "$corpus"
    number=0
    for file in "$@"; do
        number=$((number + 1))
        if [ -f "$file" ]; then cp "$file" "$corpus/seed_$number"; fi
    done
}

# A config.json and its generation_config.json behind a NUL byte.
make_config_seeds() {
    copy_seeds fuzz_config "$root"/tests/fixtures/checkpoints/*/config.json
    for dir in "$root"/tests/fixtures/checkpoints/*/; do
        seed="$build/corpus/fuzz_config/pair_$(basename "$dir")"
        cat "$dir/config.json" >"$seed"
        printf '\000' >>"$seed"
        cat "$dir/generation_config.json" >>"$seed"
    done
}

# One small file with two tensors: mutations reach every field of it soon.
make_safetensors_seed() {
    header='{"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},'
    header="$header"'"b":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}'
    seed="$build/corpus/fuzz_safetensors/small"
    printf "\\$(printf %03o ${#header})\\0\\0\\0\\0\\0\\0\\0%sDATADATA" "$header" >"$seed"
}

rm -f "$build"/objects/*.o
compile_sources
link_fuzzers
make_config_seeds
copy_seeds fuzz_safetensors "$root"/tests/fixtures/checkpoints/*/*.safetensors
make_safetensors_seed
copy_seeds fuzz_tokenizer "$root"/assets/models/*/tokenizer.json
