"""What a pod reads first is recorded, and fetched ahead on the next node that mounts the image."""

import images
from harness import driver, process
from harness.environment import Case

NAME = "demo5"

# Files of each layer that are read: more than one, and far from all.
FILES = 3


class Prefetch(Case):
    """Nodes that share a Redis, in which a first one has put the image."""

    def setUp(self):
        super().setUp()
        self.node_config = self.config(redis=self.redis(), key_file=self.work / "key")
        self.reference = self.env.push(NAME)
        layers = images.get(NAME).note()["files"]
        self.files = {name: layer[name] for layer in layers for name in sorted(layer)[-FILES:]}
        first = self.worker("first", self.node_config)
        first.must_publish("v", self.reference)
        process.wait_until(lambda: first.metric("remote_uploads_total", outcome="ok") >= len(layers), "the uploads", 120)
        first.stop()

    def read(self, node: driver.Driver) -> None:
        for name, digest in self.files.items():
            self.assertEqual(process.run("sha256sum", node.target("v") / name).stdout.split()[0], digest, name)

    @staticmethod
    def fetched(node: driver.Driver) -> float:
        return node.metric("prefetch_chunks_total", outcome="fetched")

    @staticmethod
    def missed(node: driver.Driver) -> float:
        return node.metric("tier_reads_total", tier="disk", outcome="miss")

    @staticmethod
    def profiles(node: driver.Driver) -> list[str]:
        return [it.name for it in (node.cache_dir / "images").glob("*.profile")]

    def record(self) -> float:
        """Has a second node record what is read, and returns how many reads had to wait."""
        second = self.worker("second", self.node_config)
        second.must_publish("v", self.reference, prefetch="recorded")
        self.read(second)
        missed = self.missed(second)
        self.assertGreater(missed, 0)
        self.assertEqual(self.fetched(second), 0, "nothing is known yet")
        second.must_unpublish("v")
        process.wait_until(lambda: self.profiles(second), "the profile")
        second.stop()
        return missed

    def test_the_next_node_has_what_is_read_first(self):
        self.record()
        mark = self.registry.mark()
        third = self.trio("third", self.node_config)
        third.must_publish("v", self.reference)
        process.wait_until(lambda: self.profiles(third), "the profile")
        process.wait_until(lambda: "fetching ahead has ended" in third.log_of("agent").read_text(), "what was recorded")
        self.assertGreater(self.fetched(third), 0)
        self.read(third)
        self.assertEqual(self.missed(third), 0, "all that is read was there")
        self.assertEqual(set(self.layer_gets(NAME, mark)), {0}, "and it came from the remote")

    def test_a_volume_may_want_none_and_another_one_all(self):
        missed = self.record()
        third = self.trio("third", self.node_config)
        third.must_publish("v", self.reference, prefetch="none")
        self.read(third)
        self.assertEqual((self.missed(third), self.fetched(third), self.profiles(third)), (missed, 0, []))
        # The same mount, of which more is wanted now.
        third.must_publish("more", self.reference, prefetch="all")
        process.wait_until(lambda: third.log_of("agent").read_text().count("fetching ahead has ended") == 2, "all of the image", 60)
        self.assertEqual(third.metric("mounts"), 1)
        before = self.missed(third)
        self.assert_tree(NAME, third.target("v"))
        self.assertEqual(self.missed(third), before, "all was there")
