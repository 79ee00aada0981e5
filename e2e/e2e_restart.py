"""A restart never hurts: whatever of agent, serve and node dies, pods see a pause and no error."""

import contextlib
import errno
import os
import shutil
import subprocess
import time

import images
from harness import driver, process, reading, services, trio
from harness.environment import Case
from harness.memory_group import MemoryGroup, why_not
from harness.slow import Slow

# Of each role, in one test.
KILLS = int(os.environ.get("CLIP_E2E_RESTARTS", "40"))
HAND_OVERS = max(KILLS // 3, 3)
ROLLOUTS = 4
OOM_KILLS = 6
OOM_LIMIT_BYTES = 64 << 20
DEADLINE_SECONDS = 2
IMAGE = "demo5"
# Slow enough that the image's 50 MB (as chunks: 75 MB) are still on their way when something dies.
SLOW_BYTES_PER_SECOND = 32 << 20
# In the remote cache's keys.
CHUNKS = "clip:*:o:*"
# One cold round: the cache is emptied for each.
KILLS_PER_COLD_ROUND = 17
# From one death to the next, at most.
MOST_BETWEEN_SECONDS = 0.15
# Readers have begun to read after this long.
WARM_UP_SECONDS = 0.3


class UnderReaders(Case):
    """What all tests with readers do: start them, have something die again and again, compare and count."""

    def setUp(self):
        super().setUp()
        self.plan = self.env.plan(IMAGE)
        self.begin_anew()
        print(f"seed {self.seed}")

    def begin_anew(self) -> None:
        # Times on the clock of time.monotonic(): from a death until all is back.
        self.windows: list[tuple[float, float]] = []
        self.seen = reading.Report({}, 0, [], [])

    @contextlib.contextmanager
    def readers(self, node: trio.Trio, volume="v", **settings):
        """Readers of a volume while the block runs; what they saw is added up."""
        started = reading.Readers(node.target(volume), self.plan, self.dice.randrange(1 << 30), **settings)
        self.addCleanup(started.kill)
        time.sleep(WARM_UP_SECONDS)
        try:
            yield
        finally:
            self.seen.add(started.stop())

    def strike(self, node: trio.Trio, blow) -> None:
        """Something dies at a random moment; the pause is what the longest operation took until all is back."""
        time.sleep(self.dice.uniform(0, MOST_BETWEEN_SECONDS))
        at = time.monotonic()
        blow()
        self.assertTrue(trio.answers(node.target("v")), "nobody answers any more")
        self.windows.append((at, time.monotonic()))

    def verdict(self, what: str, operations_at_least: int = 1) -> None:
        """Prints the figures, and fails if a reader saw anything wrong, or saw nothing. While an image is fetched, a pause is also the wait for that."""
        seen = self.seen
        print(f"{what}: {len(self.windows)} times; read errors: {len(seen.errors)}; pause p50/p99/max {reading.spread(seen.pauses(self.windows))} "
              f"(operations in between, of those above 1 ms: {reading.spread(seen.outside(self.windows))}); "
              f"{sum(seen.operations.values())} operations, {seen.n_bytes / 1e6:.0f} MB compared")
        self.assertEqual(seen.errors, [])
        for kind, count in seen.operations.items():
            self.assertGreaterEqual(count, operations_at_least, f"the reader {kind} has hardly read anything")

    def left(self, node: trio.Trio) -> list[str]:
        """What is left once it had the time to go."""
        with contextlib.suppress(process.Failed):
            process.wait_until(lambda: not node.left_behind(), "all to be gone", 10)
        return node.left_behind()

    # --- where the image comes from ---

    def warm(self, **node) -> trio.Trio:
        """A node that has the image on its disk."""
        it = self.trio(config=self.config(node=node))
        it.must_publish("v", self.env.push(IMAGE))
        self.assert_tree(IMAGE, it.target("v"))
        return it

    def remotes(self) -> tuple[services.Redis, services.Redis]:
        """Two remote caches that a node has filled with the image: one with all, one with the index alone."""
        full, index_only = self.redis(), self.redis()
        first = self.trio("first", self.config("fast.toml", redis=full, key_file=self.work / "key"))
        first.must_publish("v", self.env.push(IMAGE))
        self.assert_tree(IMAGE, first.target("v"))
        process.wait_until(lambda: first.metric("remote_uploads_total", outcome="ok") >= 5, "the uploads", 120)
        first.must_unpublish("v")
        first.stop()
        keys = set(redis_cli(full, "--scan", "--pattern", "*")) - set(redis_cli(full, "--scan", "--pattern", CHUNKS))
        redis_cli(full, "migrate", "127.0.0.1", str(index_only.port), "", "0", "10000", "copy", "keys", *sorted(keys))
        return full, index_only

    def cold_rounds(self, n_kills: int, strike, per_round: int = KILLS_PER_COLD_ROUND) -> None:
        """`strike` so many times while an image that is not on the disk is fetched: chunk by chunk from the remote, or the layers from the registry."""
        full, index_only = self.remotes()
        registry = self.slow(self.registry.port)
        # A reference names the host, so the slow way to the registry is another one.
        reference = self.env.push(IMAGE).replace(self.registry.host, registry.host, 1)
        configs = [
            self.config(f"{name}.toml", plain_http=[registry.host], redis=self.slow(redis.port), key_file=self.work / "key", node={"idle_source_seconds": 0})
            for name, redis in (("remote", full), ("registry", index_only))
        ]
        node = self.trio("cold", configs[0], start=())
        for number in range(-(-n_kills // per_round)):
            from_registry = number % 2 == 1
            node.config = configs[from_registry]
            for it in node.cache_dir.iterdir():
                shutil.rmtree(it) if it.is_dir() else it.unlink()
            keys = redis_cli(index_only, "--scan", "--pattern", CHUNKS)
            if keys:
                redis_cli(index_only, "del", *keys)
            node.start()
            mark, sent = self.registry.mark(), sent_bytes(full)
            node.must_publish("v", reference)
            with self.readers(node):
                for _ in range(min(per_round, n_kills - number * per_round)):
                    strike(node)
            if from_registry:
                self.assertGreater(sum(self.layer_gets(IMAGE, mark)), 0, "nothing came from the registry: the cache was not cold")
            else:
                self.assertGreater(sent_bytes(full) - sent, 4 << 20, "nothing came from the remote: the cache was not cold")
            self.assert_tree(IMAGE, node.target("v"))
            node.must_unpublish("v")
            node.stop()

    def slow(self, port: int) -> Slow:
        it = Slow(port, SLOW_BYTES_PER_SECOND)
        self.addCleanup(it.stop)
        return it


def redis_cli(redis: services.Redis, *words: str) -> list[str]:
    return process.run("redis-cli", "-p", str(redis.port), *words).stdout.split()


def sent_bytes(redis: services.Redis) -> int:
    [line] = [it for it in redis_cli(redis, "info", "stats") if it.startswith("total_net_output_bytes:")]
    return int(line.partition(":")[2])


class Killed(UnderReaders):
    """kill -9, again and again."""

    def kill_child(self, node: trio.Trio) -> None:
        def blow():
            node.kill_child()
            # Now and then the next one, too, while it takes over.
            if self.dice.random() < 0.2:
                time.sleep(self.dice.uniform(0, 0.03))
                node.kill_child()
        # A parent whose children die often makes a pause between them: nobody dies that often, so a fresh one is measured.
        if len(self.windows) % 2 == 0:
            self.assertEqual(node.hand_over().stop(), 0)
        self.strike(node, blow)

    def kill_serve(self, node: trio.Trio) -> None:
        self.strike(node, lambda: node.restart("serve", wait=False))

    def kill_agent(self, node: trio.Trio) -> None:
        def blow():
            # Every other one is asked to end, as when it is upgraded.
            if self.dice.random() < 0.5:
                node.kill("agent")
            else:
                self.assertEqual(node.stop("agent"), [0])
            node.start("agent")
        self.strike(node, blow)

    def kill_node(self, node: trio.Trio) -> None:
        self.strike(node, lambda: node.restart("node"))

    def run_killed(self, what: str, blow) -> None:
        """Half of the kills with all on the disk, half while it is fetched."""
        node = self.warm(idle_source_seconds=0)
        with self.readers(node):
            for _ in range(KILLS - KILLS // 2):
                blow(node)
        self.assert_tree(IMAGE, node.target("v"))
        node.must_unpublish("v")
        self.assertEqual(self.left(node), [])
        node.stop()
        self.verdict(f"{what} killed, cache warm", len(self.windows))
        self.begin_anew()
        self.cold_rounds(KILLS // 2, blow)
        self.verdict(f"{what} killed, cache cold")

    def test_serving_process_killed(self):
        self.run_killed("what serves", self.kill_child)

    def test_serve_killed_whole(self):
        self.run_killed("serve, parent and child,", self.kill_serve)

    def test_agent_killed_or_upgraded(self):
        self.run_killed("agent", self.kill_agent)

    def test_node_killed(self):
        self.run_killed("node", self.kill_node)


class HandOver(UnderReaders):
    """Another serve is started, takes the mounts over, and only then the former one is ended: an upgrade."""

    def hand_over(self, node: trio.Trio) -> None:
        former = []
        self.strike(node, lambda: former.append(node.hand_over()))
        self.assertEqual(process.children_of(former[0].pid), [], "the former one serves, too")
        self.assertEqual(former[0].stop(), 0)

    def test_handed_over(self):
        node = self.warm(idle_source_seconds=0)
        with self.readers(node):
            for _ in range(HAND_OVERS):
                self.hand_over(node)
                self.assertEqual(node.metric("serve_takeovers_total"), 1, "the one mount, by the latest serve")
        self.assertEqual(node.metric("mounts_aborted_total"), 0)
        node.must_unpublish("v")
        self.assertEqual(self.left(node), [])
        self.verdict("handed over, cache warm", len(self.windows))
        node.stop()
        self.begin_anew()
        self.cold_rounds(HAND_OVERS // 3, self.hand_over, per_round=max(HAND_OVERS // 6, 1))
        self.verdict("handed over, cache cold")

    def test_all_upgraded_under_load(self):
        """All three, one after the other and in any order, as a rollout of both DaemonSets."""
        node = self.warm(idle_source_seconds=0)

        def blow():
            for role in self.dice.sample(trio.ROLES, 3):
                if role == "serve":
                    node.hand_over().stop()
                else:
                    self.assertEqual(node.stop(role), [0])
                    node.start(role)

        with self.readers(node):
            for _ in range(ROLLOUTS):
                self.strike(node, blow)
                # What starts now meets what was there before.
                node.must_publish("w", self.env.push("small"))
                self.assert_tree("small", node.target("w"))
                node.must_unpublish("w")
        self.verdict("all upgraded", len(self.windows))
        node.must_unpublish("v")
        self.assertEqual(self.left(node), [])


class Lost(UnderReaders):
    """What cannot be saved is told, and the next pod has it again."""

    def assert_lost(self, path) -> None:
        with self.assertRaises(OSError) as raised:
            # Not `stat`, which the kernel answers from memory.
            os.statvfs(path)
        self.assertEqual(raised.exception.errno, errno.ENOTCONN)

    def test_all_killed_at_once(self):
        node = self.warm(idle_source_seconds=0)
        reference = self.env.push(IMAGE)
        node.must_publish("other", reference)
        with open(node.target("v") / sorted(images.get("demo1").note()["files"][0])[0], "rb", buffering=0) as held:
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            node.kill()
            with self.assertRaises(OSError) as raised:
                held.read(1)
            self.assertEqual(raised.exception.errno, errno.ENOTCONN)
        self.assert_lost(node.target("v"))
        node.start()
        process.wait_until(lambda: node.metric("dead_volumes") == 2, "the dead volumes to be counted")
        node.must_publish("new", reference)
        self.assert_tree(IMAGE, node.target("new"))
        # The old pod's stays lost, until it goes or is published again.
        self.assert_lost(node.target("v"))
        node.must_publish("other", reference)
        self.assert_tree(IMAGE, node.target("other"))
        for volume in ("v", "other", "new"):
            node.must_unpublish(volume)
        self.assertEqual(self.left(node), [])
        self.assertEqual(node.metric("dead_volumes"), 0)

    def test_machine_rebooted(self):
        """Records are there, mounts and processes are not."""
        node = self.warm(idle_source_seconds=0)
        node.kill()
        process.unmount_below(node.directory)
        shutil.rmtree(node.run_dir)
        node.prepare()
        node.start()
        node.must_publish("v", self.env.push(IMAGE))
        self.assert_tree(IMAGE, node.target("v"))
        node.must_unpublish("v")
        self.assertEqual(self.left(node), [])

    def test_a_mount_without_a_server_is_given_up(self):
        node = self.warm(server_deadline_seconds=DEADLINE_SECONDS, idle_source_seconds=0)
        node.kill("serve")
        begin = time.monotonic()
        # It waits as a pod's process does; the deadline ends that.
        waits = subprocess.run(["stat", "--file-system", node.target("v")], capture_output=True, text=True, timeout=DEADLINE_SECONDS + 10)
        waited = time.monotonic() - begin
        self.assertNotEqual(waits.returncode, 0)
        print(f"a reader without a server got its error after {waited:.1f} s: {waits.stderr.strip()}")
        self.assertGreater(waited, DEADLINE_SECONDS * 0.8)
        self.assertLess(waited, DEADLINE_SECONDS + 2)
        self.assertEqual((node.metric("mounts_aborted_total"), node.metric("serve_up")), (1, 0))
        self.assert_lost(node.target("v"))
        node.start("serve")
        node.must_publish("new", self.env.push(IMAGE))
        self.assert_tree(IMAGE, node.target("new"))
        self.assertEqual(node.metric("serve_up"), 1)
        self.assert_lost(node.target("v"))
        for volume in ("v", "new"):
            node.must_unpublish(volume)
        self.assertEqual(self.left(node), [])

    def test_a_server_that_comes_before_the_deadline_saves_all(self):
        """Also with the deadline's clock begun anew by each death."""
        node = self.warm(server_deadline_seconds=DEADLINE_SECONDS)
        for _ in range(3):
            node.kill("serve")
            # A reader could not tell: this is about the time alone.
            time.sleep(DEADLINE_SECONDS * 0.6)
            node.start("serve")
            self.assertTrue(trio.answers(node.target("v")))
        self.assertEqual(node.metric("mounts_aborted_total"), 0)
        driver.drop_from_page_cache(node.target("v"))
        self.assert_tree(IMAGE, node.target("v"))


class NodeRestarted(UnderReaders):
    def test_nothing_is_unmounted_and_nothing_leaks(self):
        node = self.warm(idle_source_seconds=0)
        node.must_publish("w", self.env.push("small"))
        node.must_publish("v2", self.env.push(IMAGE))

        def state():
            return {
                "mounts": sorted(process.mounts_below(node.directory)),
                "records": sorted(it.name for it in node.state_dir.glob("volumes/*")),
                "FUSE": {role: node.fuse_fds(role) for role in trio.ROLES},
            }

        def taken():
            """Files and threads: some come and go with connections."""
            return {role: (len(process.open_files(node.pid(role))), len(os.listdir(f"/proc/{node.pid(role)}/task"))) for role in trio.ROLES}

        node.restart("node")
        process.wait_until(lambda: node.metric("serve_up") == 1, "node to have met serve")
        before, taken_before = state(), taken()
        self.assertEqual(before["FUSE"]["agent"], 0)
        for number in range(6):
            if number % 2:
                node.kill("node")
            else:
                self.assertEqual(node.stop("node"), [0])
            self.assert_tree("small", node.target("w"))
            node.start("node")
            process.wait_until(lambda: node.metric("serve_up") == 1, "node to have met serve")
        self.assertEqual(state(), before)

        def grown():
            return {role: (now, taken_before[role]) for role, now in taken().items() if now[0] > taken_before[role][0] or now[1] > taken_before[role][1]}

        with contextlib.suppress(process.Failed):
            process.wait_until(lambda: not grown(), "files and threads to be no more than before", 5)
        self.assertEqual(grown(), {}, "files and threads, after six restarts of node and before")
        self.assertEqual([node.metric(it) for it in ("mounts", "volumes", "dead_volumes")], [2, 3, 0])
        driver.drop_from_page_cache(node.target("v"))
        self.assert_tree(IMAGE, node.target("v"))
        # What the former node published the new one takes back.
        for volume in ("v", "w", "v2"):
            node.must_unpublish(volume)
        self.assertEqual(self.left(node), [])

    def test_pods_that_went_while_node_was_away(self):
        """Kubelet removes the directory of a pod that it could not unpublish only by force; what is left of it goes."""
        node = self.warm(idle_source_seconds=0)
        node.kill("node")
        process.unmount_below(node.target("v"))
        shutil.rmtree(node.target("v").parent)
        node.start("node")
        self.assertEqual(node.unpublish("v").code, "OK")
        self.assertEqual(self.left(node), [])


class OutOfMemory(UnderReaders):
    """The kernel kills a role in a control group whose memory has run out."""

    def setUp(self):
        super().setUp()
        reason = why_not()
        if reason:
            self.skipTest(reason)

    def group(self, role: str) -> MemoryGroup:
        group = MemoryGroup(role, OOM_LIMIT_BYTES)
        self.addCleanup(group.remove)
        return group

    def killed(self, node: trio.Trio, role: str, group: MemoryGroup) -> None:
        def blow():
            group.press(node.pid(role))
            # What restarts a container; serve's parent may have lived, and has started another child then.
            if not node.servers[role].alive():
                node.start(role, prefix=group.prefix)
        self.strike(node, blow)

    def test_serve(self):
        node = self.warm()
        group = self.group("serve")
        node.restart("serve", prefix=group.prefix)
        with self.readers(node):
            for _ in range(OOM_KILLS):
                self.killed(node, "serve", group)
        self.assertGreaterEqual(group.oom_kills(), OOM_KILLS)
        self.verdict("serve killed by the kernel for its memory", len(self.windows))

    def test_agent(self):
        group = self.group("agent")

        def strike(node: trio.Trio) -> None:
            if str(node.pid("agent")) not in (group.path / "cgroup.procs").read_text().split():
                node.restart("agent", prefix=group.prefix)
            self.killed(node, "agent", group)

        self.cold_rounds(OOM_KILLS, strike, per_round=OOM_KILLS // 2)
        self.assertGreaterEqual(group.oom_kills(), OOM_KILLS)
        self.verdict("agent killed by the kernel for its memory, cache cold")
