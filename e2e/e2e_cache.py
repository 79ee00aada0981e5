"""`clip-csi cache ls|verify|rm` on a cache that real mounts have filled, and the cache's bounds."""

import contextlib
import os
import pathlib
import secrets
import signal
import subprocess
import time

import images
from harness import driver, process, services
from harness.environment import Case


class Cache(Case):
    def fill(self, name: str) -> pathlib.Path:
        self.unmount(self.mount(self.env.push(name)))
        return self.work / "cache"

    def cache(self, *words, check=True):
        return driver.clip("cache", *words, config=self.config(), cache_dir=self.work / "cache", check=check)

    def test_ls_names_the_layers(self):
        self.fill("demo5")
        printed = self.cache("ls").stdout
        for diff_id in images.get("demo5").layout.diff_ids(images.TAG):
            self.assertIn(diff_id.removeprefix("sha256:")[:12], printed)

    def test_rm_removes_one_layer_or_all(self):
        cache = self.fill("demo5")
        diff_ids = images.get("demo5").layout.diff_ids(images.TAG)
        self.cache("rm", diff_ids[0])
        printed = self.cache("ls").stdout
        self.assertNotIn(diff_ids[0].removeprefix("sha256:"), printed)
        self.assertIn(diff_ids[1].removeprefix("sha256:")[:12], printed)
        # What was removed is fetched again.
        mark = self.registry.mark()
        directory = self.mount(self.env.push("demo5"), "again")
        self.assert_tree("demo5", directory)
        self.assertEqual(self.layer_gets("demo5", mark), [1, 0, 0, 0, 0])
        self.unmount(directory)
        self.cache("rm", "--all")
        used = int(process.run("du", "-s", "--block-size=1", cache).stdout.split()[0])
        self.assertLess(used, 1 << 20)
        self.assertNotEqual(self.cache("rm", "sha256:" + "0" * 64, check=False).returncode, 0, "a layer that is not there")

    def test_verify_finds_what_the_disk_changed_and_it_is_fetched_anew(self):
        cache = self.fill("demo1")
        self.assertEqual(self.cache("verify").returncode, 0)
        # The biggest file of the cache is the layer's.
        data = max((path for path in cache.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        self.assertGreaterEqual(data.stat().st_size, images.get("demo1").note()["layer_bytes"][0])
        with open(data, "r+b") as file:
            for at in (1000, 10 << 20, 20 << 20):
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 0xFF]))
        done = self.cache("verify", check=False)
        self.assertTrue(done.returncode != 0 or "3" in done.stdout, f"three chunks are wrong: {done.stdout}{done.stderr}")
        directory = self.mount(self.env.push("demo1"), "again")
        self.assert_tree("demo1", directory)
        self.unmount(directory)
        self.assertEqual(self.cache("verify").returncode, 0)

    def test_commands_on_a_cache_in_use_do_no_harm(self):
        worker = self.worker(cache_dir=self.work / "cache")
        worker.must_publish("v", self.env.push("demo1"))
        self.cache("ls")
        self.cache("verify", check=False)
        refused = self.cache("rm", "--all", check=False)
        self.assertEqual(refused.returncode, 1)
        self.assertIn("is in use", refused.stdout)
        driver.drop_from_page_cache(worker.target("v"))
        self.assert_tree("demo1", worker.target("v"))


