"""The remote content cache: another node's cold disk is filled from it, and its faults hurt nobody."""

import pathlib
import threading
import time

import images
import tree
from harness import delay, driver, process
from harness.environment import Case


class Remote(Case):
    def warm(self, name: str, config) -> driver.Worker:
        """Worker A reads the image and puts it into the remote cache."""
        a = self.worker(f"a-{name}", config=config)
        a.must_publish("v", self.env.push(name))
        self.assert_tree(name, a.target("v"))
        n_layers = len(set(images.get(name).layout.diff_ids(images.TAG)))
        process.wait_until(lambda: a.metric("remote_uploads_total", outcome="ok") >= n_layers, "the uploads", 120)
        a.must_unpublish("v")
        a.stop()
        return a

    def check_second_node(self, name: str, config) -> None:
        b = self.worker(f"b-{name}", config=config)
        mark = self.registry.mark()
        b.must_publish("v", self.env.push(name))
        self.assert_tree(name, b.target("v"))
        self.assertEqual(set(self.layer_gets(name, mark)), {0}, "layers come from the remote cache")
        self.assertEqual(b.metric("layer_decompressions_total", outcome="ok"), 0)
        self.assertGreater(b.metric("remote_requests_total", op="get", outcome="hit"), 0)

    def test_second_node_asks_the_registry_for_no_layer(self):
        config = self.config(redis=self.redis(), key_file=self.work / "key")
        for name in ("demo5", "nasty", "zstd"):
            with self.subTest(name):
                self.warm(name, config)
                self.check_second_node(name, config)

    def test_a_directory_does_the_same(self):
        config = self.config(remote_dir=self.work / "shared", key_file=self.work / "key")
        self.warm("demo5", config)
        self.check_second_node("demo5", config)

    def test_a_bucket_does_the_same(self):
        config = self.config(s3=self.s3(), key_file=self.work / "key")
        self.warm("demo5", config)
        self.check_second_node("demo5", config)

    def test_nodes_that_start_together_ask_the_registry_for_each_layer_once(self):
        name = "demo5"
        image = self.env.push(name)
        for engine, where in {"redis": {"redis": self.redis()}, "dir": {"remote_dir": self.work / "shared"}, "s3": {"s3": self.s3()}}.items():
            with self.subTest(engine):
                # On a busy machine a node would take a remote that answers late for one that is down, and go on without it.
                patient = {"request_timeout_ms": 20_000, "connect_timeout_ms": 10_000, "lease_wait_seconds": 120}
                config = self.config(f"{engine}.toml", key_file=self.work / "key", remote=patient, **where)
                nodes = [self.worker(f"{engine}-{node}", config=config) for node in "abc"]
                mark = self.registry.mark()
                threads = [threading.Thread(target=node.must_publish, args=("v", image)) for node in nodes]
                for it in threads:
                    it.start()
                for it in threads:
                    it.join()
                for node in nodes:
                    self.assert_tree(name, node.target("v"))
                self.assertEqual(set(self.layer_gets(name, mark)), {1})
                waits = sum(node.metric("remote_lease_waits_total", outcome="made") for node in nodes)
                self.assertGreater(waits, 0, "some have waited")

    def far_away(self, redis, seconds: float, name: str) -> tuple[delay.DelayProxy, driver.Worker]:
        """A node to which Redis answers after twice so many seconds, and whose patience is long. Nothing is fetched for it ahead of its readers."""
        proxy = delay.DelayProxy(redis.port, seconds)
        self.addCleanup(proxy.stop)
        patient = {"request_timeout_ms": 60_000, "connect_timeout_ms": 20_000}
        config = self.config(f"{name}.toml", redis=proxy, key_file=self.work / "key", remote=patient, cache={"prefetch": "none"})
        return proxy, self.worker(name, config=config)

    def test_who_reads_in_order_does_not_wait_for_a_round_trip_for_each_chunk(self):
        redis = self.redis()
        self.warm("demo1", self.config(redis=redis, key_file=self.work / "key"))
        seconds = 0.4
        _, b = self.far_away(redis, seconds / 2, "far")
        b.must_publish("v", self.env.push("demo1"))
        # As they come in the layers.
        files = sorted(it for it in pathlib.Path(b.target("v")).rglob("*") if it.is_file() and not it.is_symlink())
        before = b.metric("remote_requests_total", op="get", outcome="hit")
        started = time.monotonic()
        for it in files:
            it.read_bytes()
        took = time.monotonic() - started
        chunks = b.metric("remote_requests_total", op="get", outcome="hit") - before
        self.assertGreater(chunks, 20, "the files lie in some chunks")
        self.assertLess(took, 0.7 * chunks * seconds, f"{chunks} chunks, one round trip each would be {chunks * seconds:.1f} s")

    def test_a_connection_that_stalls_is_gone_round(self):
        redis = self.redis()
        name = "demo5"
        self.warm(name, self.config(redis=redis, key_file=self.work / "key"))
        proxy, b = self.far_away(redis, 0, "stalled")
        mark = self.registry.mark()
        b.must_publish("v", self.env.push(name))
        files = [it for it in pathlib.Path(b.target("v")).rglob("*") if it.is_file() and not it.is_symlink()]
        self.dice.shuffle(files)
        half = len(files) // 2
        for it in files[:half]:
            it.read_bytes()
        before = b.metric("remote_hedges_total", outcome="won")
        proxy.stall()
        started = time.monotonic()
        for it in files[half:]:
            it.read_bytes()
        took = time.monotonic() - started
        self.assert_tree(name, b.target("v"))
        self.assertGreater(b.metric("remote_hedges_total", outcome="won"), before)
        self.assertLess(took, 60, "nobody waited until the request was given up")
        self.assertEqual(b.metric("remote_up"), 1)
        self.assertEqual(set(self.layer_gets(name, mark)), {0}, "layers come from the remote cache")

    def test_a_cached_layer_is_no_permission(self):
        """The registry is asked for the manifest each time, also when all is cached."""
        config = self.config(redis=self.redis(), key_file=self.work / "key")
        self.warm("small", config)
        b = self.worker("b", config=config)
        reply = b.publish("v", f"{self.registry.host}/e2e/none:latest")
        self.assertEqual(reply.code, "NOT_FOUND", reply)

    def test_redis_killed_while_it_is_read(self):
        redis = self.redis()
        config = self.config(redis=redis, key_file=self.work / "key")
        self.warm("demo5", config)
        b = self.worker("b", config=config)
        b.must_publish("v", self.env.push("demo5"))
        # Soon after the first reads, while most of the chunks are still to come.
        timer = threading.Timer(self.dice.uniform(0, 0.3), redis.kill)
        timer.start()
        self.addCleanup(timer.cancel)
        self.assert_tree("demo5", b.target("v"))
        timer.join()
        self.assertFalse(redis.server.alive())
        # And a publish with the remote dead for good.
        b.must_unpublish("v")
        b.must_publish("w", self.env.push("multi-member"))
        self.assert_tree("multi-member", b.target("w"))
        self.assertEqual(b.metric("remote_up"), 0)

    def test_redis_down_while_layers_are_made_and_up_again_later(self):
        redis = self.redis()
        config = self.config(redis=redis, key_file=self.work / "key")
        redis.kill()
        a = self.worker("a", config=config)
        a.must_publish("v", self.env.push("demo1"))
        self.assert_tree("demo1", a.target("v"))
        again = self.redis(port=redis.port)
        self.assertTrue(again.server.alive())
        # It is used again without a restart: the next layers reach it.
        a.must_publish("w", self.env.push("nasty"))
        self.assert_tree("nasty", a.target("w"))
        process.wait_until(lambda: a.metric("remote_up") == 1 or a.metric("remote_uploads_total", outcome="ok") > 0, "the remote to be used again", 90)

    def test_damaged_values_are_found_and_replaced_from_the_registry(self):
        redis = self.redis()
        config = self.config(redis=redis, key_file=self.work / "key")
        self.warm("demo1", config)
        keys = process.run("redis-cli", "-p", str(redis.port), "--scan", "--pattern", "clip:*").stdout.split()
        self.assertGreater(len(keys), 10, "the layer is there in chunks")
        for key in keys:
            process.run("redis-cli", "-p", str(redis.port), "setrange", key, "100", "damaged-by-the-test")
        b = self.worker("b", config=config)
        b.must_publish("v", self.env.push("demo1"))
        self.assert_tree("demo1", b.target("v"))
        self.assertGreater(b.metric("verify_failures_total", tier="content_cache"), 0)

    def test_some_chunks_evicted(self):
        redis = self.redis()
        config = self.config(redis=redis, key_file=self.work / "key")
        self.warm("demo5", config)
        keys = sorted(process.run("redis-cli", "-p", str(redis.port), "--scan", "--pattern", "clip:*:o:*").stdout.split())
        gone = self.dice.sample(keys, len(keys) // 3)
        process.run("redis-cli", "-p", str(redis.port), "del", *gone)
        b = self.worker("b", config=config)
        b.must_publish("v", self.env.push("demo5"))
        self.assert_tree("demo5", b.target("v"))

    def test_a_redis_that_is_too_small_slows_nobody_down(self):
        redis = self.redis(maxmemory="8mb")
        config = self.config(redis=redis, key_file=self.work / "key")
        a = self.worker("a", config=config)
        a.must_publish("v", self.env.push("demo5"))
        self.assert_tree("demo5", a.target("v"))
        b = self.worker("b", config=config)
        b.must_publish("v", self.env.push("demo5"))
        self.assert_tree("demo5", b.target("v"))

    def test_another_key_is_another_installation(self):
        redis = self.redis()
        self.warm("demo1", self.config(redis=redis, key_file=self.work / "key"))
        b = self.worker("b", config=self.config("other.toml", redis=redis, key_file=self.work / "other-key"))
        b.must_publish("v", self.env.push("demo1"))
        self.assert_tree("demo1", b.target("v"))
        self.assertEqual(b.metric("layer_decompressions_total", outcome="ok"), 1, "what the other installation wrote is not believed")
