"""The plan and the policy against the real programs: what is served, how it changes while it serves, and
what is refused in which words."""
import json
import pathlib
import shutil
import struct
import subprocess
import tempfile
import time
import unittest

from harness import BIN, MODEL, Server, grpc, o

DRAFT = MODEL.with_name("llama-tale-draft")


def tandem(*words):
    done = subprocess.run([BIN / "tandem", *map(str, words)], capture_output=True, text=True,
                          timeout=60)
    return done.returncode, done.stdout, done.stderr


def plan_of(server):
    return server.unary("Operations/GetPlan", o.GetPlanRequest(), o.GetPlanResponse)


def replica_of(server):
    return server.unary("Operations/GetStatus", o.GetStatusRequest(), o.GetStatusResponse).replicas[0]


def set_policy(server, mode, **fields):
    return server.unary("Operations/SetPolicy", o.SetPolicyRequest(mode=mode, **fields),
                        o.SetPolicyResponse).replicas


class Serving:
    """What holds for every placement; `modes` are those that it can run."""

    def refused(self, words, mode, **fields):
        with self.assertRaises(grpc.RpcError) as caught:
            set_policy(self.server, mode, **fields)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn(words, caught.exception.details())

    def test_every_mode_can_be_set_and_gives_the_same_text(self):
        expected = None
        for mode in self.modes:
            replica, = set_policy(self.server, mode, window=3)
            self.assertEqual((replica.id, replica.mode), ("r0", mode))
            ids = self.server.ids(max_tokens=100, seed=3, temperature=0.8)
            expected = expected or ids
            self.assertEqual(ids, expected, mode)
            said = replica_of(self.server)
            self.assertEqual((said.mode, said.window), (mode, 3 if mode != "plain" else 0))
            self.assertEqual(plan_of(self.server).mode, mode)

    def test_modes_change_under_a_running_text(self):
        set_policy(self.server, "plain")
        expected = self.server.ids(max_tokens=600, ignore_eos=True, seed=9)
        stream = self.server.generate(max_tokens=600, ignore_eos=True, seed=9)
        ids, turn = [], 0
        for chunk in stream:
            ids += chunk.token_ids
            if len(ids) // 40 > turn:
                turn = len(ids) // 40
                set_policy(self.server, self.modes[turn % len(self.modes)], window=1 + turn % 8)
        self.assertEqual(ids, expected)
        self.assertGreater(turn, 10)

    def test_what_cannot_run_is_refused_with_what_can(self):
        for mode in {"sd", "easyspec", "pearl", "pearl+lp"} - set(self.modes):
            self.refused("expected one of " + ", ".join(self.modes), mode)
        self.refused('mode is "warp"; expected auto, plain, sd', "warp")
        self.refused("mode is \"\"; expected auto", "")
        self.refused("window is 17; expected at most 16", "sd", window=17)
        self.refused("delay is 3 with a window of at most 3", "plain", window=3, delay=3)
        self.refused("layer_width is 8; the draft was loaded for at most", "sd", layer_width=8)
        self.refused('replica is "r7"; no replica of that name', "plain", replica="r7")

    def test_auto_measures_and_settles(self):
        set_policy(self.server, "auto")
        self.assertEqual(plan_of(self.server).mode, "auto")
        until = time.monotonic() + 60
        policy = None
        while time.monotonic() < until:
            self.server.ids(max_tokens=300, ignore_eos=True, temperature=0)
            policy = plan_of(self.server).replicas[0]
            if policy.phase == "settled" and sum(m.measured > 0 for m in policy.modes) > 1:
                break
        self.assertEqual(policy.phase, "settled", policy)
        by_name = {m.mode: m for m in policy.modes}
        self.assertGreater(by_name["plain"].measured, 0)
        for name in by_name:
            self.assertIn(name, self.modes)

    def test_operators_see_it(self):
        set_policy(self.server, self.modes[-1], window=4)
        self.server.ids(max_tokens=100, ignore_eos=True, temperature=0)
        code, out, _ = tandem("status", "--server", self.server.address)
        self.assertEqual(code, 0)
        for words in (f"mode {self.modes[-1]}, ", "speculation: window 4, ", " acceptance length ",
                      "waited: the draft "):
            self.assertIn(words, out)
        code, out, _ = tandem("status", "--json", "--server", self.server.address)
        said = json.loads(out)["replicas"][0]
        self.assertGreater(said["draft_tokens"], said["accepted_tokens"])
        code, out, _ = tandem("policy", "--server", self.server.address)
        self.assertEqual(code, 0)
        self.assertIn(f"replica r0: {self.modes[-1]}, window 4", out)
        code, out, _ = tandem("policy", "--server", self.server.address, "--mode", "plain")
        self.assertIn("mode plain from the next round on", out)
        code, _, err = tandem("policy", "--server", self.server.address, "--window", "3")
        self.assertEqual((code, err), (2, "tandem policy: --window without --mode; try tandem policy "
                                          "--help\n"))


