"""Images are put into the remote content cache once, and nodes take them from there: `clip-csi warm`, as process and against real services."""

import contextlib
import pathlib
import re
import subprocess
import time

import images
from harness import driver, process, services
from harness.environment import Case

N_NODES = 16
EXIT_USAGE, EXIT_TRY_AGAIN = 64, 75
# Of VmHWM, in bytes. Filling is what an agent does; whoever seeds holds what an agent that uploads does.
MOST_FILLING, MOST_SEEDING = 16e6, 20e6


class Warming(subprocess.Popen):
    """`clip-csi warm` under way. Its output goes to a file; what it takes at most is looked at until it ends."""

    def __init__(self, binary: pathlib.Path, directory: pathlib.Path, config: pathlib.Path, *words):
        directory.mkdir(exist_ok=True)
        self.log = directory / "log"
        command = [binary, "warm", *words, "--config", config, "--cache-dir", directory / "cache"]
        with open(self.log, "ab") as log:
            super().__init__([str(it) for it in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.started, self.most_bytes = time.monotonic(), 0

    def ended(self, seconds: float = 120) -> int:
        """Its exit status."""
        while self.poll() is None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self.most_bytes = max(self.most_bytes, driver.memory_of(self.pid)["VmHWM"])
            if self.started + seconds < time.monotonic():
                self.kill()
            time.sleep(0.002)
        self.seconds = time.monotonic() - self.started
        return self.returncode

    def said(self) -> dict[str, str]:
        """What it has done, by the first word of each line."""
        return dict(re.findall(r"^(image|layers|registry|remote|index) +(.*)$", self.log.read_text(), re.M))

    def count(self, what: str) -> int:
        return int(self.said()[what].split()[0])


class Warm(Case):
    """With a registry of its own, whose log is read."""

    def setUp(self):
        super().setUp()
        self.registry = services.Registry(self.work, self.work / "registry")
        self.addCleanup(self.registry.stop)

    def push(self, name: str) -> str:
        return images.get(name).push(self.registry.host)

    def warm(self, name: str, config: pathlib.Path, *words) -> Warming:
        warming = Warming(self.env.binary(), self.work / name, config, *words)
        self.addCleanup(warming.wait)
        self.addCleanup(warming.kill)
        return warming

    def must_warm(self, name: str, config: pathlib.Path, *words) -> Warming:
        warming = self.warm(name, config, *words)
        self.assertEqual(warming.ended(), 0, warming.log.read_text())
        return warming

    def remote_gets(self, worker: driver.Worker) -> float:
        return worker.metric("remote_requests_total", op="get")

    def check_node(self, name: str, image: str, reference: str, config: pathlib.Path) -> None:
        """A pod on the node `name`, which is warm, finds all of it there."""
        worker = self.worker(f"{name}-node", config=config, cache_dir=self.work / name / "cache")
        mark = self.registry.mark()
        worker.must_publish("v", reference)
        self.assert_tree(image, worker.target("v"))
        self.assertEqual(set(self.layer_gets(image, mark)), {0}, "layers were asked for")
        self.assertEqual(sum(self.registry.blob_gets(mark).values()), 0, "a blob was asked for, such as the configuration")
        self.assertEqual(self.remote_gets(worker), 1, "the remote was asked for more than the configuration")
        worker.must_unpublish("v")
        worker.stop()

    def test_16_nodes_ask_the_registry_for_each_layer_once(self):
        name = "demo1"
        reference = self.push(name)
        config = self.config(redis=self.redis(), key_file=self.work / "key")
        seeded = self.must_warm("seeder", config, reference)
        self.assertEqual(set(self.layer_gets(name, 0)), {1})
        by_digest = seeded.said()["image"]
        self.assertRegex(by_digest, "@sha256:[0-9a-f]{64}$")
        mark = self.registry.mark()
        started = time.monotonic()
        nodes = [self.warm(f"n{number}", config, by_digest, "--local") for number in range(N_NODES)]
        self.assertEqual([it.ended() for it in nodes], [0] * N_NODES, nodes[0].log.read_text())
        seconds = time.monotonic() - started
        self.assertEqual(self.registry.mark(), mark, "nodes have no rights there, and need none")
        self.assertEqual(set(self.layer_gets(name, 0)), {1})
        self.assertEqual({it.count("registry") for it in nodes}, {0})
        wanted = {int(it.said()["layers"].split(", ")[1].split()[0]) for it in nodes}
        self.assertEqual({it.count("remote") for it in nodes}, wanted)
        (bytes_each,) = wanted
        print(f"{N_NODES} nodes filled at once from Redis with {bytes_each / 1e6:.0f} MB each in {seconds:.1f} s: {N_NODES * bytes_each / seconds / 1e6:.0f} MB/s in all; "
              f"VmHWM at most {max(it.most_bytes for it in nodes) / 1e6:.1f} MB")
        self.check_node("n0", name, reference, config)

    def test_every_store_can_be_seeded(self):
        name = "demo1"
        reference = self.push(name)
        for engine, where in {"dir": {"remote_dir": self.work / "shared"}, "s3": {"s3": self.s3()}}.items():
            with self.subTest(engine):
                config = self.config(f"{engine}.toml", key_file=self.work / "key", **where)
                mark = self.registry.mark()
                seeded = self.must_warm(f"{engine}-a", config, reference)
                self.assertEqual(set(self.layer_gets(name, mark)), {1})
                again = self.must_warm(f"{engine}-b", config, reference)
                self.assertEqual((again.count("registry"), again.count("remote")), (0, 0))
                by_digest = seeded.said()["image"]
                self.must_warm(f"{engine}-c", config, by_digest, "--local")
                self.check_node(f"{engine}-c", name, reference, config)

    def test_a_seeder_that_is_killed_is_followed_by_another_one(self):
        name = "demo5"
        reference = self.push(name)
        redis = self.redis()
        config = self.config(redis=redis, key_file=self.work / "key")
        whole = self.must_warm("measured", self.config("measured.toml", redis=self.redis(), key_file=self.work / "key"), reference)
        manifest_key = f"clip:oci:image:manifest:{whole.said()['image'].rpartition('@')[2]}"
        killed = []
        # In turn with the cache of the one before, and with none, as on another machine.
        for number, cache in enumerate(("one", "one", "two")):
            seeder = self.warm(cache, config, reference)
            if number == 0:
                # It has put something: a lease, and some of 150 chunks.
                process.wait_until(lambda: int(redis.command("DBSIZE")) > 5, "some chunks to be put")
            else:
                time.sleep(self.dice.uniform(0.1, 0.4) * whole.seconds)
            seeder.kill()
            seeder.wait()
            killed.append(seeder)
            if number == 0:
                self.assertEqual(redis.command("EXISTS", manifest_key), "0", "it was killed in the middle")
        mark = self.registry.mark()
        last = self.must_warm("three", config, reference)
        # What the ones before had put is not put again.
        self.assertLess(last.count("remote"), whole.count("remote"))
        self.assertLessEqual(set(self.layer_gets(name, mark)), {0, 1})
        print(f"after {len(killed)} kills (seed {self.seed}): {last.count('remote') / 1e6:.0f} of {whole.count('remote') / 1e6:.0f} MB were left to put, in {last.seconds:.1f} s of {whole.seconds:.1f} s")
        self.must_warm("node", config, last.said()["image"], "--local")
        self.check_node("node", name, reference, config)

    def test_what_goes_wrong_is_said(self):
        name = "demo1"
        reference = self.push(name)
        redis = self.redis()
        config = self.config(redis=redis, key_file=self.work / "key")
        seeded = self.must_warm("seeder", config, reference)
        by_digest = seeded.said()["image"]

        def fails(node: str, config, words, status: int, *expected: str) -> None:
            warming = self.warm(node, config, *words)
            self.assertEqual(warming.ended(), status, warming.log.read_text())
            for it in expected:
                self.assertIn(it, warming.log.read_text())

        with self.subTest("no remote"):
            fails("no-remote", self.config("none.toml"), [reference], EXIT_USAGE, "remote.kind")
        with self.subTest("no such image"):
            fails("no-image", config, [f"{self.registry.host}/e2e/none:latest"], 1, "NotFound")
        with self.subTest("not seeded"):
            fails("not-seeded", config, [f"{self.registry.host}/e2e/none@sha256:{'0' * 64}", "--local"], EXIT_TRY_AGAIN, "NotSeeded", "seed it")
        with self.subTest("a damaged manifest"):
            key = f"clip:oci:image:manifest:{by_digest.rpartition('@')[2]}"
            self.assertNotEqual(redis.command("SETRANGE", key, "10", "damaged-by-the-test"), None)
            fails("damaged", config, [by_digest, "--local"], EXIT_TRY_AGAIN, "NotSeeded", "the manifest")
            self.assertEqual(redis.command("EXISTS", key), "0", "it was deleted")
            again = self.must_warm("seeder", config, reference)
            self.assertEqual(again.count("registry"), 0)
        with self.subTest("a full disk"):
            (self.work / "full").mkdir()
            cache = self.work / "full" / "cache"
            cache.mkdir()
            process.run("mount", "-t", "tmpfs", "-o", "size=12m", "none", cache)
            small = self.config("small.toml", redis=redis, key_file=self.work / "key", cache={"min_free_bytes": 1 << 20})
            fails("full", small, [by_digest, "--local"], EXIT_TRY_AGAIN, "NoSpace", "bytes more on the cache disk")
            self.must_warm("full", small, by_digest, "--local", "--what", "index")
            process.run("umount", cache)
        with self.subTest("a remote that is too small"):
            # It has no room for what has no TTL, such as the index, once it is full of what is not evicted.
            tiny = self.redis(maxmemory="3mb")
            tiny.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
            fails("too-small", self.config("tiny.toml", redis=tiny, key_file=self.work / "key"), [reference], EXIT_TRY_AGAIN, "RemoteRefuses", "maxmemory")
        with self.subTest("a remote that is down"):
            redis.kill()
            mark = self.registry.mark()
            fails("down", config, [by_digest, "--local"], EXIT_TRY_AGAIN, "RemoteDown")
            fails("down", config, [reference], EXIT_TRY_AGAIN, "RemoteDown")
            self.assertEqual(set(self.layer_gets(name, mark)), {0}, "nobody asks the registry in its place")

    def test_chunks_that_were_evicted_are_put_again(self):
        name = "demo1"
        reference = self.push(name)
        redis = self.redis()
        config = self.config(redis=redis, key_file=self.work / "key")
        seeded = self.must_warm("seeder", config, reference)
        keys = sorted(process.run("redis-cli", "-p", str(redis.port), "--scan", "--pattern", "clip:*:o:*").stdout.split())
        gone = self.dice.sample(keys, 3)
        process.run("redis-cli", "-p", str(redis.port), "del", *gone)
        by_digest = seeded.said()["image"]
        lacking = self.warm("node", config, by_digest, "--local")
        self.assertEqual(lacking.ended(), EXIT_TRY_AGAIN)
        self.assertIn("NotSeeded", lacking.log.read_text())
        # By whoever has the layer no more.
        again = self.must_warm("other-seeder", config, reference)
        self.assertLess(0, again.count("remote"))
        self.assertLess(again.count("remote"), 5 << 20)
        self.must_warm("node", config, by_digest, "--local")
        self.check_node("node", name, reference, config)

    def test_an_index_is_pushed_beside(self):
        reference = self.push("small")
        config = self.config(redis=self.redis(), key_file=self.work / "key")
        pushed = self.must_warm("seeder", config, reference, "--push-index")
        self.assertRegex(pushed.said()["index"], "^sha256:[0-9a-f]{64}$")

    def test_the_pace_is_kept(self):
        reference = self.push("demo1")
        config = self.config(remote_dir=self.work / "shared", key_file=self.work / "key")
        seeded = self.must_warm("seeder", config, reference)
        rate = 20_000_000
        node = self.must_warm("node", config, seeded.said()["image"], "--local", "--bytes-per-second", rate)
        self.assertLess(node.count("remote") / rate - 0.3, node.seconds)

    def test_memory_does_not_grow_with_the_image(self):
        reference = self.push("demo5")
        config = self.config(redis=self.redis(), key_file=self.work / "key")
        seeded = self.must_warm("seeder", config, reference)
        node = self.must_warm("node", config, seeded.said()["image"], "--local")
        print(f"5 layers of 30 MB: seeding VmHWM {seeded.most_bytes / 1e6:.1f} MB in {seeded.seconds:.1f} s, filling VmHWM {node.most_bytes / 1e6:.1f} MB in {node.seconds:.1f} s")
        self.assertLess(node.most_bytes, MOST_FILLING)
        self.assertLess(seeded.most_bytes, MOST_SEEDING)
