"""What breaks is said in words, at once, and nothing hangs: lost ranks, wrong plans, bad folders."""
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

from harness import BIN, MODEL, Server, g, grpc, o
from grpc_health_v1 import health

DRAFT = MODEL.parent / "llama-tale-draft"


def serve(*options, timeout=60):
    """Runs tandem serve until it ends by itself; (exit status, what it said)."""
    if "--port" not in options:
        options += ("--port", "0")
    done = subprocess.run([BIN / "tandem", "serve", "--http-port", "0", *options],
                          capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


class LostRank(unittest.TestCase):
    def check_lost(self, rank_i, *options, ranks=2):
        server = Server(*options, ranks=ranks)
        try:
            before = server.ids(max_tokens=30, seed=8)
            call = server.generate(ignore_eos=True, max_tokens=900)
            next(call)
            check, watch, _ = health(server.channel)
            states = watch("")
            self.assertEqual(next(states), "SERVING")
            start = time.monotonic()
            os.kill(server.worker_pids()[rank_i], signal.SIGKILL)
            with self.assertRaises(grpc.RpcError) as caught:
                list(call)
            self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)
            self.assertIn("lost", caught.exception.details())
            self.assertLess(time.monotonic() - start, 10)
            self.assertEqual(next(states), "NOT_SERVING")
            self.assertIn("lost", server.log())
            # The supervisor brings the replica back; the same seed gives the same text.
            until = time.monotonic() + 60
            while check("") != "SERVING":
                self.assertLess(time.monotonic(), until)
                time.sleep(0.05)
            self.assertEqual(server.ids(max_tokens=30, seed=8), before)
        finally:
            self.assertEqual(server.stop(), 0)

    def test_leader_killed(self):
        self.check_lost(0)

    def test_follower_killed(self):
        self.check_lost(1)

    def check_lost_of_pearl(self, rank_i):
        """Ranks 0 and 1 hold the target, 2 and 3 the draft; both compute when one dies."""
        self.check_lost(rank_i, "--draft", str(DRAFT), "--mode", "pearl", "--draft-ranks", "2")

    def test_target_leader_killed_in_pearl(self):
        self.check_lost_of_pearl(0)

    def test_target_follower_killed_in_pearl(self):
        self.check_lost_of_pearl(1)

    def test_draft_leader_killed_in_pearl(self):
        self.check_lost_of_pearl(2)

    def test_draft_follower_killed_in_pearl(self):
        self.check_lost_of_pearl(3)


