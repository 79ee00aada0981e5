"""Images that are whole on disk: the kernel serves them alone, byte for byte as the server does, whoever runs or does not run."""

import os
import pathlib
import secrets
import time

import images
import readers
import tree
from bench import node_cache
from e2e_crash import KILLED, at
from e2e_memory import N_FILES, many_files
from harness import driver, oci, paths, process, reading, trio
from harness.environment import Case

IMAGES = ["small", "debian-python", "nasty-kernel", "nasty-root", "nasty-extra", "zstd", "docker", "multi-arch", "demo5"]
# What is not mounted so: access control lists, which the kernel would obey and the server only shows; an archive that ends within a block.
UNFIT = ["nasty", "plain"]
IMAGE, IMAGE_BYTES = "demo5", 160_000_000
COMPLETE_SECONDS = 60
AWAY_SECONDS = 1
# Of the node service, whatever the image; MAX_NODES of src/erofs/mod.rs is three times as many files.
MOST_NODE_BYTES = 10_000_000


def erofs_is_missing() -> str:
    """Why the kernel cannot; empty if it can."""
    release = tuple(int(it) for it in os.uname().release.split("-")[0].split(".")[:2])
    known = pathlib.Path("/proc/filesystems").read_text().split()
    if "erofs" not in known or release < (6, 12):
        return "this kernel has no EROFS of files"
    if "selinuxfs" in known:
        return "this machine has SELinux, with which no image is mounted so"
    if process.run("stat", "--file-system", "--format=%T", paths.scratch().parent).stdout.strip() == "overlayfs":
        return f"{paths.scratch()} is on overlayfs, over which no image is mounted so"
    return ""


class InKernel(Case):
    def setUp(self):
        super().setUp()
        if erofs_is_missing():
            self.skipTest(erofs_is_missing())

    def node(self, name="a", cache_dir=None, **sections) -> trio.Trio:
        sections["node"] = {"kernel_mounts": "whole-on-any-kernel", "idle_source_seconds": 0, **sections.get("node", {})}
        return self.trio(name, self.config(f"{name}.toml", **sections), cache_dir=cache_dir)

    def file_system(self, directory) -> str:
        """What is mounted at a directory."""
        for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
            fields, rest = line.split(" - ")
            if process.unescape_mountinfo(fields.split()[4]) == str(directory):
                return rest.split()[0]
        return ""

    def publish(self, node: trio.Trio, volume: str, name: str, *words, **attributes) -> pathlib.Path:
        """An image of which all is on disk, as soon as it was indexed: whoever makes its index decompresses it."""
        node.must_publish(volume, self.env.push(name), *words, **attributes)
        self.assertEqual(self.file_system(node.target(volume)), "overlay" if words else "erofs")
        return node.target(volume)

    def gone(self, node: trio.Trio) -> None:
        process.wait_until(lambda: not node.left_behind(), "nothing to be left behind", 10)
        self.assertEqual(node.metric("kernel_mounts"), 0)


class Trees(InKernel):
    def check(self, name: str) -> None:
        node = self.node()
        directory = self.publish(node, "v", name)
        self.assertEqual(node.metric("kernel_mounts"), 1)
        self.assert_tree(name, directory)
        # Once more from the kernel's caches, and when they are empty.
        self.assertEqual(tree.manifest(str(directory), contents=False), tree.manifest(str(directory), contents=False))
        driver.drop_from_page_cache(directory)
        self.assert_tree(name, directory)
        node.must_unpublish("v")
        self.gone(node)

    def check_unfit(self, name: str) -> None:
        node = self.node()
        node.must_publish("v", self.env.push(name))
        self.assertEqual(self.file_system(node.target("v")), "fuse.clip")
        self.assert_tree(name, node.target("v"))
        node.must_unpublish("v")
        self.gone(node)


    def test_a_kernel_that_is_not_known_to_be_sound_gets_none(self):
        """Unless the operator says that it is, as all other cases here do."""
        node = self.node(node={"kernel_mounts": "whole"})
        node.must_publish("v", self.env.push("small"))
        distrusts = "is not known to have the fix" in node.log_of("node").read_text()
        self.assertEqual(self.file_system(node.target("v")), "fuse.clip" if distrusts else "erofs")