class Disjoint(Serving, unittest.TestCase):
    modes = ["plain", "sd", "easyspec", "pearl", "pearl+lp"]

    @classmethod
    def setUpClass(cls):
        cls.server = Server("--draft", DRAFT, "--layer-width", "2", ranks=1)
        cls.addClassCleanup(cls.server.stop)

    def test_plan(self):
        plan = plan_of(self.server)
        self.assertEqual([(r.rank, r.role, r.shard, r.degree) for r in plan.ranks],
                         [(0, "target", 0, 1), (1, "draft", 0, 1)])
        self.assertEqual((plan.split, plan.drafter, plan.draft), ("disjoint", "model", DRAFT.name))
        self.assertEqual((plan.target_degree, plan.draft_degree), (1, 1))
        self.assertEqual((plan.max_window, plan.max_layer_width, plan.sampling_rule),
                         (16, 2, "coupled"))
        speeds = [c.tokens_per_second for c in plan.candidates if c.fits]
        self.assertEqual(speeds, sorted(speeds, reverse=True))
        self.assertIn("plain", [c.mode for c in plan.candidates])
        self.assertEqual(sum(c.served for c in plan.candidates), 1)
        self.assertIn(" wins: ", plan.reason)
        self.assertEqual([r.role for r in replica_of(self.server).ranks], ["target", "draft"])
        self.assertGreater(replica_of(self.server).handoff_latency_us, 0)
        self.assertEqual(replica_of(self.server).link_gigabytes_per_second, 0)


class Shared(Serving, unittest.TestCase):
    modes = ["plain", "sd", "easyspec"]

    @classmethod
    def setUpClass(cls):
        cls.server = Server("--draft", DRAFT, "--mode", "easyspec", "--draft-ranks", "2",
                            "--layer-width", "2", ranks=2)
        cls.addClassCleanup(cls.server.stop)

    def test_plan(self):
        plan = plan_of(self.server)
        self.assertEqual([(r.rank, r.role, r.shard, r.degree) for r in plan.ranks],
                         [(0, "target", 0, 2), (1, "target", 1, 2),
                          (0, "draft", 0, 2), (1, "draft", 1, 2)])
        self.assertEqual(plan.split, "shared")
        roles = [r.role for r in replica_of(self.server).ranks]
        self.assertEqual(roles, ["target+draft", "target+draft"])


class LookUp(unittest.TestCase):
    def test_a_target_alone_speculates(self):
        server = Server("--draft", "ngram", ranks=1)
        try:
            plan = plan_of(server)
            self.assertEqual((plan.split, plan.drafter, len(plan.ranks)), ("alone", "ngram", 1))
            set_policy(server, "plain")
            text = b"one two three four five six seven eight one two three four"
            expected = server.ids(text, max_tokens=80, ignore_eos=True, temperature=0)
            set_policy(server, "sd", window=5)
            ids = server.ids(text, max_tokens=80, ignore_eos=True, temperature=0)
            self.assertEqual(ids, expected)
            self.assertGreater(replica_of(server).draft_tokens, 0)
            with self.assertRaises(grpc.RpcError) as caught:
                set_policy(server, "pearl")
            self.assertIn("the drafter is ngram", caught.exception.details())
        finally:
            self.assertEqual(server.stop(), 0)


