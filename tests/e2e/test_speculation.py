"""Speculation as clients and operators see it, against the real programs: marks, reports, metrics,
per-request modes, and what `tandem generate` prints."""
import json
import re
import subprocess
import time
import unittest
import urllib.request

from harness import BIN, MODEL, Server, g, grpc

DRAFT = MODEL.with_name("llama-tale-draft")
PROMPT = "Once upon a time there was a fox who lived near a lighthouse."
FAINT, NORMAL = "\033[2m", "\033[22m"


def ask(server, speculation="", n=0, **sampling):
    """(token ids, marks, [(token text, mark)], text, finish)."""
    call = server.channel.unary_stream("/tandem.v1.Generation/Generate",
                                       g.GenerateRequest.SerializeToString,
                                       g.GenerateChunk.FromString)
    request = g.GenerateRequest(text=PROMPT.encode(), speculation=speculation,
                                num_speculative_tokens=n, sampling=g.SamplingParams(**sampling))
    ids, marks, pieces, text = [], [], [], b""
    for chunk in call(request, timeout=120):
        ids += chunk.token_ids
        marks += chunk.drafted
        starts = [0, *chunk.text_ends]
        pieces += [(chunk.text[a:b], mark) for a, b, mark
                   in zip(starts, chunk.text_ends, chunk.drafted)]
        text += chunk.text
    return ids, marks, pieces, text, chunk.finish


def metrics(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, value in
            (line.rsplit(" ", 1) for line in lines if line.startswith("tandem_"))}


