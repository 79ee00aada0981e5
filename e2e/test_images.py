#!/usr/bin/env python3
"""Tests the truth: umoci's trees against a model written from the specification's text.

What umoci does differently must be exactly what e2e/README.md lists. A new umoci that does less, or
more, of it fails here, and not as a riddle in a test of the driver.
"""

import sys
import unittest

import compare
import images
import model
import nasty
import tree

# Images whose truth is umoci's. The Debian image has no odd layers, but many files.
BY_UMOCI = ["nasty", "nasty-root", "multi-member", "plain", "small", "demo1", "debian-python"]


def read(path) -> dict:
    return tree.parse(path.read_text(encoding="ascii"))


class Truth(unittest.TestCase):
    def test_umoci_and_the_specification_agree(self):
        for name in BY_UMOCI:
            with self.subTest(name):
                image = images.get(name)
                by_model, _ = model.Merged(images.uncompressed(image)).manifest()
                by_umoci = read(image.truth())
                self.assertEqual(compare.differences(by_model, by_umoci, image.dirs_without_time()), [])

    def test_each_tolerance_is_needed(self):
        image = images.get("nasty")
        by_model, without_entry = model.Merged(images.uncompressed(image)).manifest()
        found = compare.differences(by_model, read(image.truth()))
        self.assertEqual(sorted(found), sorted(line for line in found if ": mtime is " in line), "only times of directories may differ")
        self.assertEqual(sorted(line.split(":")[1].strip() for line in found), sorted(nasty.MTIME_OF_UNPACKING))
        self.assertLess(set(without_entry), set(nasty.MTIME_OF_UNPACKING))

    def test_what_is_expected_by_hand_agrees_with_the_specification(self):
        layers, expected, no_time = nasty.nasty_extra()
        by_model, without_entry = model.Merged(layers).manifest()
        self.assertEqual(compare.differences(expected, by_model, frozenset(no_time)), [])
        self.assertEqual(without_entry, sorted(no_time), "a time may only be missing where no layer has an entry")

    def test_images_are_the_same_each_time(self):
        self.assertEqual(nasty.nasty(), nasty.nasty())
        self.assertEqual(nasty.nasty_extra(), nasty.nasty_extra())
        self.assertEqual(nasty.hostile(), nasty.hostile())

    def test_a_layer_that_is_lost_is_noticed(self):
        image = images.get("nasty")
        layers = images.uncompressed(image)
        by_model, _ = model.Merged(layers[:-1]).manifest()
        found = compare.differences(read(image.truth()), by_model, image.dirs_without_time())
        self.assertTrue(any("whiteouts/again/inside" in line for line in found), found[:5])


if __name__ == "__main__":
    unittest.main()