for _name in IMAGES:
    setattr(Trees, f"test_{_name.replace('-', '_')}", lambda self, name=_name: self.check(name))
for _name in UNFIT:
    setattr(Trees, f"test_{_name.replace('-', '_')}_is_served", lambda self, name=_name: self.check_unfit(name))


class Elsewhere(InKernel):
    """A cache on other file systems. Over overlayfs, what can be written would be one file system too many for the kernel: there the server serves."""

    def check(self, expected: str, *mount) -> None:
        cache = self.work / "cache"
        cache.mkdir()
        process.run("mount", *mount, cache)
        node = self.node(cache_dir=cache, node={"max_writable_bytes": 64 << 20})
        for volume, words in (("v", ()), ("w", ("--writable",))):
            node.must_publish(volume, self.env.push("small"), *words, **({"writable": "true", "writableSize": "8Mi"} if words else {}))
            self.assert_tree("small", node.target(volume))
        self.assertEqual(self.file_system(node.target("v")), expected)
        for volume in ("v", "w"):
            node.must_unpublish(volume)
        self.gone(node)

    def test_tmpfs(self):
        self.check("erofs", "-t", "tmpfs", "tmpfs")

    def test_overlayfs(self):
        for name in ("lower", "upper", "scratch"):
            (self.work / name).mkdir()
        self.check("fuse.clip", "-t", "overlay", "overlay", "-o", f"lowerdir={self.work}/lower,upperdir={self.work}/upper,workdir={self.work}/scratch")


class Views(InKernel):
    def test_a_directory_and_a_layer_that_can_be_written(self):
        node = self.node(node={"max_writable_bytes": 64 << 20})
        whole = self.publish(node, "v", IMAGE)
        part = self.publish(node, "p", IMAGE, path="layer-1")
        self.assertEqual(sorted(os.listdir(part)), sorted(os.listdir(whole / "layer-1")))
        written = self.publish(node, "w", IMAGE, "--writable", writable="true", writableSize="8Mi")
        self.assert_tree(IMAGE, written)
        (written / "layer-1" / "new").write_text("new")
        self.assertFalse((whole / "layer-1" / "new").exists())
        self.assertEqual(node.metric("kernel_mounts"), 1, "one mount for all volumes")
        # Another node service knows all of them.
        node.restart("node")
        self.assertEqual((node.metric("volumes"), node.metric("dead_volumes")), (3, 0))
        self.assertEqual((written / "layer-1" / "new").read_text(), "new")
        for volume in ("v", "p", "w"):
            node.must_unpublish(volume)
        self.gone(node)


class Nobody(InKernel):
    """Readers notice nothing, whoever is there."""

    def test_all_are_killed_and_stay_away(self):
        node = self.node()
        directory = self.publish(node, "v", IMAGE)
        # EROFS of files has no O_DIRECT.
        kinds = [kind for kind in readers.KINDS if kind != "direct"]
        started = reading.Readers(directory, self.env.plan(IMAGE), self.dice.randrange(1 << 30), kinds)
        self.addCleanup(started.kill)
        time.sleep(AWAY_SECONDS)
        for _ in range(3):
            node.kill()
            time.sleep(AWAY_SECONDS)
            node.start()
            self.assertEqual((node.metric("kernel_mounts"), node.metric("volumes"), node.metric("dead_volumes")), (1, 1, 0))
        # Who comes then is given the same mount.
        self.publish(node, "w", IMAGE)
        self.assertEqual(node.metric("kernel_mounts"), 1)
        seen = started.stop()
        print(f"{sum(seen.operations.values())} operations, {seen.n_bytes / 1e6:.0f} MB compared; read errors: {len(seen.errors)}")
        self.assertEqual(seen.errors, [])
        self.assertTrue(all(seen.operations.values()), seen.operations)
        node.must_unpublish("v")
        self.assert_tree(IMAGE, node.target("w"))
        node.must_unpublish("w")
        self.gone(node)

    def test_the_node_service_dies_at_each_step(self):
        node = self.node()
        self.publish(node, "v", IMAGE)
        for step in ("kernel:written", "kernel:mounted", "publish:recorded", "publish:bound", "unpublish:detached"):
            with self.subTest(step):
                node.restart("node", env=at(step))
                reply = node.publish("x", self.env.push("small"))
                if step.startswith("unpublish"):
                    reply = node.unpublish("x")
                self.assertFalse(reply.ok, reply)
                process.wait_until(lambda: not node.servers["node"].alive(), f"node to crash at {step}")
                self.assertEqual(node.servers["node"].process.returncode, KILLED)
                node.start("node")
                self.assertEqual(node.metric("kernel_mounts"), 2 if "publish" in step or step == "kernel:mounted" else 1)
                self.publish(node, "x", "small")
                self.assert_tree("small", node.target("x"))
                node.must_unpublish("x")
                self.assertFalse(node.target("x").exists())
        self.assert_tree(IMAGE, node.target("v"))
        node.must_unpublish("v")
        self.gone(node)


