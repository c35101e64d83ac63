#!/usr/bin/env python3
"""Hugging Face transformers' generate on the same weights, one request, greedy: tokens per second beside
tandem-bench engine's. Needs torch with a GPU and transformers.

    tests/gpu/transformers_generate.py MODEL [--tokens N] [--passes N] [--csv FILE]
"""
import argparse
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model")
parser.add_argument("--tokens", type=int, default=96)
parser.add_argument("--passes", type=int, default=3)
parser.add_argument("--csv")
arguments = parser.parse_args()

import torch  # noqa: E402
import transformers  # noqa: E402

if not torch.cuda.is_available():
    raise SystemExit("transformers_generate: torch sees no GPU")
model = transformers.AutoModelForCausalLM.from_pretrained(
    arguments.model, dtype=torch.bfloat16).to("cuda").eval()
prompt = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]], device="cuda")
options = dict(do_sample=False, max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens,
               pad_token_id=0, attention_mask=torch.ones_like(prompt))
rates = []
with torch.inference_mode():
    model.generate(prompt, **options)
    for _ in range(arguments.passes):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(prompt, **options)
        torch.cuda.synchronize()
        rates.append((out.shape[1] - prompt.shape[1]) / (time.perf_counter() - start))
what = f"transformers {transformers.__version__} generate, bf16, {torch.cuda.get_device_name()}"
print(f"  {what}: {statistics.median(rates):.1f} tokens/s, median of {arguments.passes}")
if arguments.csv:
    with open(arguments.csv, "a") as file:
        file.write(f"\"{what}\",{statistics.median(rates):g},1/s,\n")
