"""Bad input: the right gRPC code, one clear sentence, nothing left behind, and the worker lives on."""

import os
import shutil

import images
import tree
from harness import driver, process, services
from harness.environment import Case

# Codes after which kubelet gives up: nothing that it could try again would help.
FINAL = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "DATA_LOSS", "OUT_OF_RANGE"}
# What a pod's events show well.
MAX_MESSAGE_BYTES = 600


class BadInput(Case):
    def refuse(self, worker: driver.Worker, codes: set[str], says: list[str], image: str, *words, **attributes) -> driver.Reply:
        """Publishing must fail like this."""
        reply = worker.publish("bad", image, *words, **attributes)
        self.assertIn(reply.code, codes, reply)
        self.check_sentence(reply.message, says)
        self.assertTrue(worker.server.alive(), worker.tail())
        self.assertEqual(worker.left_behind(), [], reply)
        # A call again gives the same answer, and not what a half-made state would give.
        self.assertEqual(worker.publish("bad", image, *words, **attributes).code, reply.code)
        self.assertTrue(worker.unpublish("bad").ok)
        return reply

    def check_sentence(self, message: str, says: list[str]) -> None:
        self.assertGreater(len(message), 10, "an error without a sentence")
        self.assertLess(len(message), MAX_MESSAGE_BYTES, message)
        self.assertNotRegex(message, r"\n|panicked|RUST_BACKTRACE|Error \{|Some\(|\w+Error\(", "for people, not for debuggers")
        parts = message.split(": ")
        self.assertFalse([it for it, following in zip(parts, parts[1:]) if it == following], f"says one thing twice: {message}")
        for words in says:
            self.assertIn(words.lower(), message.lower(), f"the message must name {words!r}")

    def test_wrong_requests(self):
        worker = self.worker()
        good = self.env.push("small")
        for says, image, words, attributes in [
            (["imgae"], good, [], {"imgae": "typo"}),
            (["image"], "", [], {}),
            ([], "UPPER case/is:wrong", [], {}),
            ([], f"{self.registry.host}/e2e/small:bad tag", [], {}),
            ([], f"{self.registry.host}/e2e/small@sha256:1234", [], {}),
            ([], "https://example.com/image", [], {}),
            (["platform"], good, [], {"platform": "not-a-platform"}),
            ([], good, ["--block"], {}),
            ([], good, ["--no-capability"], {}),
        ]:
            with self.subTest(image=image, words=words, attributes=attributes):
                self.refuse(worker, {"INVALID_ARGUMENT"}, says, image, *words, **attributes)

    def test_wrong_targets(self):
        worker = self.worker()
        good = self.env.push("small")
        for target in ("relative/path", "/", str(self.work / "no-such-parent/deep/mount"), "/proc/clip"):
            with self.subTest(target):
                reply = worker.csi("publish", "bad", target, f"image={good}")
                self.assertNotEqual(reply.code, "OK", reply)
                self.check_sentence(reply.message, [])
        full = worker.target("full")
        full.mkdir(parents=True)
        (full / "precious").write_text("do not hide or delete")
        reply = worker.publish("full", good)
        worker.unpublish("full")
        self.assertEqual((full / "precious").read_text(), "do not hide or delete", reply)
        shutil.rmtree(full.parent)
        self.assertEqual(worker.left_behind(), [])

    def test_missing_images(self):
        worker = self.worker()
        self.env.push("small")
        for name in ("e2e/none:latest", "e2e/small:no-such-tag", f"e2e/small@sha256:{'0' * 64}"):
            with self.subTest(name):
                self.refuse(worker, {"NOT_FOUND"}, [name.split("@")[0].split(":")[0]], f"{self.registry.host}/{name}")

    def test_wrong_platform(self):
        worker = self.worker()
        # Which platforms there are helps who has to choose another image.
        self.refuse(worker, {"NOT_FOUND"}, ["amd64" if os.uname().machine == "x86_64" else "arm64", "s390x"], self.env.push("foreign"))
        self.refuse(worker, {"NOT_FOUND"}, ["riscv64"], self.env.push("multi-arch"), platform="linux/riscv64")

    def test_registry_down(self):
        worker = self.worker(config=self.config(plain_http=[f"127.0.0.1:{(port := process.free_port())}"], registry={"retries": 1, "max_backoff_seconds": 1}))
        self.refuse(worker, {"UNAVAILABLE"}, [f"127.0.0.1:{port}"], f"127.0.0.1:{port}/e2e/small:latest")

    def test_corrupt_images(self):
        worker = self.worker()
        for name in ("lying", "truncated", "bad-crc", "not-a-tar", "not-gzip", "odd-media-type", "fewer-diff-ids"):
            with self.subTest(name):
                # A type that nobody knows is not damage: another image has to be named.
                self.refuse(worker, {"INVALID_ARGUMENT"} if name == "odd-media-type" else {"DATA_LOSS"}, [f"e2e/{name}"], self.env.push(name))
                self.assertEqual(worker.metric("layer_decompressions_total", outcome="ok"), 0, "nothing of it counts as a layer")
        # None of it was kept.
        self.assertEqual(worker.metric("layer_cache_layers"), 0)
        worker.must_publish("v", self.env.push("small"))
        self.assert_tree("small", worker.target("v"))

    def test_bomb(self):
        worker = self.worker(config=self.config(cache={"max_layer_bytes": 100 << 20}))
        self.refuse(worker, {"FAILED_PRECONDITION"}, ["max_layer_bytes"], self.env.push("bomb"))
        used = int(process.run("du", "-s", "--block-size=1", worker.cache_dir).stdout.split()[0])
        self.assertLess(used, 10 << 20, "what was unpacked before the limit is not kept")
        self.assertLess(worker.memory()["VmHWM"], 40e6)

    def test_full_disk(self):
        disk = self.mountpoint("disk")
        process.run("mount", "-t", "tmpfs", "-o", "size=48m", "clip-e2e", disk)
        worker = self.worker(config=self.config(cache={"min_free_bytes": 1 << 20}), cache_dir=disk / "cache")
        self.refuse(worker, {"RESOURCE_EXHAUSTED"}, [str(disk)], self.env.push("demo5"))
        # What fits is mounted still, without a restart.
        worker.must_publish("v", self.env.push("small"))
        self.assert_tree("small", worker.target("v"))

    def test_disk_that_becomes_full_under_a_mount(self):
        """What is on disk stays readable; what is not is right or EIO, never wrong."""
        disk = self.mountpoint("disk")
        process.run("mount", "-t", "tmpfs", "-o", "size=400m", "clip-e2e", disk)
        worker = self.worker(config=self.config(cache={"min_free_bytes": 1 << 20}), cache_dir=disk / "cache")
        worker.must_publish("v", self.env.push("demo1"))
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(bytes(free - (512 << 10)))
        self.assert_tree("demo1", worker.target("v"))

    def test_commands_say_one_sentence(self):
        directory = self.mountpoint()
        for image, says in [(f"{self.registry.host}/e2e/none:latest", ["e2e/none"]), ("UPPER case", []), (self.env.push("lying"), ["e2e/lying"])]:
            with self.subTest(image):
                done = driver.clip("mount", image, directory, config=self.config(), cache_dir=self.work / "cache", check=False, timeout=60)
                self.assertNotEqual(done.returncode, 0)
                self.assertEqual(process.mounts_below(directory), [])
                self.check_sentence(done.stderr.strip().splitlines()[-1], says)
        for words in (["mount", self.env.push("small"), self.work / "no-such-dir"], ["unmount", directory], ["unmount", "/"], ["index", "inspect", "/etc/passwd"]):
            with self.subTest(words):
                done = driver.clip(*words, config=self.config(), cache_dir=self.work / "cache", check=False, timeout=60)
                self.assertNotEqual(done.returncode, 0)
                self.check_sentence(done.stderr.strip().splitlines()[-1], [])

    def test_bad_configuration_is_named(self):
        for text, says in [("[cache]\nmax_bites = 1\n", ["max_bites"]), ("this is not TOML", []), ('[remote]\nkind = "floppy"\n', ["floppy"])]:
            with self.subTest(text):
                file = self.work / "bad.toml"
                file.write_text(text)
                done = driver.clip("node", "--endpoint", f"unix://{self.work}/x.sock", "--node-id", "x", "--state-dir", self.work / "s", config=file, check=False, timeout=20)
                self.assertNotEqual(done.returncode, 0)
                self.assertFalse((self.work / "x.sock").exists(), "nothing is bound before the configuration is read")
                for words in says:
                    self.assertIn(words, done.stderr)


