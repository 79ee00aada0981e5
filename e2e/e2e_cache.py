"""`clip-csi cache ls|verify|rm` on a cache that real mounts have filled, and the cache's bounds."""

import contextlib
import os
import pathlib
import secrets
import signal
import subprocess
import threading
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

    def test_an_image_in_use_makes_room_by_what_was_read_longest_ago(self):
        worker = self.worker(config=self.bounded())
        worker.must_publish("a", self.env.push(self.A))
        worker.must_publish("b", self.env.push(self.B))
        self.assertEqual(worker.metric("layer_cache_evictions_total"), 0)
        self.assertGreater(worker.metric("layer_cache_extent_evictions_total", reason="capacity"), 0)
        self.assertLessEqual(self.layers(self.A), self.kept(worker))
        self.assertLess(self.used(worker), self.MAX_BYTES)
        driver.drop_from_page_cache(worker.target("a"))
        self.assert_tree(self.A, worker.target("a"))
        self.assert_tree(self.B, worker.target("b"))

    def test_an_image_in_use_whose_registry_is_away_stays(self):
        registry = services.Registry(self.work, self.work / "registry")
        self.addCleanup(registry.stop)
        reference = images.get(self.A).push(registry.host)
        hosts = [registry.host, self.registry.host]
        node = self.trio(config=self.config(cache={"max_bytes": 0, "min_free_bytes": 0}, plain_http=hosts))
        node.must_publish("a", reference)
        registry.stop()
        # The next agent has a bound that the image exceeds, and nobody to have it from again.
        self.config(cache={"max_bytes": self.MAX_BYTES - 10_000_000, "min_free_bytes": 0}, plain_http=hosts)
        node.restart("agent")
        process.wait_until(lambda: self.MAX_BYTES - 10_000_000 < node.metric("layer_cache_bytes"), "the agent's look at the cache")
        reply = node.publish("b", self.env.push(self.B))
        self.assertEqual(reply.code, "RESOURCE_EXHAUSTED", reply.message)
        self.assertIn("cache.max_bytes", reply.message)
        driver.drop_from_page_cache(node.target("a"))
        self.assert_tree(self.A, node.target("a"))
        self.assertEqual(node.metric("layer_cache_extent_evictions_total"), 0)
        self.assertEqual(node.metric("layer_cache_evictions_total"), 0)

    def test_a_disk_without_inodes_evicts(self):
        cache_dir = self.work / "a" / "cache"
        cache_dir.mkdir(parents=True)
        process.run("mount", "-t", "tmpfs", "-o", "size=200m,nr_inodes=60", "tmpfs", cache_dir)
        worker = self.worker(config=self.config(cache={"min_free_bytes": 0, "min_free_inodes": 0}))
        # Five layers of six files and directories each.
        self.see(worker, self.B)
        worker.stop()
        self.assertEqual(self.kept(worker), self.layers(self.B))
        free = os.statvfs(cache_dir).f_favail
        worker.config = self.config(cache={"min_free_bytes": 0, "min_free_inodes": free + 1})
        worker.start()
        process.wait_until(lambda: free < os.statvfs(cache_dir).f_favail, "room for files")
        self.assertGreater(worker.metric("layer_cache_evictions_total", reason="inodes"), 0)
        self.assertEqual(worker.metric("layer_cache_evictions_total", reason="disk"), 0)
        self.see(worker, self.A)
        worker.stop()

    def test_an_image_that_another_process_has_mounted_is_never_evicted(self):
        worker = self.worker(config=self.bounded())
        directory = self.mount(self.env.push(self.A), cache_dir=worker.cache_dir)
        # It is refused, or mounted with less of itself on the disk than it has: that depends on when the worker counts what others wrote.
        reply = worker.publish("b", self.env.push(self.B))
        if not reply.ok:
            self.assertIn("cache.max_bytes", reply.message)
        self.assertLessEqual(self.layers(self.A), self.kept(worker))
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
        process.wait_until(lambda: self.kept(worker) == self.layers(self.B), "the end of A")

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


class WhatIsRead(Case):
    """Five layers of 31.5 MB each fit, another image of 11.6 MB beside them does not."""

    MAX_BYTES = 165_000_000

    def test_what_the_server_reads_from_the_disk_stays(self):
        node = self.trio(config=self.config(cache={"max_bytes": self.MAX_BYTES, "min_free_bytes": 0}))
        node.must_publish("v", self.env.push("demo5"))

        def read(layer: int) -> float:
            """Reads all of a layer from the disk; returns what the agent had to fetch for that."""
            before = node.metric("tier_read_bytes_total", tier="registry")
            driver.drop_from_page_cache(node.target("v"))
            process.run("sh", "-c", "find . -type f -exec cat {} + > /dev/null", cwd=node.target("v") / f"layer-{layer}")
            return node.metric("tier_read_bytes_total", tier="registry") - before
        # It was filled first, so that it would be the first to go. The agent does not see that it is read, and is told within five seconds.
        self.assertEqual(read(1), 0)
        time.sleep(6)
        node.must_publish("w", self.env.push("nasty"))
        self.assertGreater(node.metric("layer_cache_extent_evictions_total", reason="capacity"), 0)
        self.assertEqual(read(1), 0, "it was read lately, and had to be fetched again")
        self.assertGreater(sum(read(layer) for layer in range(2, 6)), 0)
        self.assert_tree("demo5", node.target("v"))


