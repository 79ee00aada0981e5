"""Each image, mounted, is the tree that `umoci unpack` makes of it."""

import os
import pathlib
import subprocess
import time

import images
import tree
from harness import driver, process
from harness.environment import Case

IMAGES = ["small", "debian-python", "nasty", "nasty-root", "nasty-extra", "zstd", "docker", "multi-arch", "multi-member", "plain", "demo5"]


class Tree(Case):
    def check(self, name: str) -> None:
        reference = self.env.push(name)
        mark = self.registry.mark()
        directory = self.mount(reference)
        self.assert_tree(name, directory)
        # The metadata once more, now from the kernel's caches.
        self.assertEqual(tree.manifest(str(directory), contents=False), tree.manifest(str(directory), contents=False))
        self.unmount(directory)
        gets = self.layer_gets(name, mark)
        # Equal layers of one image are one blob.
        self.assertEqual(set(gets), {1}, "each layer is fetched once")
        # Warm: the disk has all, the registry is asked for no blob of a layer.
        mark = self.registry.mark()
        directory = self.mount(reference)
        self.assert_tree(name, directory)
        self.assertEqual(set(self.layer_gets(name, mark)), {0}, "a warm mount fetches no layer")


for _name in IMAGES:
    setattr(Tree, f"test_{_name.replace('-', '_')}", lambda self, name=_name: self.check(name))


class Platform(Case):
    def test_another_platform_on_demand(self):
        image = images.get("multi-arch")
        directory = self.mount(self.env.push("multi-arch"), "mnt", "--platform", "linux/arm64")
        truth = tree.parse((image.directory / "expected.arm64.manifest").read_text())
        self.assertEqual(tree.manifest(str(directory)), truth)

    def test_digest_instead_of_tag(self):
        digest = images.get("small").layout.find(images.TAG)["digest"]
        reference = self.env.push("small").rpartition(":")[0] + "@" + digest
        self.assert_tree("small", self.mount(reference))


class Reading(Case):
    def test_random_places_of_files_are_right(self):
        """Reads of odd lengths at odd offsets, from several processes, while the layers are new."""
        rootfs = images.get("debian-python").directory / "rootfs"
        directory = self.mount(self.env.push("debian-python"))
        # os.walk: rglob follows no links, but stats every entry twice.
        files = [os.path.join(top, name) for top, _, names in os.walk(rootfs) for name in names]
        files = [path for path in files if os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) > 0]
        for path in self.dice.sample(sorted(files), 400):
            size = os.path.getsize(path)
            with open(path, "rb", buffering=0) as want, open(directory / os.path.relpath(path, rootfs), "rb", buffering=0) as have:
                for _ in range(5):
                    at, length = self.dice.randrange(size + 10), self.dice.choice([1, 100, 4096, 65_537, 1 << 20])
                    self.assertEqual(os.pread(have.fileno(), length, at), os.pread(want.fileno(), length, at), f"seed {self.seed}: {path} at {at}+{length}")

    def test_programs_run_from_the_mount(self):
        """exec, mmap and shared objects: Debian's Python imports numpy out of the image."""
        directory = self.mount(self.env.push("debian-python"))
        done = subprocess.run(["chroot", directory, "python3", "-c", "import numpy; print(int(numpy.arange(1000).sum()))"], capture_output=True, text=True)
        self.assertEqual((done.stdout.strip(), done.returncode), ("499500", 0), done.stderr)

    def test_the_mount_is_read_only(self):
        directory = self.mount(self.env.push("small"))
        for action in (lambda: (directory / "new").touch(), lambda: (directory / "hello").unlink(), lambda: (directory / "hello").chmod(0o600),
                       lambda: (directory / "hello").write_text("x"), lambda: os.setxattr(directory / "hello", "user.x", b"1")):
            with self.assertRaises(OSError) as raised:
                action()
            self.assertIn(raised.exception.errno, (1, 30), "EROFS, or EPERM")

    def test_inode_numbers_are_the_same_on_every_node(self):
        reference = self.env.push("nasty")
        numbers = []
        for node in ("one", "two"):
            directory = self.mount(reference, node, cache_dir=self.work / f"cache-{node}")
            numbers.append({os.path.relpath(full, os.fsencode(directory)): info.st_ino for _, full, info in tree.walk(os.fsencode(directory))})
        self.assertTrue(numbers[0] == numbers[1], [it for it in numbers[0].items() if it not in numbers[1].items()][:5])
        # Hard links share an inode; nothing else does.
        self.assertEqual(numbers[0][b"hardlinks/a"], numbers[0][b"hardlinks/b"])
        self.assertNotEqual(numbers[0][b"hardlinks/a"], numbers[0][b"hardlinks/base"])

    def test_statfs_and_access_answer(self):
        directory = self.mount(self.env.push("nasty"))
        info = os.statvfs(directory)
        self.assertGreater(info.f_blocks * info.f_frsize, 10_000_000)
        self.assertEqual(info.f_bavail, 0, "nothing can be written")
        self.assertTrue(os.access(directory / "modes/4755", os.X_OK))
        self.assertFalse(os.access(directory / "modes/4755", os.W_OK))

    def test_other_users_have_the_rights_that_the_modes_give(self):
        directory = self.mount(self.env.push("nasty"))
        # The path down to the mount is root's only.
        script = "import os,sys; os.chdir(sys.argv[1]); os.setgid(65534); os.setgroups([]); os.setuid(65534); print(os.access('modes/0000', os.R_OK), os.access('modes/1755', os.R_OK))"
        done = process.run("python3", "-c", script, directory)
        self.assertEqual(done.stdout.split(), ["False", "True"])


