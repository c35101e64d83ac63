#!/usr/bin/env python3
"""The layer check: fails when an include crosses the borders of the house.

    tests/layers.py [ROOT]

Rooms include downwards only: common <- kernels, model, proto <- worker, coordinator, client. Some
headers belong to one file or room. Pure modules see no clock, socket, file or random source.
bench/ and tests/ may include anything.
"""
import pathlib
import re
import sys

ROOMS = {
    "common": {"common"},
    "proto": {"proto", "common"},
    "model": {"model", "common"},
    "kernels": {"kernels", "common"},
    "worker": {"worker", "kernels", "model", "proto", "common"},
    "coordinator": {"coordinator", "model", "proto", "common"},
    "client": {"client", "model", "proto", "common"},
}
# What stands behind these includes may be seen only there: (include, files, what it is).
OWNED = [
    (r"grpc/(?!.*\.pb-c\.h)", r"proto/", "gRPC core"),
    (r"protobuf-c/", r"proto/", "protobuf-c"),
    (r"mpi\.h", r"worker/(comm/comm_mpi\.c|main\.c)", "MPI"),
    (r"nccl\w*\.h", r"worker/comm/comm_nccl\.c", "NCCL"),
    (r"worker/comm/comm_(internal|device_module)\.h", r"worker/comm/", "the makers' inside"),
    (r"dlfcn\.h", r"(kernels/module|worker/comm/comm_device)\.c", "opening modules"),
    (r"sqlite3\.h", r"coordinator/journal\.c", "SQLite"),
    (r"(\w*mmintrin|immintrin|x86intrin|arm_neon|arm_sve)\.h", r"kernels/", "SIMD intrinsics"),
    (r"cuda\w*\.h", r"kernels/cuda/", "CUDA"),
]
# State machines and arithmetic: everything they know is an argument.
PURE = [
    "common/gumbel.h", "common/philox.h", "model/footprint", "model/shard", "model/rope",
    "worker/scheduler", "worker/kv_blocks", "worker/capacity", "worker/spec/",
    "coordinator/admission", "coordinator/router", "coordinator/placement", "coordinator/stream",
    "coordinator/params", "coordinator/fleet", "coordinator/policy", "coordinator/speed_model",
    "coordinator/planner", "coordinator/spec_report", "coordinator/speculation_facts",
]
# Under TILE_EMULATION, which only tests define, the kernel takes its tiles from plain C.
ALLOWED = {("kernels/cpu/tile.h", "tests/reference/tile_emulation.h")}
IMPURE = (r"(common/(clock|log)\.h|time\.h|sys/time\.h|sys/random\.h|sys/socket\.h|netdb\.h"
          r"|netinet/.*|arpa/.*|poll\.h|sys/epoll\.h|fcntl\.h|unistd\.h|sys/stat\.h|sys/mman\.h"
          r"|dirent\.h|pthread\.h|proto/rpc\.h)")
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.M)


def violations_of(name, text):
    room = name.split("/")[0]
    for match in INCLUDE.finditer(text):
        path = match.group(2)
        line = text.count("\n", 0, match.start(2)) + 1
        target = path.split("/")[0]
        words = []
        if target in ROOMS and target not in ROOMS[room] and "/" in path:
            words.append(f"{room}/ may include only {', '.join(sorted(ROOMS[room]))}")
        if target in ("bench", "tests") and (name, path) not in ALLOWED:
            words.append(f"{target}/ is included by nobody")
        for pattern, owner, what in OWNED:
            if re.fullmatch(pattern + (".*" if pattern.endswith(("/", ")")) else ""), path) \
                    and not re.match(owner, name):
                words.append(f"{what} only in {owner}".replace("\\", ""))
        if any(name.startswith(pure) for pure in PURE) and re.fullmatch(IMPURE, path):
            words.append("a pure module sees no clock, socket, file, thread or random source")
        for word in words:
            yield f"{name}:{line}: includes {path}: {word}"


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent)
    files = sorted(path for room in ROOMS for kind in ("*.c", "*.h", "*.cu", "*.cuh")
                   for path in (root / room).rglob(kind))
    if not files:
        print(f"{root}: no sources found", file=sys.stderr)
        return 2
    found = []
    for path in files:
        found += violations_of(path.relative_to(root).as_posix(),
                               path.read_text(encoding="utf-8"))
    for text in found:
        print(text)
    print(f"layers: {len(files)} files, {len(found)} violations")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