class LargerThanTheCache(Case):
    """An image of 150 MB, each of whose five layers has 31.5 MB, in a cache of 26 MB."""

    MAX_BYTES = 26_000_000

    # What comes while an eviction is under way, and a read that has to wait for two extents.
    SLACK_BYTES = 2 * 16 * 1_044_480

    def setUp(self):
        super().setUp()
        # Of its own, since what is pushed stays there.
        self.registry = services.Registry(self.work, self.work / "registry")
        self.addCleanup(self.registry.stop)
        (self.work / "key").write_text(secrets.token_hex(32))
        self.bounded = self.config(
            remote={"kind": "none", "hmac_key_file": str(self.work / "key")},
            cache={"max_bytes": self.MAX_BYTES, "min_free_bytes": 0})
        self.reference = images.get("demo5").push(self.registry.host)
        # With its index beside it, it is mounted before any of it is on the disk.
        driver.clip("index", "push", self.reference, config=self.config("push.toml", remote={"kind": "none", "hmac_key_file": str(self.work / "key")}), cache_dir=self.work / "push")

    def watch(self, cache_dir: pathlib.Path):
        """Notes the most that the cache takes until it is told to end."""
        most, over = [0], threading.Event()

        def look():
            while not over.wait(0.02):
                done = subprocess.run(["du", "-s", "--block-size=1", cache_dir], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                most[0] = max(most[0], int(done.stdout.split()[0]))
        watching = threading.Thread(target=look)
        watching.start()

        def end() -> int:
            over.set()
            watching.join()
            return most[0]
        self.addCleanup(end)
        return end

    def read_all(self, node: driver.Driver) -> None:
        most = self.watch(node.cache_dir)
        node.must_publish("v", self.reference)
        for _ in range(2):
            driver.drop_from_page_cache(node.target("v"))
            self.assert_tree("demo5", node.target("v"))
        # Another image finds room, and is read beside it.
        node.must_publish("w", images.get("nasty").push(self.registry.host))
        self.assert_tree("nasty", node.target("w"))
        driver.drop_from_page_cache(node.target("v"))
        reading = [
            subprocess.Popen(["find", ".", "-type", "f", "-exec", "cat", "{}", "+"], cwd=node.target(volume), stdout=subprocess.DEVNULL)
            for volume in ["v", "w", "v"]]
        self.assertEqual([it.wait(300) for it in reading], [0, 0, 0])
        self.assert_tree("demo5", node.target("v"))
        self.assert_tree("nasty", node.target("w"))
        most = most()
        evicted = node.metric("layer_cache_extent_evictions_total", reason="capacity")
        print(f"{evicted:.0f} extents evicted, {node.metric('chunks_served_through_total'):.0f} chunks served through, {most / 1e6:.1f} MB at most")
        self.assertGreater(evicted, 10)
        self.assertEqual(node.metric("fuse_requests_total", op="read", outcome="error"), 0)
        self.assertEqual(node.metric("verify_failures_total", tier="disk"), 0)
        self.assertEqual(node.metric("layer_decompressions_total", outcome="ok"), 5, "only the layers of the other image are streamed")
        self.assertLess(most, self.MAX_BYTES + self.SLACK_BYTES)

    def test_it_is_read_whole_by_one_process(self):
        worker = self.worker(config=self.bounded)
        self.read_all(worker)
        worker.stop()
        self.assertEqual(driver.clip("cache", "verify", cache_dir=worker.cache_dir).returncode, 0)

    def test_it_is_read_whole_by_three_processes(self):
        node = self.trio(config=self.bounded)
        self.read_all(node)
        # Killed while it evicts, again and again, under a reader.
        reading = subprocess.Popen(["find", ".", "-type", "f", "-exec", "cat", "{}", "+"], cwd=node.target("v"), stdout=subprocess.DEVNULL)
        for _ in range(4):
            time.sleep(self.dice.uniform(0.1, 0.6))
            node.kill("agent")
            node.start("agent")
        self.assertEqual(reading.wait(300), 0)
        driver.drop_from_page_cache(node.target("v"))
        self.assert_tree("demo5", node.target("v"))
        serve, agent = node.memory("serve"), node.memory("agent")
        print(f"serve VmHWM {serve['VmHWM'] / 1e6:.1f} MB, agent VmHWM {agent['VmHWM'] / 1e6:.1f} MB")
        self.assertLess(serve["VmHWM"], FullDisk.MOST_OF_SERVE)


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
