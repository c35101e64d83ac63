"""Starts the real programs on free ports and calls them through grpcio, with stubs made from the
.proto files by protoc. Only processes started here are ended, by their id."""
import json
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets/models/llama-tale-target"
BIN = pathlib.Path(sys.argv.pop(1) if len(sys.argv) > 1 else ROOT / "build/bin").resolve()
_stubs = tempfile.TemporaryDirectory()
subprocess.run(["protoc", f"--proto_path={ROOT}/proto", f"--python_out={_stubs.name}",
                *(f"tandem/v1/{name}.proto" for name in ("generation", "operations")),
                "grpc/health/v1/health.proto"], check=True)
STUBS = _stubs.name
sys.path.insert(0, STUBS)
import grpc  # noqa: E402
from tandem.v1 import generation_pb2 as g, operations_pb2 as o  # noqa: E402, F401


class Server:
    def __init__(self, *options, model=MODEL, ranks=2):
        self.channel = None
        self.folder = tempfile.TemporaryDirectory()
        ready = pathlib.Path(self.folder.name, "ready.json")
        self.log_path = pathlib.Path(self.folder.name, "log")
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                [BIN / "tandem", "serve", *(("--model", model) if model else ()), "--target-ranks",
                 str(ranks), "--port", "0", "--http-port", "0", "--ready-file", ready, *options],
                stdout=log, stderr=subprocess.STDOUT)
        until = time.monotonic() + 60
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                log = self.log()
                self.stop()
                raise RuntimeError("not ready:\n" + log)
            time.sleep(0.02)
        ports = json.loads(ready.read_text())
        self.address, self.http = f"127.0.0.1:{ports['grpc_port']}", ports["http_port"]
        self.channel = grpc.insecure_channel(self.address)

    def unary(self, path, request, response):
        return self.channel.unary_unary("/tandem.v1." + path, type(request).SerializeToString,
                                        response.FromString)(request, timeout=30)

    def generate(self, text=b"Once upon a time", timeout=120, **sampling):
        request = g.GenerateRequest(text=text, sampling=g.SamplingParams(**sampling))
        call = self.channel.unary_stream("/tandem.v1.Generation/Generate",
                                         g.GenerateRequest.SerializeToString,
                                         g.GenerateChunk.FromString)
        return call(request, timeout=timeout)

    def ids(self, *args, **sampling):
        return [i for chunk in self.generate(*args, **sampling) for i in chunk.token_ids]

    def stop(self):
        self.process.terminate()
        code = self.process.wait(30)
        if self.channel is not None:
            self.channel.close()
        self.folder.cleanup()
        return code

    def log(self):
        return self.log_path.read_text()

    def worker_pids(self):
        """The ranks under this server, found by their parent's parent."""
        found = []
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
            except OSError:
                continue
            if "(tandem-worker)" in text and self._is_below(int(stat.parent.name)):
                found.append(int(stat.parent.name))
        return sorted(found)

    def _is_below(self, pid):
        while pid > 1:
            if pid == self.process.pid:
                return True
            try:
                pid = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                return False
        return False