class Kept(InKernel):
    """Nothing is taken off the disk that is mounted, whoever knows of the mount."""

    def layers(self, node: trio.Trio) -> set[str]:
        return set(os.listdir(node.cache_dir / "layers"))

    def diff_ids(self, name: str) -> set[str]:
        return {it.removeprefix("sha256:") for it in images.get(name).layout.diff_ids(images.TAG)}

    def cache(self, node: trio.Trio, *words) -> str:
        done = process.run(*process.as_user(process.UNPRIVILEGED), node.binary, "cache", *words, "--config", node.config, "--cache-dir", node.cache_dir, check=False)
        return done.stdout + done.stderr

    def test_a_full_cache_and_an_operator(self):
        # Room for the image below the low watermark, and for little more.
        node = self.node(cache={"max_bytes": 190_000_000, "high_watermark_percent": 90, "low_watermark_percent": 86, "min_free_bytes": 0})
        directory = self.publish(node, "v", IMAGE)
        # Those who made the mount are gone, and their successors know nothing of it but what the kernel says.
        node.restart()
        for name in ("nasty", "zstd", "docker"):
            reply = node.publish("x", self.env.push(name))
            self.assertIn(reply.code, ("OK", "RESOURCE_EXHAUSTED"), reply)
            if reply.ok:
                self.assert_tree(name, node.target("x"))
            node.must_unpublish("x")
        self.assertEqual(self.cache(node, "ls").count("mounted in the kernel"), len(self.diff_ids(IMAGE)))
        said = self.cache(node, "rm", "--all")
        self.assertIn("in use", said)
        self.assertLessEqual(self.diff_ids(IMAGE), self.layers(node))
        driver.drop_from_page_cache(directory)
        self.assert_tree(IMAGE, directory)
        self.assertEqual(node.metric("tier_reads_total", tier="registry", outcome="error"), 0)
        node.must_unpublish("v")
        self.gone(node)
        self.cache(node, "rm", "--all")
        self.assertEqual(self.layers(node), set())

    def test_bytes_that_rot_on_the_disk_are_found(self):
        """What the kernel shows of a file that was damaged behind everybody's back is told to who looks, and pods that come then read what is right."""
        node = self.node()
        directory = self.publish(node, "v", "small")
        [layer] = self.layers(node)
        data = node.cache_dir / "layers" / layer / "data"
        with data.open("r+b") as file:
            content = file.read()
            file.seek(content.index(b"hello\n"))
            file.write(b"HELLO\n")
        said = self.cache(node, "verify")
        self.assertIn("1 wrong and dropped", said)
        self.assertIn("recreate the pods", said)
        driver.drop_from_page_cache(directory)
        self.assertEqual((directory / "hello").read_text(), "HELLO\n")
        node.must_unpublish("v")
        node.must_publish("w", self.env.push("small"))
        self.assert_tree("small", node.target("w"))

    def test_what_may_not_stay_is_served(self):
        """An image that takes more than the low watermark is read by parts, as far as its cache goes."""
        node = self.node(cache={"max_bytes": IMAGE_BYTES, "high_watermark_percent": 99, "low_watermark_percent": 50, "min_free_bytes": 0})
        node.must_publish("v", self.env.push(IMAGE))
        self.assertEqual(self.file_system(node.target("v")), "fuse.clip")
        self.assert_tree(IMAGE, node.target("v"))