class Command(Case):
    def test_unmount_ends_the_server(self):
        directory = self.mount(self.env.push("small"))
        self.unmount(directory)
        process.wait_until(lambda: not [it for it in process.run("ps", "-eo", "args").stdout.splitlines() if str(directory) in it], "the mount's process to end", 10)

    def test_two_mounts_of_one_image_by_commands(self):
        reference = self.env.push("demo1")
        mark = self.registry.mark()
        first, second = self.mount(reference, "one"), self.mount(reference, "two")
        self.assert_tree("demo1", first)
        self.unmount(first)
        self.assert_tree("demo1", second)
        self.assertEqual(self.layer_gets("demo1", mark), [1])

    def test_index_is_built_written_and_printed(self):
        file = self.work / "index.clip"
        driver.clip("index", "build", self.env.push("nasty"), "--output", file, config=self.config(), cache_dir=self.work / "cache")
        self.assertGreater(file.stat().st_size, 54, "more than clip's header")
        printed = driver.clip("index", "inspect", file, "--tree").stdout
        for name in ("hardlinks/upper", "whiteouts/new", "sizes/1044480"):
            self.assertIn(name, printed)
        self.assertNotIn("whiteouts/lower", printed)

    def test_index_is_the_same_each_time(self):
        reference = self.env.push("nasty")
        made = []
        for node in ("one", "two"):
            driver.clip("index", "build", reference, "--output", self.work / node, config=self.config(), cache_dir=self.work / f"cache-{node}")
            made.append((self.work / node).read_bytes())
        self.assertEqual(made[0], made[1])

    def test_a_damaged_index_file_is_an_error_and_no_crash(self):
        file = self.work / "index.clip"
        driver.clip("index", "build", self.env.push("small"), "--output", file, config=self.config(), cache_dir=self.work / "cache")
        whole = file.read_bytes()
        for number in range(30):
            data = bytearray(whole)
            if number % 3 == 0:
                del data[self.dice.randrange(len(data)):]
            else:
                data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
            file.write_bytes(data)
            done = driver.clip("index", "inspect", file, check=False, timeout=20)
            self.assertIn(done.returncode, (0, 1), f"seed {self.seed}: {done.stderr}")
            self.assertNotIn("panicked", done.stderr)
