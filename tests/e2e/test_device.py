"""What computes: the CUDA backend on the emulated device, with target and draft as threads of one
process, gives one text in every mode; a device that is not there is said in one sentence."""
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

from harness import BIN, MODEL, Server, o

DRAFT = MODEL.with_name("llama-tale-draft")
SAMPLING = dict(temperature=0.8, seed=11, max_tokens=14, ignore_eos=True)


@unittest.skipUnless((BIN / "tandem-cuda-emulated.so").exists(),
                     "the emulated device is not built here: x86-64 only")
class Emulated(unittest.TestCase):
    """The small model is target and draft: its kernels run hundreds of times slower here."""

    def serve(self, *options):
        server = Server("--draft", DRAFT, "--draft-ranks", "1", "--device", "emulated",
                        "--kv-budget", "64m", "--max-sequences", "4", *options, model=DRAFT, ranks=1)
        self.addCleanup(server.stop)
        return server

    def texts(self, server, modes):
        from test_speculation import ask
        return {mode: ask(server, mode, 3, **SAMPLING)[0] for mode in modes}

    def test_pearl_on_one_device(self):
        server = self.serve("--mode", "pearl")
        texts = self.texts(server, ["off", "pearl"])
        self.assertEqual(len(texts["off"]), SAMPLING["max_tokens"])
        self.assertEqual(texts["pearl"], texts["off"])
        self.assertEqual(len(server.worker_pids()), 1, "ranks of one device are one process")
        status = server.unary("Operations/GetStatus", o.GetStatusRequest(), o.GetStatusResponse)
        devices = {rank.device for replica in status.replicas for rank in replica.ranks}
        self.assertEqual(devices, {"emulated"})

    def test_shared_modes_in_fp8(self):
        server = self.serve("--mode", "sd", "--ranks", "1", "--weights", "fp8")
        texts = self.texts(server, ["off", "sd"])
        self.assertEqual(texts["sd"], texts["off"])


class NoDevice(unittest.TestCase):
    def worker(self, *options):
        return subprocess.run([BIN / "tandem-worker", "--coordinator", "127.0.0.1:1", *options],
                              capture_output=True, text=True, timeout=60)

    @unittest.skipIf(os.path.exists("/dev/nvidia0"), "there is a GPU here")
    def test_a_forced_gpu_that_is_not_there(self):
        done = self.worker("--local-ranks", "1", "--device", "cuda:0")
        self.assertEqual(done.returncode, 1)
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertIn("no CUDA device here", lines[0])

    @unittest.skipIf(os.path.exists("/dev/nvidia0"), "there is a GPU here")
    def test_what_is_listed(self):
        done = subprocess.run([BIN / "tandem-worker", "--list-devices"], capture_output=True, text=True,
                              timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = done.stdout.splitlines()
        self.assertRegex(lines[0], r"^cpu \((amx|avx512|avx2|portable)\) +\d+\.\d GiB free$")
        self.assertFalse([line for line in lines if line.startswith("cuda")])

    def started_worker(self, listed, *options):
        """What `tandem serve` starts beside a worker that lists `listed`: its arguments."""
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for name in ("tandem", "tandem-coordinator"):
                shutil.copy(BIN / name, folder)
            worker = folder / "tandem-worker"
            worker.write_text('#!/bin/sh\nif [ "$1" = --list-devices ]; then echo "%s"; exit; fi\n'
                              'echo "$@" >> "%s/told"\nexit 1\n' % (listed, folder))
            worker.chmod(0o755)
            subprocess.run([folder / "tandem", "serve", "--model", DRAFT, "--port", "0", "--http-port", "0",
                            *options], capture_output=True, text=True, timeout=60)
            return (folder / "told").read_text()

    def test_auto_starts_devices_as_one_process(self):
        self.assertIn("--local-ranks 1 --device auto", self.started_worker("cuda:0 (9.0)"))
        self.assertNotIn("--local-ranks", self.started_worker("cuda:0 (9.0)", "--isa", "portable"))
        self.assertNotIn("--local-ranks", self.started_worker("cpu (avx2)"))
        self.assertNotIn("--local-ranks", self.started_worker("cuda:0 (9.0)", "--device", "cpu"))

    def test_a_name_that_is_none(self):
        done = self.worker("--device", "gpu")
        self.assertEqual(done.returncode, 2)
        self.assertIn('--device is "gpu", expected auto, cpu, cuda, cuda:K or emulated', done.stderr)
        done = subprocess.run([BIN / "tandem", "serve", "--model", DRAFT, "--device", "cuda:x"],
                              capture_output=True, text=True, timeout=60)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn('--device is "cuda:x"', done.stderr)


if __name__ == "__main__":
    unittest.main()