class Later(InKernel):
    def test_who_comes_when_all_is_there_needs_no_server(self):
        """A lazy image is served at first; a pod that comes when it is whole on disk reads without the server."""
        key = self.work / "key"
        key.write_text(secrets.token_hex(32))
        remote = {"kind": "none", "hmac_key_file": str(key)}
        reference = self.env.push("debian-python")
        driver.clip("index", "push", reference, config=self.config("push.toml", remote=remote), cache_dir=self.work / "push")
        node = self.node(remote=remote, cache={"complete_layers": False})
        node.must_publish("first", reference, prefetch="none")
        self.assertEqual(self.file_system(node.target("first")), "fuse.clip")
        node.must_publish("early", reference, prefetch="all")
        self.assertEqual(self.file_system(node.target("early")), "fuse.clip", "not all is there")
        self.assert_tree("debian-python", node.target("first"))
        diff_ids = images.get("debian-python").layout.diff_ids(images.TAG)
        process.wait_until(lambda: all(node_cache.is_complete(node.cache_dir, it) for it in diff_ids), "all to be on disk", COMPLETE_SECONDS)
        self.publish(node, "late", "debian-python")
        self.assertEqual((node.metric("mounts"), node.metric("kernel_mounts")), (2, 1))
        node.kill("serve")
        driver.drop_from_page_cache(node.target("late"))
        self.assert_tree("debian-python", node.target("late"))
        node.start("serve")
        self.assert_tree("debian-python", node.target("first"))
        for volume in ("first", "early", "late"):
            node.must_unpublish(volume)
        self.gone(node)


    def test_layers_that_are_read_by_a_table_of_contents(self):
        """They are mounted before anything of them is there; when all is, their content lies in blocks as that of a tar."""
        node = self.node()
        reference = self.env.push("estargz")
        node.must_publish("first", reference, prefetch="all")
        self.assertEqual(self.file_system(node.target("first")), "fuse.clip")
        self.assertGreater(node.metric("toc_lookups_total", outcome="hit"), 0)
        self.assert_tree("estargz", node.target("first"))

        def is_whole() -> bool:
            node.must_publish("late", reference)
            whole = self.file_system(node.target("late")) == "erofs"
            if not whole:
                node.must_unpublish("late")
            return whole
        process.wait_until(is_whole, "all to be on disk", COMPLETE_SECONDS)
        self.assert_tree("estargz", node.target("late"))
        node.kill("serve")
        driver.drop_from_page_cache(node.target("late"))
        self.assert_tree("estargz", node.target("late"))
        node.start("serve")
        for volume in ("first", "late"):
            node.must_unpublish(volume)
        self.gone(node)


class Memory(InKernel):
    def test_the_node_service_holds_little_of_a_large_image(self):
        layout = oci.Layout(self.work / "many")
        data = many_files()
        layout.add_image("latest", [(layout.add(oci.gzipped(data, level=1), oci.LAYER_GZIP), oci.digest_of(data))])
        oci.push(layout, "latest", self.registry.host, "e2e/many-files")
        node = self.node()
        begin = time.monotonic()
        node.must_publish("v", f"{self.registry.host}/e2e/many-files:latest")
        first = time.monotonic() - begin
        self.assertEqual(self.file_system(node.target("v")), "erofs")
        self.assertGreater(int(process.run("sh", "-c", "find . -type f | wc -l", cwd=node.target("v")).stdout), N_FILES - 1)
        most = node.memory("node")["VmHWM"]
        print(f"{N_FILES} files: published in {first * 1000:.0f} ms, node {most / 1e6:.1f} MB at most")
        self.assertLess(most, MOST_NODE_BYTES)
