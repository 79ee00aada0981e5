"""What the roles take at most (VmHWM), whatever the image and whoever reads.

Measured for good by `make bench BENCH=memory`, with larger images; these are large enough that memory which grows with
them is seen.
"""

import hashlib
import os
import shutil
import subprocess

import images
from harness import driver, oci, process, rawtar, trio
from harness.environment import Case

# Of the tree with many files. What is held for each of them, as it was once (450 bytes), would be three times what the agent may have.
N_FILES, PER_DIRECTORY = 100_000, 1000
# Of the large layer. Each file is a block without an inner order again and again, just within deflate's reach: whoever enters it in the
# middle needs nearly all of the 32 KiB before, and the access map is as large as one can be.
FILE_BYTES, N_LARGE, REPEATED_BYTES = 4 << 20, 96, 31 << 10
N_READERS = 64
UPLOAD_SECONDS = 120


def add_layer(layout: oci.Layout, tar: bytes, level: int) -> tuple[dict, str]:
    return layout.add(oci.gzipped(tar, level), oci.LAYER_GZIP), oci.digest_of(tar)


def many_files() -> bytes:
    """A layer of empty files. Their headers differ in the name, so that only this is written anew."""
    name_bytes = len("0000/a-name-of-usual-length-0000000")
    empty = rawtar.header(b"\0" * name_bytes, rawtar.FILE)
    rest, unnamed = empty[156:], sum(empty[name_bytes:148]) + sum(b" " * 8) + sum(empty[156:])
    blocks = []
    for number in range(N_FILES):
        if number % PER_DIRECTORY == 0:
            blocks.append(rawtar.header(b"%04d/" % (number // PER_DIRECTORY), rawtar.DIR, mode=0o755))
        name = b"%04d/a-name-of-usual-length-%07d" % (number // PER_DIRECTORY, number)
        blocks.append(b"".join((name, empty[name_bytes:148], b"%06o\0 " % (unnamed + sum(name)), rest)))
    return b"".join([*blocks, bytes(2 * rawtar.BLOCK)])


def large_files() -> bytes:
    blocks = [rawtar.header(b"files/", rawtar.DIR, mode=0o755)]
    for number in range(N_LARGE):
        blocks.append(rawtar.header(b"files/%02d" % number, rawtar.FILE, size=FILE_BYTES))
        block = hashlib.shake_128(b"%d" % number).digest(REPEATED_BYTES)
        blocks.append((block * (FILE_BYTES // REPEATED_BYTES + 1))[:FILE_BYTES])
    return b"".join([*blocks, bytes(2 * rawtar.BLOCK)])


class Memory(Case):
    """What is compared with the bounds, and how."""

    # Of VmHWM, in bytes: what the chart's limits and the alerts are made from.
    MOST = {"serve": 10e6, "agent": 16e6, "node": 10e6, "serve's parent": 5e6}

    def check(self, node: trio.Trio, what: str, most=None) -> None:
        """Prints what the roles take and have taken at most, and compares that with what they may."""
        most = {**self.MOST, **(most or {})}
        seen = {role: node.memory(role) for role in trio.ROLES}
        # It waits, and no more.
        seen["serve's parent"] = driver.memory_of(node.servers["serve"].pid)
        print(f"{what}: " + "; ".join(f"{role} VmRSS {it['VmRSS'] / 1e6:.1f} MB, VmHWM {it['VmHWM'] / 1e6:.1f} MB" for role, it in seen.items()))
        self.assertEqual({role: it["VmHWM"] for role, it in seen.items() if it["VmHWM"] >= most[role]}, {}, f"more than {most}")


class Layers(Memory):
    """An image of five layers, once and in many mounts."""

    # A reader on each of 50 mounts at the same moment: all their indexes are looked at then.
    MOST_WITH_READERS = {"serve": 16e6}
    N_MOUNTS = 50

    def test_five_layers_of_30_mb(self):
        node = self.trio()
        node.must_publish("v", self.env.push("demo5"))
        self.assert_tree("demo5", node.target("v"))
        # As in an upgrade: whoever takes over needs no more.
        node.hand_over().stop()
        node.restart("agent", "node")
        driver.drop_from_page_cache(node.target("v"))
        self.assert_tree("demo5", node.target("v"))
        self.check(node, "5 layers of 30 MB, read twice, all restarted in between")

    def test_first_access(self):
        node = self.trio()
        node.must_publish("v", self.env.push("demo5"))
        self.assert_tree("demo5", node.target("v"))
        self.check(node, "5 layers of 30 MB, first access")

    def references(self) -> list[str]:
        """Images that share their layers and differ in their configuration: each is a mount of its own."""
        image = images.get("demo5")
        layout = oci.Layout(self.work / "many")
        shutil.copytree(image.layout.directory / "blobs", layout.directory / "blobs", dirs_exist_ok=True, copy_function=os.symlink)
        layers = list(zip(image.layout.layers(images.TAG), image.layout.diff_ids(images.TAG)))
        for number in range(self.N_MOUNTS):
            layout.add_image(f"n{number}", layers, config={"config": {"Labels": {"number": str(number)}}})
            oci.push(layout, f"n{number}", self.registry.host, "e2e/many")
        return [f"{self.registry.host}/e2e/many:n{number}" for number in range(self.N_MOUNTS)]

    def test_50_mounts(self):
        node = self.trio()
        for number, reference in enumerate(self.references()):
            node.must_publish(f"v{number}", reference)
        self.assertEqual(node.metric("mounts"), self.N_MOUNTS)
        self.check(node, f"{self.N_MOUNTS} mounts")
        readers = [subprocess.Popen(["sh", "-c", "cat layer-1/usr/bin/* >/dev/null && find layer-2 -ls >/dev/null"], cwd=node.target(f"v{number}"))
                   for number in range(self.N_MOUNTS)]
        self.assertEqual([it.wait(120) for it in readers], [0] * self.N_MOUNTS)
        self.check(node, f"{self.N_MOUNTS} mounts, a reader on each at the same moment", self.MOST_WITH_READERS)
        node.hand_over().stop()
        node.restart("agent", "node")
        self.assert_tree("demo5", node.target(f"v{self.N_MOUNTS - 1}"))
        self.check(node, f"{self.N_MOUNTS} mounts taken over")


class Growth(Memory):
    """Memory does not grow with the image. With Redis, into which all is put meanwhile, and from which another node takes it."""

    def setUp(self):
        super().setUp()
        self.node_config = self.config(redis=self.redis(), key_file=self.work / "key")

    def push_layer(self, name: str, tar: bytes, level: int) -> str:
        layout = oci.Layout(self.work / name)
        layout.add_image(images.TAG, [add_layer(layout, tar, level)])
        oci.push(layout, images.TAG, self.registry.host, f"e2e/{name}")
        return f"{self.registry.host}/e2e/{name}:{images.TAG}"

    def wait_for_uploads(self, node: trio.Trio, n_layers: int) -> None:
        process.wait_until(lambda: node.metric("remote_uploads_total", outcome="ok") >= n_layers, "the uploads", UPLOAD_SECONDS)

    def find(self, node: trio.Trio) -> None:
        found = subprocess.run("find . -type f -size -1 | wc -l", shell=True, check=True, cwd=node.target("v"), stdout=subprocess.PIPE, text=True, timeout=120)
        self.assertEqual(int(found.stdout), N_FILES)

    def test_many_files(self):
        reference = self.push_layer("many-files", many_files(), 1)
        node = self.trio("a", self.node_config)
        node.must_publish("v", reference)
        self.find(node)
        self.wait_for_uploads(node, 1)
        self.check(node, f"find in {N_FILES} files, uploaded meanwhile")
        other = self.trio("b", self.node_config)
        other.must_publish("v", reference)
        self.find(other)
        self.assertEqual(other.metric("layer_decompressions_total", outcome="ok"), 0, "the index comes from the remote")
        self.check(other, f"find in {N_FILES} files, taken from the remote")
        apart = self.config("apart.toml", remote={"kind": "none", "hmac_key_file": str(self.work / "key")})
        driver.clip("index", "push", reference, config=apart, cache_dir=self.work / "push")
        third = self.trio("c", apart)
        third.must_publish("v", reference)
        self.find(third)
        self.assertEqual(third.metric("pushed_index_lookups_total", outcome="hit"), 1, "the index comes from the registry")
        self.check(third, f"find in {N_FILES} files, by an index that was pushed")

    def test_many_readers_of_a_large_layer(self):
        reference = self.push_layer("large", large_files(), 1)
        node = self.trio("a", self.node_config)
        node.must_publish("v", reference)
        readers = [subprocess.Popen(["dd", f"if=files/{number % N_LARGE:02}", "of=/dev/null", "bs=64k", "status=none"], cwd=node.target("v"))
                   for number in range(N_READERS)]
        self.assertEqual([it.wait(120) for it in readers], [0] * N_READERS)
        self.wait_for_uploads(node, 1)
        self.check(node, f"{N_READERS} readers of a layer of {N_LARGE * FILE_BYTES >> 20} MiB, uploaded meanwhile")
        map_bytes = sum(it.stat().st_size for it in node.cache_dir.glob("layers/*/access"))
        self.assertLess(N_LARGE * FILE_BYTES // 200, map_bytes, "it has an access map of half a percent")

    def test_five_layers_uploaded_meanwhile(self):
        node = self.trio("a", self.node_config)
        node.must_publish("v", self.env.push("demo5"))
        self.assert_tree("demo5", node.target("v"))
        self.wait_for_uploads(node, 5)
        self.check(node, "5 layers of 30 MB, uploaded meanwhile")
