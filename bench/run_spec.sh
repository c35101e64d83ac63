#!/bin/sh
# Measures speculation as bench/results/ and docs/speculation.md show it: the bundled pair on story prompts, and
# pairs of 200 M random weights of which the draft agrees more and less often. Needs a quiet machine and about
# twenty minutes.
#
#   bench/run_spec.sh PROMPTS OUT      PROMPTS: tale_prompts.jsonl; OUT: folder for spec.csv, spec.txt, plots
set -eu

[ $# -eq 2 ] || { sed -n '2,7p' "$0" | cut -c3- >&2; exit 2; }
prompts=$1
out=$2
root=$(cd "$(dirname "$0")/.." && pwd)
bench="$root/build/bin/tandem-bench"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir -p "$out"
rm -f "$out/spec.csv" "$out/spec.txt"
"$bench" spec --label bundled --model "$root/assets/models/llama-tale-target" \
    --draft "$root/assets/models/llama-tale-draft" --prompts "$prompts" --domain story \
    --n-prompts 6 --tokens 256 --windows 2,3,4,6,8,12 --passes 3 --csv "$out/spec.csv" | tee "$out/spec.txt"
# eps chosen for greedy acceptances near 0.6, 0.75 and 0.9.
for eps in 0.13 0.07 0.03; do
    temperatures=0
    [ "$eps" = 0.07 ] && temperatures=0,1
    "$bench" make-model --out "$work/target" --draft "$work/draft" --vocab 8192 --layers 16 \
        --draft-layers 2 --eps "$eps" >/dev/null
    "$bench" spec --label "200 M, eps $eps" --model "$work/target" --draft "$work/draft" --n-prompts 1 \
        --tokens 256 --temperatures "$temperatures" --windows 4,8 --passes 3 --ignore-eos --quick \
        --csv "$out/spec.csv" | tee -a "$out/spec.txt"
    rm -rf "$work/target" "$work/draft"
done
python3 "$root/bench/plot_spec.py" "$out/spec.csv" "$out"
