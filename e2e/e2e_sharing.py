"""One decompression per layer per node, however many mounts, readers and processes."""

import concurrent.futures
import subprocess

import images
from harness import driver, paths, process
from harness.environment import Case


class Sharing(Case):
    def test_two_volumes_of_one_image_share_everything(self):
        worker = self.worker()
        reference = self.env.push("demo5")
        mark = self.registry.mark()
        for volume in ("one", "two"):
            worker.must_publish(volume, reference)
        self.assertEqual(worker.metric("mounts"), 1, "one source mount")
        self.assertEqual(worker.metric("volumes"), 2)
        self.assert_tree("demo5", worker.target("one"))
        worker.must_unpublish("one")
        self.assert_tree("demo5", worker.target("two"))
        self.assertEqual(worker.metric("layer_decompressions_total", outcome="ok"), 5)
        self.assertEqual(self.layer_gets("demo5", mark), [1] * 5)
        worker.must_unpublish("two")
        self.assertEqual(worker.left_behind(), [])

    def test_two_images_share_a_layer(self):
        worker = self.worker()
        mark = self.registry.mark()
        worker.must_publish("five", self.env.push("demo5"))
        worker.must_publish("one", self.env.push("demo1"))
        self.assert_tree("demo1", worker.target("one"))
        self.assertEqual(worker.metric("layer_decompressions_total", outcome="ok"), 5)
        self.assertEqual(self.layer_gets("demo1", mark), [1])

    def test_ten_publishes_at_once_fetch_each_layer_once(self):
        worker = self.worker()
        reference = self.env.push("demo5")
        mark = self.registry.mark()
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            replies = list(pool.map(lambda number: worker.publish(f"v{number}", reference), range(10)))
        self.assertEqual([reply.code for reply in replies], ["OK"] * 10, replies)
        self.assert_tree("demo5", worker.target("v7"))
        self.assertEqual(worker.metric("layer_decompressions_total", outcome="ok"), 5)
        self.assertEqual(self.layer_gets("demo5", mark), [1] * 5)
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            replies = list(pool.map(lambda number: worker.unpublish(f"v{number}"), range(10)))
        self.assertEqual([reply.code for reply in replies], ["OK"] * 10, replies)
        self.assertEqual(worker.left_behind(), [])

    def test_two_processes_on_one_cache_fetch_each_layer_once(self):
        reference = self.env.push("demo5")
        config, cache = self.config(), self.work / "cache"
        mark = self.registry.mark()
        directories = [self.mountpoint(f"mnt{number}") for number in range(3)]
        started = [
            subprocess.Popen([paths.binary(), "mount", reference, directory, "--config", config, "--cache-dir", cache], stderr=subprocess.PIPE, text=True)
            for directory in directories
        ]
        for it, directory in zip(started, directories):
            self.addCleanup(self.unmount, directory)
            _, errors = it.communicate(timeout=120)
            self.assertEqual(it.returncode, 0, errors)
        for directory in directories:
            self.assert_tree("demo5", directory)
        self.assertEqual(self.layer_gets("demo5", mark), [1] * 5)

    def test_readers_are_served_before_the_layer_is_whole(self):
        """The tree of a volume can be read while its last layer still streams, or right after: never wrong."""
        worker = self.worker()
        worker.must_publish("v", self.env.push("demo5"))
        names = [name for layer in images.get("demo5").note()["files"] for name in sorted(layer)[:20]]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            seen = list(pool.map(lambda name: process.run("sha256sum", worker.target("v") / name).stdout.split()[0], names))
        wanted = {name: digest for layer in images.get("demo5").note()["files"] for name, digest in layer.items()}
        self.assertEqual(seen, [wanted[name] for name in names])
