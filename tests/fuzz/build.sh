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

# Small tokenizers with every piece that is read: byte-level, Metaspace, and Llama 2's kind.
make_tokenizer_seeds() {
    mkdir -p "$build/corpus/fuzz_tokenizer"
    cat >"$build/corpus/fuzz_tokenizer/byte_level" <<'END'
{"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split",
"pattern":{"Regex":"\\p{L}+|\\p{N}{1,3}|\\s+"},"behavior":"Isolated","invert":false},{"type":"Digits",
"individual_digits":true},{"type":"ByteLevel","add_prefix_space":true,"use_regex":true}]},
"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},
{"Sequence":{"id":"A","type_id":0}}],"special_tokens":{"<s>":{"id":"<s>","ids":[4],"tokens":["<s>"]}}},
"decoder":{"type":"ByteLevel"},"added_tokens":[{"id":4,"content":"<s>","special":true,"lstrip":true,
"rstrip":true,"single_word":true,"normalized":false}],"model":{"type":"BPE","ignore_merges":true,
"unk_token":"a","vocab":{"a":0,"b":1,"ab":2,"\u0120":3},"merges":["a b"]}}
END
    cat >"$build/corpus/fuzz_tokenizer/metaspace" <<'END'
{"pre_tokenizer":{"type":"Metaspace","replacement":"\u2581","prepend_scheme":"first","split":true},
"decoder":{"type":"Metaspace","replacement":"\u2581","prepend_scheme":"first"},
"model":{"type":"BPE","fuse_unk":true,"unk_token":"<unk>","byte_fallback":true,"vocab":{"<unk>":0,
"\u2581":1,"a":2,"\u2581a":3,"<0x41>":4,"<0xC3>":5},"merges":[["\u2581","a"]]}}
END
    cat >"$build/corpus/fuzz_tokenizer/sentencepiece" <<'END'
{"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"\u2581"},{"type":"Replace",
"pattern":{"String":" "},"content":"\u2581"},{"type":"NFKD"}]},"decoder":{"type":"Sequence","decoders":[
{"type":"Replace","pattern":{"String":"\u2581"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},
{"type":"Strip","content":" ","start":1,"stop":0}]},"model":{"vocab":{"\u2581":0,"o":1,"n":2,"on":3,
"\u2581on":4},"merges":["o n","\u2581 on"]}}
END
}

# The bundled template, and of every other format what it is recognised by.
make_chat_seeds() {
    copy_seeds fuzz_chat "$root"/assets/models/*/tokenizer_config.json
    number=0
    while IFS= read -r template; do
        number=$((number + 1))
        printf '{"bos_token":"<s>","eos_token":{"content":"</s>"},"chat_template":"%s"}' "$template" \
            >"$build/corpus/fuzz_chat/format_$number"
    done <<'END'
{{ bos_token + '[INST] <<SYS>>\\n' + system_message + '\\n<</SYS>>' }}
{{ bos_token }}{{ '[INST] ' + message['content'] + ' [/INST]' }}{{ ' ' + message + eos_token }}
loop.last and system_message {{ '[INST]' }}{{ '[/INST]' }} trim eos_token + ' '
{{ '<|im_start|>system\nKind.<|im_end|>\n' }}{{ '<|im_start|>assistant\n<think>\n' }}
<|im_start|><|im_end|> content.split('</think>') ns.last_query_index
{{ '<|user|>' + eos_token }}{{ '<|assistant|>' }}
<|start_header_id|><|eot_id|>Cutting Knowledge Date: December 2023 set date_string = \"1 May\"
END
}

rm -f "$build"/objects/*.o
compile_sources
link_fuzzers
make_config_seeds
copy_seeds fuzz_safetensors "$root"/tests/fixtures/checkpoints/*/*.safetensors
make_safetensors_seed
make_tokenizer_seeds
make_chat_seeds
