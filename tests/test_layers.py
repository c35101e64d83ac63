#!/usr/bin/env python3
"""The layer check can fail: each kind of violation, planted alone in a small tree, is found."""
import pathlib
import subprocess
import sys
import tempfile
import unittest

CHECK = pathlib.Path(__file__).with_name("layers.py")
CLEAN = {
    "common/error.h": "#pragma once\n#include <stddef.h>\n",
    "model/config.c": '#include "common/error.h"\n#include <fcntl.h>\n',
    "proto/rpc.c": '#include <grpc/grpc.h>\n#include <protobuf-c/protobuf-c.h>\n',
    "kernels/cpu/linear.c": "#include <immintrin.h>\n",
    "worker/comm/comm_mpi.c": '#include <mpi.h>\n#include "worker/comm/comm_internal.h"\n',
    "worker/comm/comm_nccl.c": '#include <nccl.h>\n#include "worker/comm/comm_device_module.h"\n',
    "worker/comm/comm_device.c": "#include <dlfcn.h>\n",
    "worker/scheduler.c": '#include "worker/scheduler.h"\n#include <string.h>\n',
    "coordinator/api.c": '#include "proto/rpc.h"\n#include "grpc/health/v1/health.pb-c.h"\n',
    "coordinator/journal.c": "#include <sqlite3.h>\n",
    "bench/main.c": '#include "worker/engine.h"\n#include "coordinator/router.h"\n',
}
PLANTED = [
    ("common/error.c", '#include "model/config.h"'),
    ("model/config.h", '#include "kernels/backend.h"'),
    ("model/shard.h", '#include "worker/engine.h"'),
    ("kernels/backend.h", '#include "model/config.h"'),
    ("proto/rpc.h", '#include "client/serve.h"'),
    ("worker/link.c", '#include "coordinator/fleet.h"'),
    ("coordinator/fleet.c", '#include "worker/engine.h"'),
    ("coordinator/fleet.h", '#include "kernels/backend.h"'),
    ("client/serve.c", '#include "coordinator/coordinator.h"'),
    ("worker/engine.c", '#include "tests/unit/test.h"'),
    ("worker/engine.c", '#include "bench/engine.h"'),
    ("worker/link.c", "#include <grpc/grpc.h>"),
    ("client/status.c", "  #  include <grpc/support/log.h>"),
    ("coordinator/api.c", "#include <protobuf-c/protobuf-c.h>"),
    ("worker/replica.c", "#include <mpi.h>"),
    ("worker/replica.c", "#include <nccl.h>"),
    ("worker/comm/comm_nccl.h", "#include <nccl.h>"),
    ("worker/comm/comm_device.c", "#include <nccl_device.h>"),
    ("worker/comm/comm_mpi.c", "#include <nccl.h>"),
    ("worker/comm/comm_device.h", "#include <cuda_runtime.h>"),
    ("worker/transformer.c", '#include "worker/comm/comm_internal.h"'),
    ("worker/replica.c", '#include "worker/comm/comm_device_module.h"'),
    ("worker/replica.c", "#include <dlfcn.h>"),
    ("coordinator/session.c", "#include <sqlite3.h>"),
    ("worker/transformer.c", "#include <immintrin.h>"),
    ("model/rope.c", "#include <emmintrin.h>"),
    ("worker/engine.c", "#include <cuda_runtime.h>"),
    ("worker/scheduler.c", '#include "common/clock.h"'),
    ("worker/kv_blocks.c", "#include <sys/random.h>"),
    ("worker/spec/round.c", "#include <time.h>"),
    ("coordinator/admission.c", "#include <sys/socket.h>"),
    ("coordinator/router.c", "#include <fcntl.h>"),
]


def check(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = pathlib.Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return subprocess.run([sys.executable, CHECK, folder], capture_output=True, text=True)


class LayerCheck(unittest.TestCase):
    def test_a_clean_tree_passes(self):
        result = check(CLEAN)
        self.assertEqual(result.returncode, 0, result.stdout)

    def test_each_planted_violation_is_found(self):
        for name, line in PLANTED:
            with self.subTest(file=name, line=line):
                result = check({**CLEAN, name: "/* planted */\n" + line + "\n"})
                self.assertEqual(result.returncode, 1, result.stdout)
                self.assertIn(f"{name}:2: includes", result.stdout)
                self.assertIn("1 violations", result.stdout)

    def test_an_empty_tree_is_no_success(self):
        self.assertNotEqual(check({"README": ""}).returncode, 0)


if __name__ == "__main__":
    unittest.main()
