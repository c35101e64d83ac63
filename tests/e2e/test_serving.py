"""Streams, parameters and seeds against the real programs."""
import unittest

from harness import Server, g, grpc, o


class Serving(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.addClassCleanup(cls.server.stop)

    def test_stream_and_seed(self):
        chunks = list(self.server.generate(max_tokens=20))
        finish = chunks[-1].finish
        self.assertEqual((finish.reason, finish.usage.completion_tokens), ("length", 20))
        self.assertGreater(len(chunks), 2)
        again = self.server.ids(max_tokens=20, seed=finish.seed)
        self.assertEqual(again, [i for c in chunks for i in c.token_ids])

    def test_bad_parameters_name_the_field(self):
        for field, value in [("temperature", -1), ("top_p", 0), ("top_p", 2), ("top_k", -2),
                             ("min_p", 2), ("repetition_penalty", 0), ("presence_penalty", 3),
                             ("frequency_penalty", -3), ("logprobs", 21), ("n", 2),
                             ("stop", [b""]), ("max_tokens", 0)]:
            with self.subTest(field=field, value=value):
                with self.assertRaises(grpc.RpcError) as caught:
                    list(self.server.generate(**{field: value}))
                self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
                self.assertIn(field, caught.exception.details())

    def test_many_streams_equal_single_ones(self):
        calls = [self.server.generate(max_tokens=16, seed=s) for s in range(200)]
        together = [[i for c in call for i in c.token_ids] for call in calls]
        for seed in range(200):
            self.assertEqual(together[seed], self.server.ids(max_tokens=16, seed=seed), seed)

    def test_deadline(self):
        with self.assertRaises(grpc.RpcError) as caught:
            list(self.server.generate(timeout=0.3, ignore_eos=True))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)


class Topology(unittest.TestCase):
    def test_any_degree_gives_the_same_tokens(self):
        seen = {}
        for ranks in (1, 2, 4, 8):
            server = Server(ranks=ranks)
            try:
                seen[ranks] = server.ids(max_tokens=48, seed=11)
            finally:
                self.assertEqual(server.stop(), 0)
        for ranks, ids in seen.items():
            self.assertEqual(ids, seen[1], ranks)


if __name__ == "__main__":
    unittest.main()
