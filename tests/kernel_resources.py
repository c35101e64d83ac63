#!/usr/bin/env python3
"""Registers, spills and shared memory of every CUDA kernel, by architecture, as ptxas reports them.

    tests/kernel_resources.py [--csv FILE] [ARCH ...]      (80 89 90 and what else nvcc knows)

Fails when a hot kernel spills or keeps arrays on its stack: what runs for every token must not touch
local memory. Without nvcc it says so and succeeds. Needs no GPU.
"""
import argparse
import concurrent.futures
import csv
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What runs many times for every token. Sampling runs once for each; packing of weights at start-up.
HOT = re.compile(r"(product|product_tile|attention|combine|rope_kv_write|rmsnorm|tree_sum|swiglu|embed|take_rows"
                 r"|pack_bf16|pack_i8|gather)_kernel")
FLAGS = ["-std=c++17", "-fmad=false", "-Xptxas", "-v", "-I", str(ROOT), "-c", "-o", "/dev/null"]
COLUMNS = ["arch", "file", "kernel", "registers", "spill_stores", "spill_loads", "stack", "shared"]


def architectures(nvcc):
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in ("80", "89", "90", "100") if f"compute_{arch}" in known]


def demangled(names):
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    out = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    names = [line.replace("(product_format)", "") for line in out.stdout.splitlines()]
    return [re.sub(r"\(.*|^void |^static ", "", name).strip() for name in names]


def report_of(text):
    """ptxas -v: 'Compiling entry function', properties, then 'Used'."""
    rows, row = [], None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            row = {"kernel": match.group(1), "shared": 0}
            rows.append(row)
        elif row is not None and (match := re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            row["stack"], row["spill_stores"], row["spill_loads"] = map(int, match.groups())
        elif row is not None and (match := re.search(r"Used (\d+) registers", line)):
            row["registers"] = int(match.group(1))
            if match := re.search(r"(\d+) bytes smem", line):
                row["shared"] = int(match.group(1))
            row = None
    return rows


def compile_one(nvcc, arch, source):
    run = subprocess.run([nvcc, f"-arch=sm_{arch}", *FLAGS, str(source)], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"{source.name} for {arch}:\n{run.stderr}")
    rows = report_of(run.stderr)
    for row, name in zip(rows, demangled([row["kernel"] for row in rows])):
        row.update(arch=arch, file=source.name, kernel=name)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv")
    parser.add_argument("arch", nargs="*")
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("kernel_resources: no nvcc here, nothing to look at")
        return
    jobs = [(nvcc, arch, source) for arch in arguments.arch or architectures(nvcc)
            for source in sorted((ROOT / "kernels" / "cuda").glob("*.cu"))]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rows = [row for part in pool.map(lambda job: compile_one(*job), jobs) for row in part]
    if not rows:
        sys.exit("kernel_resources: ptxas named no kernel; its report is not understood")
    print(f"{'arch':>5} {'kernel':<58} {'regs':>5} {'spills':>7} {'stack':>6} {'shared':>7}")
    for row in rows:
        spills = row["spill_stores"] + row["spill_loads"]
        print(f"{row['arch']:>5} {row['kernel'][:58]:<58} {row['registers']:>5} {spills:>7} "
              f"{row['stack']:>6} {row['shared']:>7}")
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    bad = [row for row in rows if HOT.search(row["kernel"])
           and row["spill_stores"] + row["spill_loads"] + row["stack"]]
    for row in bad:
        print(f"kernel_resources: {row['kernel']} on sm_{row['arch']}: {row['stack']} bytes of stack, "
              f"{row['spill_stores']} of spills stored, {row['spill_loads']} loaded", file=sys.stderr)
    print(f"kernel_resources: {len(rows)} kernels, {len(bad)} hot ones use local memory")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