class Refused(unittest.TestCase):
    def check(self, words, *options, code=1):
        seen, said = serve(*options)
        self.assertEqual(seen, code, said)
        for word in words:
            self.assertIn(word, said)

    def test_port_in_use(self):
        server = Server(ranks=1)
        try:
            port = server.address.rsplit(":", 1)[1]
            seen, said = serve("--model", str(MODEL), "--port", port)
            self.assertNotEqual(seen, 0)
            self.assertIn(port, said)
            self.assertEqual(len(server.ids(max_tokens=3, ignore_eos=True)), 3)
        finally:
            server.stop()

    def test_degree_that_does_not_exist(self):
        seen, said = serve("--model", str(MODEL), "--target-ranks", "3")
        self.assertNotEqual(seen, 0)
        self.assertIn("3", said)

    def test_wrong_world_size(self):
        """A replica of another size than the coordinator expects is refused in words."""
        with tempfile.TemporaryDirectory() as folder:
            ports = pathlib.Path(folder, "ports.json")
            coordinator = subprocess.Popen(
                [BIN / "tandem-coordinator", "--model", MODEL, "--target-ranks", "2", "--port", "0",
                 "--http-port", "0", "--ports-file", ports], stderr=subprocess.DEVNULL)
            try:
                until = time.monotonic() + 20
                while not ports.exists() and time.monotonic() < until:
                    time.sleep(0.02)
                import json
                port = json.loads(ports.read_text())["grpc_port"]
                worker = subprocess.run(
                    ["mpirun", "-n", "1", "--bind-to", "none", BIN / "tandem-worker",
                     "--coordinator", f"127.0.0.1:{port}"], capture_output=True, text=True,
                    timeout=60, env={**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1",
                                     "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
                self.assertNotEqual(worker.returncode, 0)
                self.assertIn("refused", worker.stdout + worker.stderr)
            finally:
                coordinator.terminate()
                self.assertEqual(coordinator.wait(20), 0)

    def test_no_model(self):
        self.check(["/no/such/folder"], "--model", "/no/such/folder")

    def test_broken_checkpoint_is_refused_before_serving(self):
        with tempfile.TemporaryDirectory() as folder:
            broken = pathlib.Path(folder, "model")
            shutil.copytree(MODEL, broken)
            weights = broken / "model.safetensors"
            weights.chmod(0o644)
            with open(weights, "r+b") as file:
                file.truncate(1_000_000)
            self.check(["model.safetensors"], "--model", str(broken))

    def test_unknown_option(self):
        seen, said = serve("--model", str(MODEL), "--draught", "x")
        self.assertEqual(seen, 2)
        self.assertIn("draught", said)

    def test_memory_that_does_not_suffice(self):
        self.check(["KV", "--kv-budget"], "--model", str(MODEL), "--kv-budget", "100k")


class OtherWeights(unittest.TestCase):
    def test_int8_serves_and_keeps_the_promise(self):
        seen = {}
        for ranks in (1, 2):
            server = Server("--weights", "int8", ranks=ranks)
            try:
                seen[ranks] = server.ids(max_tokens=40, seed=12)
                model = server.unary("Generation/GetModel", g.GetModelRequest(),
                                     g.GetModelResponse)
                self.assertEqual(model.weights, "int8")
            finally:
                server.stop()
        self.assertEqual(seen[1], seen[2])

    def test_little_memory_preempts_and_changes_no_token(self):
        roomy, tight = {}, {}
        for budget, seen in (("64m", roomy), ("600k", tight)):
            server = Server("--kv-budget", budget, "--max-context", "256", ranks=2)
            try:
                calls = {s: server.generate(b"Once upon a time", seed=s, max_tokens=120,
                                            ignore_eos=True) for s in range(12)}
                for seed, call in calls.items():
                    seen[seed] = [i for c in call for i in c.token_ids]
                if seen is tight:
                    import urllib.request
                    url = f"http://127.0.0.1:{server.http}/metrics"
                    with urllib.request.urlopen(url) as answer:
                        lines = answer.read().decode().splitlines()
                    preempted = [line for line in lines
                                 if line.startswith("tandem_num_preemptions_total")]
                    self.assertGreater(float(preempted[0].split()[-1]), 0)
            finally:
                server.stop()
        self.assertEqual(roomy, tight)


class Commands(unittest.TestCase):
    def test_generate_json_and_status(self):
        import json
        server = Server(ranks=1)
        try:
            done = subprocess.run([BIN / "tandem", "generate", "--server", server.address,
                                   "--prompt", "Once upon a time", "--max-tokens", "12", "--seed",
                                   "5", "--json"], capture_output=True, text=True, timeout=60)
            self.assertEqual(done.returncode, 0, done.stderr)
            events = [json.loads(line) for line in done.stdout.splitlines()]
            last = events[-1]
            self.assertTrue(last["done"])
            self.assertEqual((len(last["token_ids"]), last["finish_reason"], last["seed"]),
                             (12, "length", 5))
            for field in ("text", "usage", "timing", "speculation"):
                self.assertIn(field, last)
            status = subprocess.run([BIN / "tandem", "status", "--server", server.address,
                                     "--json"], capture_output=True, text=True, timeout=60)
            self.assertEqual(json.loads(status.stdout)["replicas"][0]["state"], "serving")
            stream = subprocess.Popen([BIN / "tandem", "generate", "--server", server.address,
                                       "--prompt", "x", "--ignore-eos", "--max-tokens", "900"],
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            stream.stdout.read(1)
            stream.send_signal(signal.SIGINT)
            stream.communicate(timeout=20)
            self.assertEqual(stream.returncode, 130)
            until = time.monotonic() + 5
            while True:
                replica = server.unary("Operations/GetStatus", o.GetStatusRequest(),
                                       o.GetStatusResponse).replicas[0]
                if replica.running == 0:
                    break
                self.assertLess(time.monotonic(), until)
        finally:
            server.stop()

    def test_config_file(self):
        with tempfile.TemporaryDirectory() as folder:
            config = pathlib.Path(folder, "serve.yaml")
            config.write_text(f"model: {MODEL}\nweights: int8\nmax-sequences: 4\n")
            server = Server("--config", str(config), model=None, ranks=1)
            try:
                model = server.unary("Generation/GetModel", g.GetModelRequest(),
                                     g.GetModelResponse)
                self.assertEqual(model.weights, "int8")
            finally:
                server.stop()
            config.write_text(f"model: {MODEL}\nwieghts: int8\n")
            code, said = serve("--config", str(config))
            self.assertEqual(code, 2)
            self.assertIn("serve.yaml:2", said)
            self.assertIn("wieghts", said)

    def test_help_names_every_command(self):
        done = subprocess.run([BIN / "tandem", "--help"], capture_output=True, text=True)
        for command in ("serve", "generate", "status", "tokenize"):
            self.assertIn(command, done.stdout)
            each = subprocess.run([BIN / "tandem", "help", command], capture_output=True, text=True)
            self.assertEqual(each.returncode, 0)
            self.assertIn("--", each.stdout)

    def test_no_server(self):
        done = subprocess.run([BIN / "tandem", "generate", "--server", "127.0.0.1:1", "--prompt",
                               "x"], capture_output=True, text=True, timeout=60)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("127.0.0.1:1", done.stderr)


if __name__ == "__main__":
    unittest.main()