def generate(server, *options):
    done = subprocess.run([BIN / "tandem", "generate", "--server", server.address, "--prompt",
                           PROMPT, *options], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


class Speculation:
    """What holds for every drafter. `modes`: those that the placement can run; `biases` go with
    every request."""
    biases = {}

    def ask(self, speculation="", n=0, **sampling):
        bias = [g.LogitBias(token_id=i, bias=b) for i, b in self.biases.items()]
        return ask(self.server, speculation, n, logit_bias=bias, **sampling)

    def generate(self, *options):
        biases = [part for i, b in self.biases.items() for part in ("--logit-bias", f"{i}={b}")]
        return generate(self.server, *biases, *options)

    def check_report(self, marks, finish):
        report = finish.speculation
        histogram = list(report.acceptance_histogram)
        self.assertEqual(sum(histogram), report.num_spec_steps)
        self.assertEqual(sum(i * n for i, n in enumerate(histogram)), report.num_accepted_tokens)
        self.assertEqual(sum(marks), report.num_accepted_tokens)
        self.assertLessEqual(report.num_accepted_tokens, report.num_draft_tokens)
        if report.num_spec_steps == 0:
            self.assertEqual((report.mode, report.mean_acceptance_length,
                              report.draft_acceptance_rate), ("plain", 0, 0))
            return
        self.assertAlmostEqual(report.mean_acceptance_length,
                               1 + report.num_accepted_tokens / report.num_spec_steps)
        self.assertAlmostEqual(report.draft_acceptance_rate,
                               report.num_accepted_tokens / report.num_draft_tokens)

    def test_every_mode_gives_the_same_text(self):
        for temperature in (0, 1):
            sampling = {"max_tokens": 60, "seed": 5, "temperature": temperature}
            plain, marks, _, text, finish = self.ask("off", **sampling)
            self.assertEqual(finish.speculation.mode, "plain")
            self.assertFalse(any(marks))
            self.check_report(marks, finish)
            for mode in ("auto", *self.modes):
                for n in (0, 1, 3):
                    with self.subTest(mode=mode, n=n, temperature=temperature):
                        ids, marks, pieces, said, finish = self.ask(mode, n, **sampling)
                        self.assertEqual(ids, plain)
                        self.assertEqual(said, text)
                        self.assertEqual(len(marks), len(ids))
                        self.assertEqual(b"".join(piece for piece, _ in pieces), text)
                        self.check_report(marks, finish)
                        if mode not in ("auto", "plain"):
                            self.assertEqual(finish.speculation.mode, mode)
                            self.assertGreater(finish.speculation.num_accepted_tokens, 0)
                        if n:
                            histogram = finish.speculation.acceptance_histogram
                            self.assertLessEqual(len(histogram), n + 1)

    def test_modes_that_cannot_run_are_refused(self):
        for mode in {"sd", "easyspec", "pearl", "pearl+lp", "warp"} - set(self.modes):
            with self.subTest(mode=mode), self.assertRaises(grpc.RpcError) as caught:
                self.ask(mode)
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
            self.assertIn(f'"{mode}"', caught.exception.details())
            self.assertIn("auto, off, " + ", ".join(self.modes), caught.exception.details())
        with self.assertRaises(grpc.RpcError) as caught:
            self.ask(n=17)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("num_speculative_tokens is 17", caught.exception.details())

    def test_a_stop_string_keeps_the_report(self):
        mode = self.modes[-1]
        whole = self.ask(mode, max_tokens=60, seed=5)[3]
        stop = whole[len(whole) // 2:][:40]
        _, marks, _, text, finish = self.ask(mode, max_tokens=60, seed=5, stop=[stop])
        self.assertEqual((finish.reason, finish.stop_string), ("stop", stop))
        self.assertEqual(text, whole[:whole.index(stop)])
        report = finish.speculation
        self.assertEqual(report.mode, mode)
        # Of the round in which the text ended, the replica may have counted more than was shown.
        self.assertGreaterEqual(report.num_accepted_tokens, sum(marks))
        self.assertGreater(report.num_spec_steps, 0)

    def test_metrics_add_up_to_the_reports(self):
        names = {"drafts": "num_spec_steps", "draft_tokens": "num_draft_tokens",
                 "accepted_tokens": "num_accepted_tokens"}
        key = "tandem_spec_decode_num_{}_total"
        mode = self.modes[-1]
        before = metrics(self.server)
        reports = [self.ask(mode, max_tokens=40, seed=s)[4].speculation for s in range(4)]
        after = metrics(self.server)
        for name, field in names.items():
            grown = after[key.format(name)] - before[key.format(name)]
            self.assertEqual(grown, sum(getattr(report, field) for report in reports), name)
        per_position = [after[k] - before[k] for k in sorted(
            (k for k in after if "num_accepted_tokens_per_pos_total" in k),
            key=lambda k: int(re.search(r'"(\d+)"', k)[1]))]
        self.assertEqual(len(per_position), 16)
        # Whoever accepted i tokens accepted positions 0 .. i - 1.
        expected = [sum(sum(list(r.acceptance_histogram)[i + 1:]) for r in reports)
                    for i in range(16)]
        self.assertEqual(per_position, expected)
        self.assertGreater(per_position[0], 0)
        self.assertIn('tandem_spec_mode{mode="plain"}', after)

    def test_the_command_line_shades_what_was_drafted(self):
        mode = self.modes[-1]
        same = ("--speculation", mode, "--max-tokens", "60", "--seed", "5",
                "--num-speculative-tokens", "4")
        _, _, pieces, text, _ = self.ask(mode, 4, max_tokens=60, seed=5)
        code, plain, errors = self.generate(*same)
        self.assertEqual((code, plain.rstrip("\n")), (0, text.decode().rstrip("\n")), errors)
        self.assertRegex(errors, rf"tokens/s, mode {re.escape(mode)}, "
                                 r"mean acceptance length \d\.\d\d, finish length")
        _, shaded, _ = self.generate(*same, "--shade", "always")
        self.assertEqual(shaded.replace(FAINT, "").replace(NORMAL, ""), plain)
        faint = "".join(re.findall(re.escape(FAINT) + "(.*?)" + re.escape(NORMAL), shaded, re.S))
        self.assertEqual(faint, b"".join(piece for piece, mark in pieces if mark).decode())
        self.assertGreater(len(faint), 0)
        _, never, _ = self.generate(*same, "--shade", "never")
        self.assertEqual(never, plain)

    def test_json_tells_what_was_drafted(self):
        mode = self.modes[-1]
        code, out, errors = self.generate("--speculation", mode, "--max-tokens", "40",
                                     "--seed", "6", "--json", "--shade", "always")
        self.assertEqual(code, 0, errors)
        *chunks, done = [json.loads(line) for line in out.splitlines()]
        marks = [mark for chunk in chunks for mark in chunk.get("drafted", [])]
        self.assertEqual(len(marks), len(done["token_ids"]))
        report = done["speculation"]
        self.assertEqual(report["mode"], mode)
        self.assertEqual(sum(marks), report["num_accepted_tokens"])
        self.assertEqual(sum(report["acceptance_histogram"]), report["num_spec_steps"])
        self.assertAlmostEqual(report["mean_acceptance_length"],
                               1 + report["num_accepted_tokens"] / report["num_spec_steps"])
        self.assertGreater(report["draft_acceptance_rate"], 0)

    def test_a_cancel_keeps_the_report(self):
        mode = self.modes[-1]
        call = self.server.channel.unary_stream("/tandem.v1.Generation/Generate",
                                                g.GenerateRequest.SerializeToString,
                                                g.GenerateChunk.FromString)
        request = g.GenerateRequest(request_id="long", text=PROMPT.encode(), speculation=mode,
                                    sampling=g.SamplingParams(seed=5, ignore_eos=True, logit_bias=[
                                        g.LogitBias(token_id=i, bias=b)
                                        for i, b in self.biases.items()]))
        stream = call(request, timeout=60)
        n = 0
        while n < 20:
            n += len(next(stream).token_ids)
        start = time.monotonic()
        self.assertTrue(self.server.unary("Generation/Cancel", g.CancelRequest(request_id="long"),
                                          g.CancelResponse).found)
        finish = list(stream)[-1].finish
        self.assertLess(time.monotonic() - start, 10)
        self.assertEqual((finish.reason, finish.speculation.mode), ("cancelled", mode))
        self.assertGreater(finish.speculation.num_spec_steps, 0)


class Disjoint(Speculation, unittest.TestCase):
    modes = ("plain", "sd", "easyspec", "pearl", "pearl+lp")

    @classmethod
    def setUpClass(cls):
        cls.server = Server("--draft", str(DRAFT), "--mode", "pearl", "--draft-ranks", "1", ranks=1)
        cls.addClassCleanup(cls.server.stop)

    def test_both_sides_waits_are_counted(self):
        before = metrics(self.server)
        self.ask("pearl", max_tokens=60, seed=5)
        after = metrics(self.server)
        waited = [after[f"tandem_spec_{side}_wait_seconds_total"] -
                  before[f"tandem_spec_{side}_wait_seconds_total"] for side in ("draft", "target")]
        self.assertGreater(sum(waited), 0)
        self.assertEqual(after['tandem_spec_mode{mode="pearl"}'], 1)
        self.assertGreater(after["tandem_spec_window"], 0)
        hits = "tandem_spec_pre_verify_hits_total"
        self.assertGreater(after[hits], before[hits])


class LookUp(Speculation, unittest.TestCase):
    """Three words only, so that what was said before is often said again."""
    modes = ("plain", "sd")

    @classmethod
    def setUpClass(cls):
        cls.server = Server("--draft", "ngram", "--mode", "sd", ranks=1)
        cls.addClassCleanup(cls.server.stop)
        words = cls.server.unary("Generation/Tokenize",
                                 g.TokenizeRequest(text=b" fox the and", no_special_tokens=True),
                                 g.TokenizeResponse)
        cls.biases = {i: 100 for i in words.ids}


if __name__ == "__main__":
    unittest.main()
