#!/usr/bin/env python3
"""Tests what the benchmarks count with; the benchmarks themselves are `make bench`."""

import contextlib
import io
import pathlib
import struct
import tempfile
import unittest

from bench import measure, node_cache
from bench import run as _every_part  # So that one that cannot be loaded is seen.

DIFF_ID = "sha256:" + "ab" * 32


class Measure(unittest.TestCase):
    def test_median_and_p90(self):
        samples = measure.Samples([measure.Sample(seconds) for seconds in (5, 1, 3, 2, 4)])
        self.assertEqual((samples.median, samples.p90), (3, 5))
        self.assertEqual(measure.p90([float(it) for it in range(1, 21)]), 18)

    def test_cases_take_turns(self):
        order = []
        samples = measure.interleaved({name: lambda number, name=name: order.append((number, name)) or measure.Sample(1) for name in "ab"}, rounds=2)
        self.assertEqual(order, [(0, "a"), (0, "b"), (1, "a"), (1, "b")])
        self.assertEqual([len(it.all) for it in samples.values()], [2, 2])
        samples = measure.interleaved({name: lambda _: measure.Sample(1) for name in "ab"}, fewer={"b": 2})
        self.assertEqual([len(it.all) for it in samples.values()], [measure.ROUNDS, 2])

    def test_bounds_are_held_or_missed(self):
        verdicts, out = measure.Verdicts(), io.StringIO()
        with contextlib.redirect_stdout(out):
            verdicts.at_most("a", 1.25, 1.25)
            verdicts.at_most("b", 1.26, 1.25)
            verdicts.at_least("c", 0.9, 0.9)
            verdicts.at_least("d", 0.89, 0.9)
            verdicts.exactly("e", 2, 1)
        self.assertEqual([line.split()[0] for line in out.getvalue().splitlines()], ["held", "missed", "held", "missed", "missed"])
        self.assertEqual(verdicts.last_line(), "bounds: 2 held, 3 missed")
        with contextlib.redirect_stdout(out):
            verdicts.skip("f", "why")
        self.assertEqual(verdicts.last_line(), "bounds: 2 held, 3 missed, 1 skipped")


class NodeCache(unittest.TestCase):
    def test_data_goes_and_what_is_known_stays(self):
        with tempfile.TemporaryDirectory(prefix="clip-e2e-bench.") as name:
            cache, other = pathlib.Path(name, "cache"), pathlib.Path(name, "other")
            layer = node_cache.layer_dir(cache, DIFF_ID)
            layer.mkdir(parents=True)
            layer_bytes = 69 * node_cache.CHUNK_BYTES + 1
            (layer / "data").write_bytes(b"content")
            (layer / "index").write_bytes(b"index")
            (layer / "state").write_bytes(node_cache.HEADER.pack(node_cache.MAGIC, layer_bytes, 7, 3) + struct.pack("<QQ", 2**64 - 1, 2**6 - 1)
                                          # Evictions and last uses of five extents.
                                          + struct.pack("<10Q", *range(10)))
            self.assertEqual(node_cache.present(cache, DIFF_ID), (70, 70))
            self.assertTrue(node_cache.is_complete(cache, DIFF_ID))
            node_cache.without_data(cache, other)
            self.assertEqual(node_cache.present(other, DIFF_ID), (0, 70))
            copied = node_cache.layer_dir(other, DIFF_ID)
            self.assertEqual((copied / "index").read_bytes(), b"index")
            self.assertEqual((copied / "data").read_bytes(), bytes(len(b"content")))
            self.assertEqual((copied / "state").read_bytes()[:32], node_cache.HEADER.pack(node_cache.MAGIC, layer_bytes, 7, node_cache.FLUSHED))
            self.assertEqual(node_cache.present(other, "sha256:" + "cd" * 32), (0, 0))
            self.assertFalse(node_cache.is_complete(other, "sha256:" + "cd" * 32))


if __name__ == "__main__":
    unittest.main()