class Hostile(Case):
    """Layers that no honest tool writes: refused for good, or mounted without harm."""

    def test_hostile_layers(self):
        worker = self.worker()
        pid = worker.server.pid
        (outside := self.work / "outside").write_text("must stay")
        for name in images.HOSTILE:
            with self.subTest(name):
                reference = self.env.push(name)
                reply = worker.publish("v", reference, timeout="60s")
                self.assertTrue(worker.server.alive(), f"{name} ended the worker:\n{worker.tail()}")
                if reply.ok:
                    # Whatever the odd entry became, walking and reading does no harm and the rest is there.
                    # A tree of 10,000 levels cannot be walked by path.
                    if "deep" not in name and "5000" not in name:
                        tree.manifest(str(worker.target("v")))
                    self.assertEqual((worker.target("v") / "victim/file").read_bytes(), b"must stay")
                else:
                    self.assertIn(reply.code, FINAL | {"RESOURCE_EXHAUSTED"}, reply)
                    self.assertLess(len(reply.message), 2 * MAX_MESSAGE_BYTES, "a message is not a dump")
                self.assertTrue(worker.unpublish("v").ok)
                self.assertEqual(worker.left_behind(), [])
        self.assertEqual((worker.server.pid, outside.read_text()), (pid, "must stay"))
        self.assertLess(worker.memory()["VmHWM"], 60e6, "no header made it hold what it claims")