class UselessDraft(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name, "draft")
        shutil.copytree(DRAFT, self.folder)

    def forget(self):
        """All weights become zero: the draft proposes the same token always."""
        path = self.folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        begin = 8 + struct.unpack("<Q", data[:8])[0]
        data[begin:] = bytes(len(data) - begin)
        path.write_bytes(data)

    def test_auto_settles_in_plain(self):
        self.forget()
        server = Server("--draft", self.folder, ranks=1)
        try:
            until = time.monotonic() + 60
            policy = None
            while time.monotonic() < until:
                server.ids(max_tokens=300, ignore_eos=True)
                policy = plan_of(server).replicas[0]
                if (policy.phase, policy.mode) == ("settled", "plain"):
                    break
            self.assertEqual((policy.phase, policy.mode), ("settled", "plain"))
            self.assertEqual(replica_of(server).mode, "plain")
        finally:
            self.assertEqual(server.stop(), 0)

    def serve(self, *options):
        code, _, err = tandem("serve", "--model", MODEL, "--port", "0", "--http-port", "0",
                              "--draft", self.folder, *options)
        self.assertEqual(code, 1)
        return err

    def edit(self, name, change):
        path = self.folder / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def test_a_shorter_context_is_refused(self):
        self.edit("config.json", lambda c: c.update(max_position_embeddings=256))
        self.assertIn("has a context of 256 tokens, 1024 are to be served", self.serve())

    def test_another_tokenizer_is_refused(self):
        def rename(content):
            for token in content["added_tokens"]:
                if token["id"] == 4088:
                    token["content"] = "<begin>"
        self.edit("tokenizer.json", rename)
        self.assertIn("has another tokenizer than", self.serve())

    def test_ranks_that_do_not_work_are_refused(self):
        self.assertIn("cannot share the target's 1", self.serve("--mode", "sd", "--draft-ranks", "2"))
        self.assertIn("expected 2 (shared) or 3 (disjoint)",
                      self.serve("--target-ranks", "2", "--draft-ranks", "1", "--ranks", "4"))


class Plan(unittest.TestCase):
    def test_table(self):
        with tempfile.TemporaryDirectory() as folder:
            config = pathlib.Path(folder, "pair.yaml")
            config.write_text(f"model: {MODEL}\ndraft: {DRAFT}\nranks: 4\nacceptance: 0.8\n"
                              "bandwidth: 100\n")
            code, out, err = tandem("plan", "--config", config)
        self.assertEqual((code, err), (0, ""))
        self.assertIn("Assumed of each rank: 100 GB/s", out)
        self.assertIn("acceptance 0.8", out)
        rows = [line[2:].split() for line in out.splitlines() if line.endswith(" yes")]
        self.assertGreater(len(rows), 15)
        self.assertLessEqual({"plain", "sd", "easyspec", "pearl", "pearl+lp"},
                             {row[0] for row in rows})
        speeds = [float(row[9]) for row in rows]
        self.assertEqual(speeds, sorted(speeds, reverse=True))
        self.assertIn(f"{rows[0][0]} ", out[out.index("* served."):])

    def test_what_does_not_fit_says_why(self):
        code, out, err = tandem("plan", "--model", MODEL, "--draft", DRAFT, "--ranks", "2", "--memory",
                                "20m")
        self.assertEqual(code, 1)
        self.assertIn("no: rank 0 has 20.0 MiB, of which 2.0 stay free, and needs ", out)
        self.assertIn("placements fits; the smallest, ", err)

    def test_bad_input(self):
        for words, expected in ((("--draft", DRAFT, "--mode", "pearl", "--ranks", "1"), "no placement"),
                                (("--mode", "sd"), "mode sd needs a drafter"),
                                (("--draft", "/nowhere"), "--draft /nowhere: No such file"),
                                (("--draft", DRAFT, "--layer-width", "3"), "--layer-width is \"3\""),
                                (("--window", "0"), "--window is \"0\""),
                                (("--acceptance", "2"), "--acceptance is \"2\"")):
            code, _, err = tandem("plan", "--model", MODEL, *words)
            self.assertNotEqual(code, 0)
            self.assertIn(expected, err)
        code, _, err = tandem("plan")
        self.assertEqual((code, err), (2, "tandem plan: --model DIR is missing\n"))


if __name__ == "__main__":
    unittest.main()
