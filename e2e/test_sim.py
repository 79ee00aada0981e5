#!/usr/bin/env python3
"""Tests the model of warming: bytes are conserved, nobody exceeds what they can, and nothing beats the physical limit."""

import contextlib
import io
import unittest

from sim import model, run

IMAGE = model.Image(blob_bytes=4e9, layer_bytes=10e9, remote_bytes=6e9)
COUNTS = (1, 7, 10, 100, 1_000, 10_000)


class Shares(unittest.TestCase):
    def groups(self, *of):
        return [model.Group(count, cap, 1) for cap, count in of]

    def test_what_one_cannot_take_the_others_get(self):
        self.assertEqual(model.shares(100, self.groups((10, 2), (1000, 2))), [10, 40])
        self.assertEqual(model.shares(100, self.groups((1000, 1), (10, 1), (30, 1))), [60, 10, 30])

    def test_what_nobody_can_take_is_left(self):
        self.assertEqual(model.shares(100, self.groups((10, 2), (5, 4))), [10, 5])

    def test_it_is_fair_and_within_the_capacity(self):
        groups = self.groups((3, 5), (17, 2), (40, 9), (11, 4))
        for capacity in (1, 50, 119, 120, 500):
            rates = model.shares(capacity, groups)
            sent = sum(rate * it.count for rate, it in zip(rates, groups))
            self.assertLessEqual(sent, capacity * (1 + 1e-12))
            most = max(rates)
            for rate, it in zip(rates, groups):
                self.assertLessEqual(rate, it.cap)
                # Who has less than another one has all that they can take.
                self.assertTrue(rate == it.cap or abs(rate - most) < 1e-9, (capacity, rates))
            wanted = sum(it.cap * it.count for it in groups)
            self.assertAlmostEqual(sent, min(capacity, wanted))


class Warming(unittest.TestCase):
    def ways(self, n_nodes):
        for plan in (model.Plan(), model.Plan(pace=50e6), model.Plan(at_once=3), model.Plan(pace=100e6, at_once=64)):
            yield plan, model.warmed(n_nodes, IMAGE, plan=plan)

    def test_bytes_are_conserved(self):
        for n_nodes in COUNTS:
            for plan, it in self.ways(n_nodes):
                expected = n_nodes * IMAGE.remote_bytes
                self.assertAlmostEqual(it.fill.sent_bytes / expected, 1, places=6, msg=f"{n_nodes} {plan}")
                self.assertEqual(it.fill.received_bytes, expected)
                self.assertEqual(sum(count for _, count in it.fill.done), n_nodes)
                self.assertEqual(it.registry_bytes, IMAGE.blob_bytes, "the registry is asked once")
            pulled = model.pulled(n_nodes, IMAGE)
            self.assertAlmostEqual(pulled.registry_bytes / (n_nodes * IMAGE.blob_bytes), 1, places=6)

    def test_nothing_beats_the_limit_and_nothing_exceeds_a_wire(self):
        stores = model.Stores()
        for n_nodes in COUNTS:
            for plan, it in self.ways(n_nodes):
                self.assertGreaterEqual(it.seconds, it.limit_seconds * (1 - 1e-9), f"{n_nodes} {plan}")
                self.assertLessEqual(it.fill.peak, stores.remote * (1 + 1e-9))
                self.assertLessEqual(it.median_seconds(), it.seconds)
            pulled = model.pulled(n_nodes, IMAGE)
            self.assertGreaterEqual(pulled.seconds, pulled.limit_seconds * (1 - 1e-9))
            self.assertLessEqual(pulled.fill.peak, stores.registry * (1 + 1e-9))

    def test_many_nodes_use_the_whole_wire(self):
        """With more nodes than the remote can serve at full speed, only it counts, and the time is the limit."""
        it = model.warmed(10_000, IMAGE)
        self.assertLess(it.seconds / it.limit_seconds, 1.01)
        self.assertAlmostEqual(it.fill.peak, model.Stores().remote)

    def test_equal_nodes_are_done_at_once(self):
        """What can be calculated by hand: 100 nodes, 6 GB each, 10 GB/s."""
        node, stores = model.Node(spread=0), model.Stores(remote=10e9)
        it = model.warmed(100, IMAGE, node, stores)
        self.assertAlmostEqual(it.fill.seconds, 60)
        self.assertAlmostEqual(it.seed_seconds, 10e9 / node.decompress)
        # Slower than the wire: 300 MB/s of 10 GB.
        self.assertAlmostEqual(model.warmed(2, IMAGE, node, stores).fill.seconds, 10e9 / node.fill)

    def test_a_pace_leaves_room_and_costs_time(self):
        fast, slow = model.warmed(10, IMAGE), model.warmed(10, IMAGE, plan=model.Plan(pace=30e6))
        self.assertGreater(slow.seconds, 2 * fast.seconds)
        self.assertLessEqual(slow.fill.peak, 10 * 30e6 * IMAGE.remote_bytes / IMAGE.layer_bytes * (1 + 1e-9))

    def test_more_nodes_never_take_less(self):
        seconds = [model.warmed(n_nodes, IMAGE).seconds for n_nodes in (1, 10, 100, 1_000, 10_000)]
        self.assertEqual(seconds, sorted(seconds))


class Table(unittest.TestCase):
    def test_it_has_a_row_for_each_way(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run.main(["--image", "20", "--remote", "200"])
        lines = out.getvalue().splitlines()
        self.assertEqual(len(lines), 2 + 2 * len(run.COUNTS))
        self.assertEqual([line.split()[0] for line in lines[2::2]], ["10", "100", "1,000", "10,000"])
        self.assertIn("12.0 GB in the remote", lines[0])


if __name__ == "__main__":
    unittest.main()