class Eviction(Case):
    """Image A has one layer of 31.5 MB, image B five layers of 11.6 MB in all: there is room for one of them."""

    A, B = "demo1", "nasty"
    MAX_BYTES = 36_000_000

    def bounded(self, **cache) -> pathlib.Path:
        return self.config(cache={"max_bytes": self.MAX_BYTES, "min_free_bytes": 0, **cache})

    def used(self, worker: driver.Worker) -> int:
        return int(process.run("du", "-s", "--block-size=1", worker.cache_dir).stdout.split()[0])

    def kept(self, worker: driver.Worker) -> set[str]:
        return {path.name for path in (worker.cache_dir / "layers").iterdir()}

    def layers(self, name: str) -> set[str]:
        return {it.removeprefix("sha256:") for it in images.get(name).layout.diff_ids(images.TAG)}

    def see(self, worker: driver.Worker, name: str) -> None:
        """Publishes the image, finds it right, and unpublishes it."""
        worker.must_publish("v", self.env.push(name))
        self.assert_tree(name, worker.target("v"))
        worker.must_unpublish("v")

    def test_an_image_that_is_not_in_use_makes_room_for_the_next(self):
        worker = self.worker(config=self.bounded())
        self.see(worker, self.A)
        self.assertEqual(self.kept(worker), self.layers(self.A))
        self.see(worker, self.B)
        self.assertEqual(self.kept(worker), self.layers(self.B))
        self.assertEqual(worker.metric("layer_cache_evictions_total", reason="capacity"), 1)
        self.assertEqual(worker.metric("layer_cache_evictions_total", reason="disk"), 0)
        layer_bytes = images.get(self.A).note()["layer_bytes"][0]
        self.assertGreaterEqual(worker.metric("layer_cache_evicted_bytes_total"), layer_bytes)
        self.assertEqual(worker.metric("layer_cache_capacity_bytes"), self.MAX_BYTES)
        self.assertEqual(worker.metric("layer_cache_layers"), len(self.layers(self.B)))
        self.assertLess(self.used(worker), self.MAX_BYTES)
        self.assertLess(abs(worker.metric("layer_cache_bytes") - self.used(worker)), 1 << 20)
        self.assertEqual(len(list((worker.cache_dir / "images").iterdir())), 1, "the index of A stays without its layer")
        # What was evicted is fetched again, once.
        mark = self.registry.mark()
        self.see(worker, self.A)
        self.assertEqual(self.layer_gets(self.A, mark), [1])

    def test_the_order_survives_a_restart(self):
        worker = self.worker(config=self.bounded(max_bytes=50_000_000))
        self.see(worker, self.A)
        self.see(worker, self.B)
        # Used again, so that B is older.
        self.see(worker, self.A)
        worker.stop()
        # A alone is below the low watermark.
        worker.config = self.bounded(low_watermark_percent=89)
        worker.start()
        process.wait_until(lambda: worker.metric("layer_cache_bytes") < self.MAX_BYTES, "eviction at start")
        self.assertLess(self.kept(worker) & self.layers(self.B), self.layers(self.B))
        self.assertLessEqual(self.layers(self.A), self.kept(worker), "what was used last went first")

    def test_an_image_in_use_is_never_evicted(self):
        worker = self.worker(config=self.bounded())
        worker.must_publish("a", self.env.push(self.A))
        reply = worker.publish("b", self.env.push(self.B))
        self.assertEqual(reply.code, "RESOURCE_EXHAUSTED", reply.message)
        self.assertIn(f"cache.max_bytes = {self.MAX_BYTES}", reply.message)
        driver.drop_from_page_cache(worker.target("a"))
        self.assert_tree(self.A, worker.target("a"))
        self.assertLessEqual(self.layers(self.A), self.kept(worker))
        self.assertEqual(worker.metric("layer_cache_evictions_total"), 0)
        worker.must_unpublish("a")
        worker.must_publish("b", self.env.push(self.B))
        self.assert_tree(self.B, worker.target("b"))

    def test_an_image_that_another_process_has_mounted_is_never_evicted(self):
        worker = self.worker(config=self.bounded())
        directory = self.mount(self.env.push(self.A), cache_dir=worker.cache_dir)
        reply = worker.publish("b", self.env.push(self.B))
        self.assertIn("cache.max_bytes", reply.message)
        driver.drop_from_page_cache(directory)
        self.assert_tree(self.A, directory)
        # A process that is killed uses nothing any more.
        for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            # Others may end while they are looked at.
            with contextlib.suppress(OSError):
                words = entry.read_bytes().split(b"\0")
                if b"mount" in words and str(directory).encode() in words:
                    os.kill(int(entry.parent.name), signal.SIGKILL)
        process.unmount_below(directory)
        process.wait_until(lambda: worker.publish("b", self.env.push(self.B)).ok, "room for B")
        self.assert_tree(self.B, worker.target("b"))
        self.assertEqual(self.kept(worker), self.layers(self.B))

    def test_a_full_disk_evicts_and_then_says_so(self):
        cache_dir = self.work / "a" / "cache"
        cache_dir.mkdir(parents=True)
        process.run("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", cache_dir)
        worker = self.worker(config=self.config(cache={"min_free_bytes": 4 << 20}))
        self.see(worker, self.A)
        self.assertEqual(worker.metric("layer_cache_disk_size_bytes"), 40 << 20)
        before = worker.metric("layer_cache_disk_free_bytes")
        self.assertLess(before, 10 << 20)
        worker.must_publish("b", self.env.push(self.B))
        self.assert_tree(self.B, worker.target("b"))
        self.assertEqual(worker.metric("layer_cache_evictions_total", reason="disk"), 1)
        self.assertGreater(worker.metric("layer_cache_disk_free_bytes"), before)
        reply = worker.publish("a", self.env.push(self.A))
        self.assertEqual(reply.code, "RESOURCE_EXHAUSTED", reply.message)
        self.assertIn("is full: free space there", reply.message)
        driver.drop_from_page_cache(worker.target("b"))
        self.assert_tree(self.B, worker.target("b"))
        worker.must_unpublish("b")
        self.see(worker, self.A)
        worker.stop()

    def test_killed_while_it_evicts(self):
        worker = self.worker(config=self.bounded())
        print(f"seed {self.seed}")
        self.see(worker, self.A)
        begin = time.monotonic()
        self.see(worker, self.B)
        took = time.monotonic() - begin
        for number in range(12):
            name = self.A if number % 2 == 0 else self.B
            worker.target("v").parent.mkdir(exist_ok=True)
            publishing = subprocess.Popen(
                [driver.csictl(), "--endpoint", f"unix://{worker.socket}", "publish", "v", worker.target("v"), f"image={self.env.push(name)}"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(self.dice.uniform(0, took))
            worker.kill()
            publishing.wait(30)
            worker.start()
            worker.must_publish("v", self.env.push(name))
            self.assert_tree(name, worker.target("v"))
            worker.must_unpublish("v")
            self.assertEqual(list((worker.cache_dir / "tmp").iterdir()), [], f"left after kill {number}")
        worker.stop()
        self.assertEqual(driver.clip("cache", "verify", cache_dir=worker.cache_dir).returncode, 0)
        self.assertLess(self.used(worker), self.MAX_BYTES)

    def test_watermarks_that_make_no_sense_are_refused(self):
        for words, text in [({"high_watermark_percent": 0}, "from 1 to 100"), ({"low_watermark_percent": 90}, "must be less than")]:
            done = driver.clip("cache", "ls", config=self.config(cache=words), check=False)
            self.assertEqual((done.returncode, text in done.stderr), (64, True), done.stderr)


class FullDisk(Case):
    """An image of 150 MB on a disk of 24 MB: what has no room there is served past it."""

    # As the other cases of memory have it.
    MOST_OF_SERVE = 10e6

    def setUp(self):
        super().setUp()
        # Of its own, since what is pushed stays there.
        self.registry = services.Registry(self.work, self.work / "registry")
        self.addCleanup(self.registry.stop)

    def test_an_image_larger_than_the_disk_is_read_whole(self):
        (self.work / "key").write_text(secrets.token_hex(32))
        config = self.config(remote={"kind": "none", "hmac_key_file": str(self.work / "key")}, cache={"min_free_bytes": 0})
        reference = images.get("demo5").push(self.registry.host)
        # With its index beside it, it is mounted before any of it is on the disk.
        driver.clip("index", "push", reference, config=config, cache_dir=self.work / "push")
        cache_dir = self.work / "a" / "cache"
        cache_dir.mkdir(parents=True)
        process.run("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", cache_dir)
        node = self.trio(config=config)
        node.must_publish("v", reference)
        self.assert_tree("demo5", node.target("v"))
        through = node.metric("chunks_served_through_total", reason="no_space")
        self.assertGreater(through, 100)
        self.assertEqual(node.metric("fuse_requests_total", op="read", outcome="error"), 0)
        serve, agent = node.memory("serve"), node.memory("agent")
        print(f"{through:.0f} chunks served through; serve VmHWM {serve['VmHWM'] / 1e6:.1f} MB, agent VmHWM {agent['VmHWM'] / 1e6:.1f} MB")
        self.assertLess(serve["VmHWM"], self.MOST_OF_SERVE)
        # Whoever comes after the agent or the server finds the disk as full, and readers do not notice.
        driver.drop_from_page_cache(node.target("v"))
        reading = subprocess.Popen(["find", ".", "-type", "f", "-exec", "cat", "{}", "+"], cwd=node.target("v"), stdout=subprocess.DEVNULL)
        for _ in range(3):
            time.sleep(0.5)
            node.kill("agent")
            node.start("agent")
        node.hand_over().stop()
        self.assertEqual(reading.wait(120), 0)
        driver.drop_from_page_cache(node.target("v"))
        self.assert_tree("demo5", node.target("v"))
        # There is room again: all of it is cached, and nothing served past the disk.
        process.run("mount", "-o", "remount,size=400m", cache_dir)
        driver.drop_from_page_cache(node.target("v"))
        self.assert_tree("demo5", node.target("v"))
        driver.drop_from_page_cache(node.target("v"))
        through = node.metric("chunks_served_through_total")
        self.assert_tree("demo5", node.target("v"))
        self.assertEqual(node.metric("chunks_served_through_total"), through)
        self.assertGreater(node.metric("layer_cache_bytes"), 100e6)
        self.assertEqual(node.metric("fuse_requests_total", op="read", outcome="error"), 0)
