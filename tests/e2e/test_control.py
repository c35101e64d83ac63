"""What stands around a generation: cancel, slow readers, stop strings, log-probs, tokenizing, status,
health, reflection, metrics."""
import math
import threading
import time
import unittest
import urllib.error
import urllib.request

from harness import Server, g, grpc, o
from grpc_health_v1 import health


class Control(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--max-context", "1024")
        cls.addClassCleanup(cls.server.stop)

    def status(self):
        return self.server.unary("Operations/GetStatus", o.GetStatusRequest(), o.GetStatusResponse)

    def wait_idle(self, seconds=5):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            replica = self.status().replicas[0]
            if replica.running == 0 and replica.waiting == 0 and replica.kv_blocks_used == 0:
                return
            time.sleep(0.02)
        self.fail(f"still busy after {seconds} s: {self.status()}")

    def test_client_cancel_frees_everything(self):
        call = self.server.generate(ignore_eos=True, max_tokens=900)
        next(call)
        call.cancel()
        self.wait_idle()

    def test_client_gone_frees_everything(self):
        channel = grpc.insecure_channel(self.server.address)
        call = channel.unary_stream("/tandem.v1.Generation/Generate",
                                    g.GenerateRequest.SerializeToString,
                                    g.GenerateChunk.FromString)(
            g.GenerateRequest(text=b"x", sampling=g.SamplingParams(ignore_eos=True)))
        next(call)
        channel.close()
        self.wait_idle()

    def test_cancel_by_id(self):
        request = g.GenerateRequest(request_id="mine", text=b"Once",
                                    sampling=g.SamplingParams(ignore_eos=True, max_tokens=900))
        call = self.server.channel.unary_stream("/tandem.v1.Generation/Generate",
                                                g.GenerateRequest.SerializeToString,
                                                g.GenerateChunk.FromString)(request, timeout=60)
        next(call)
        cancel = self.server.unary("Generation/Cancel", g.CancelRequest(request_id="mine"),
                                   g.CancelResponse)
        self.assertTrue(cancel.found)
        *_, last = call
        self.assertEqual(last.finish.reason, "cancelled")
        self.wait_idle()
        unknown = self.server.unary("Generation/Cancel", g.CancelRequest(request_id="other"),
                                    g.CancelResponse)
        self.assertFalse(unknown.found)

    def test_request_ids_are_unique_and_echoed(self):
        def open_call():
            request = g.GenerateRequest(request_id="twice", text=b"Once",
                                        sampling=g.SamplingParams(ignore_eos=True, max_tokens=900))
            return self.server.channel.unary_stream(
                "/tandem.v1.Generation/Generate", g.GenerateRequest.SerializeToString,
                g.GenerateChunk.FromString)(request, timeout=60)
        first = open_call()
        self.assertEqual(next(first).request_id, "twice")
        with self.assertRaises(grpc.RpcError) as caught:
            list(open_call())
        self.assertEqual(caught.exception.code(), grpc.StatusCode.ALREADY_EXISTS)
        first.cancel()
        self.wait_idle()

    def test_slow_reader_holds_only_itself_back(self):
        # A window of a few bytes: the server can hardly write to this client.
        channel = grpc.insecure_channel(self.server.address, options=[
            ("grpc.http2.lookahead_bytes", 64), ("grpc.http2.bdp_probe", 0)])
        request = g.GenerateRequest(text=b"Once", sampling=g.SamplingParams(
            ignore_eos=True, max_tokens=600, seed=5, logprobs=20))
        slow = channel.unary_stream("/tandem.v1.Generation/Generate",
                                    g.GenerateRequest.SerializeToString,
                                    g.GenerateChunk.FromString)(request, timeout=120)
        next(slow)
        start = time.monotonic()
        quick = self.server.ids(max_tokens=100, seed=9, ignore_eos=True)
        self.assertEqual(len(quick), 100)
        self.assertLess(time.monotonic() - start, 20)
        rest = [i for chunk in slow for i in chunk.token_ids]
        self.assertGreaterEqual(len(rest), 590)
        again = self.server.ids(b"Once", max_tokens=600, seed=5, ignore_eos=True)
        self.assertEqual(rest, again[-len(rest):])
        channel.close()

    def test_stop_strings_across_tokens(self):
        whole = b"".join(c.text for c in self.server.generate(max_tokens=60, seed=3))
        stop = whole[20:27]  # somewhere inside, whatever the tokens are
        chunks = list(self.server.generate(max_tokens=60, seed=3, stop=[stop]))
        text, finish = b"".join(c.text for c in chunks), chunks[-1].finish
        self.assertEqual((finish.reason, finish.stop_string), ("stop", stop))
        self.assertEqual(text, whole[:whole.index(stop)])
        included = b"".join(c.text for c in self.server.generate(
            max_tokens=60, seed=3, stop=[stop], include_stop_str_in_output=True))
        self.assertEqual(included, whole[:whole.index(stop) + len(stop)])

    def test_stop_tokens_and_min_tokens(self):
        ids = self.server.ids(max_tokens=40, seed=4, ignore_eos=True)
        chunks = list(self.server.generate(max_tokens=40, seed=4, stop_token_ids=[ids[10]]))
        finish = chunks[-1].finish
        self.assertEqual((finish.reason, finish.stop_token), ("stop", ids[10]))
        seen = [i for c in chunks for i in c.token_ids]
        self.assertEqual(seen[:-1], ids[:len(seen) - 1])
        later = self.server.ids(max_tokens=40, min_tokens=30, seed=4, stop_token_ids=[ids[10]])
        self.assertGreaterEqual(len(later), 30)
        self.assertNotIn(ids[10], later[:29])

    def test_logprobs(self):
        chunks = list(self.server.generate(max_tokens=12, seed=2, temperature=0, logprobs=3))
        entries = [entry for c in chunks for entry in c.logprobs]
        ids = [i for c in chunks for i in c.token_ids]
        self.assertEqual([e.token_id for e in entries], ids)
        for entry in entries:
            self.assertEqual(len(entry.top_ids), 3)
            self.assertEqual(entry.top_ids[0], entry.token_id)  # greedy: the likeliest
            self.assertAlmostEqual(entry.top_logprobs[0], entry.logprob, places=5)
            self.assertLessEqual(sum(math.exp(x) for x in entry.top_logprobs), 1.0001)
            self.assertEqual(sorted(entry.top_logprobs, reverse=True), list(entry.top_logprobs))
        plain = self.server.ids(max_tokens=12, seed=2, temperature=0)
        self.assertEqual(plain, ids)

    def test_logit_bias_and_penalties(self):
        forced = self.server.ids(max_tokens=5, temperature=0, ignore_eos=True,
                                 logit_bias=[g.LogitBias(token_id=100, bias=100)])
        self.assertEqual(forced, [100] * 5)
        varied = self.server.ids(max_tokens=30, temperature=0, ignore_eos=True,
                                 frequency_penalty=2, presence_penalty=2)
        self.assertGreater(len(set(varied)), 20)

    def test_tokens_text_and_chat_agree(self):
        tokens = self.server.unary("Generation/Tokenize", g.TokenizeRequest(text=b"Once upon"),
                                   g.TokenizeResponse)
        back = self.server.unary("Generation/Detokenize", g.DetokenizeRequest(
            ids=tokens.ids, skip_special_tokens=True), g.DetokenizeResponse)
        self.assertEqual(back.text, b"Once upon")
        by_text = self.server.ids(b"Once upon", max_tokens=10, seed=1)
        request = g.GenerateRequest(tokens=g.TokenIds(ids=tokens.ids),
                                    sampling=g.SamplingParams(max_tokens=10, seed=1))
        call = self.server.channel.unary_stream("/tandem.v1.Generation/Generate",
                                                g.GenerateRequest.SerializeToString,
                                                g.GenerateChunk.FromString)
        self.assertEqual([i for c in call(request, timeout=60) for i in c.token_ids], by_text)
        chat = g.ChatMessages(messages=[g.ChatMessage(role="user", content=b"Hi")])
        rendered = self.server.unary("Generation/Tokenize", g.TokenizeRequest(chat=chat),
                                     g.TokenizeResponse)
        self.assertIn(b"<|start_header_id|>user", rendered.text)
        chunks = list(call(g.GenerateRequest(chat=chat, sampling=g.SamplingParams(
            max_tokens=3, seed=1)), timeout=60))
        self.assertEqual(chunks[-1].finish.usage.prompt_tokens, len(rendered.ids))

    def test_prefix_cache_changes_no_token(self):
        prompt = b"Once upon a time there was a fox who lived in a forest. " * 6
        first = list(self.server.generate(prompt, max_tokens=20, seed=6))
        second = list(self.server.generate(prompt, max_tokens=20, seed=6))
        self.assertEqual([i for c in first for i in c.token_ids],
                         [i for c in second for i in c.token_ids])
        self.assertGreaterEqual(second[-1].finish.usage.cached_tokens, 16)

    def test_bad_requests(self):
        call = self.server.channel.unary_stream("/tandem.v1.Generation/Generate",
                                                g.GenerateRequest.SerializeToString,
                                                g.GenerateChunk.FromString)
        bad = [
            (g.GenerateRequest(), "input"),
            (g.GenerateRequest(tokens=g.TokenIds(ids=[5000])), "5000"),
            (g.GenerateRequest(tokens=g.TokenIds(ids=[5] * 2000)), "2000"),
            (g.GenerateRequest(text=b"\xff\xfe"), "UTF-8"),
            (g.GenerateRequest(text=b"x", speculation="pearl"), "pearl"),
            (g.GenerateRequest(chat=g.ChatMessages(messages=[
                g.ChatMessage(role="robot", content=b"x")])), "robot"),
        ]
        for request, words in bad:
            with self.subTest(words=words), self.assertRaises(grpc.RpcError) as caught:
                list(call(request, timeout=30))
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
            self.assertIn(words, caught.exception.details())

    def test_model_status_plan(self):
        model = self.server.unary("Generation/GetModel", g.GetModelRequest(), g.GetModelResponse)
        self.assertEqual((model.name, model.family, model.vocab_size, model.context_length),
                         ("llama-tale-target", "llama", 4096, 1024))
        self.assertEqual(model.parameters, 14162304)
        status = self.status()
        self.assertTrue(status.ready)
        self.assertEqual([r.role for r in status.replicas[0].ranks], ["target", "target"])
        self.assertGreater(status.replicas[0].ranks[0].weights_bytes, 10 << 20)
        self.assertGreater(status.replicas[0].link_latency_us, 0)
        self.assertGreater(status.replicas[0].link_gigabytes_per_second, 0)
        self.assertEqual(status.replicas[0].handoff_latency_us, 0)
        plan = self.server.unary("Operations/GetPlan", o.GetPlanRequest(), o.GetPlanResponse)
        self.assertEqual((plan.mode, plan.target_degree, len(plan.ranks)), ("plain", 2, 2))

    def test_health(self):
        check, watch, listing = health(self.server.channel)
        self.assertEqual(check(""), "SERVING")
        self.assertEqual(check("tandem.v1.Generation"), "SERVING")
        with self.assertRaises(grpc.RpcError) as caught:
            check("no.such.Service")
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)
        self.assertEqual(next(watch("")), "SERVING")
        self.assertIn("tandem.v1.Generation", listing())

    def test_reflection(self):
        for version in ("v1", "v1alpha"):
            call = self.server.channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                lambda raw: raw, lambda raw: raw)
            services = next(call(iter([b"\x3a\x00"]), timeout=10))  # list_services
            for name in (b"tandem.v1.Generation", b"tandem.v1.Operations", b"grpc.health.v1.Health"):
                self.assertIn(name, services)
            symbol = b"tandem.v1.Generation"
            answer = next(call(iter([b"\x22" + bytes([len(symbol)]) + symbol]), timeout=10))
            self.assertIn(b"tandem/v1/generation.proto", answer)

    def test_unknown_method(self):
        with self.assertRaises(grpc.RpcError) as caught:
            self.server.channel.unary_unary("/tandem.v1.Generation/Nothing")(b"", timeout=10)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNIMPLEMENTED)

    def test_metrics_and_probes(self):
        self.server.ids(max_tokens=3)

        def get(path):
            with urllib.request.urlopen(f"http://127.0.0.1:{self.server.http}{path}") as answer:
                return answer.read().decode()
        get("/healthz")
        get("/readyz")
        text = get("/metrics")
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
                     "prompt_tokens_total", "generation_tokens_total", "request_success_total",
                     "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
                     "e2e_request_latency_seconds_count", "prefix_cache_hits_total",
                     "num_preemptions_total"):
            self.assertIn("tandem_" + name, text)
        with self.assertRaises(urllib.error.HTTPError):
            get("/nothing")

    def test_full_queue_says_so(self):
        server = Server("--max-sequences", "1", "--max-queue-requests", "2", ranks=1)
        try:
            calls = [server.generate(ignore_eos=True, max_tokens=900) for _ in range(12)]
            codes = []

            def drain(call):
                try:
                    next(call)
                    codes.append(None)
                except grpc.RpcError as error:
                    codes.append(error.code())
                    trailers = dict(error.trailing_metadata() or ())
                    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                        self.assertGreater(int(trailers["retry-after-ms"]), 0)
            threads = [threading.Thread(target=drain, args=(c,)) for c in calls]
            for thread in threads:
                thread.start()
            time.sleep(1.5)
            for call in calls:
                call.cancel()
            for thread in threads:
                thread.join()
            self.assertIn(grpc.StatusCode.RESOURCE_EXHAUSTED, codes)
        finally:
            server.stop()


if __name__ == "__main__":
    unittest.main()
