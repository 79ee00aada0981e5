#!/usr/bin/env python3
"""Tests the comparer: each single change of a tree must be reported, and equal trees must not."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import compare
import tree

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep


def make(root: str) -> None:
    """A small tree with every type, hard links, xattrs and odd names."""
    at = lambda name: os.path.join(os.fsencode(root), os.fsencode(name))
    os.makedirs(at("dir/sub"))
    os.makedirs(at("empty"))
    for name, data in [("dir/file", b"x" * 3000), ("dir/empty", b""), (b"odd\xff \n\\\tname", b"odd")]:
        with open(at(name), "wb") as file:
            file.write(data)
    os.link(at("dir/file"), at("dir/sub/linked"))
    os.symlink("dir/file", at("symlink"))
    os.mkfifo(at("fifo"))
    os.mknod(at("char"), stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(at("block"), stat.S_IFBLK | 0o600, os.makedev(7, 1000))
    os.chmod(at("dir/empty"), 0o4755)
    os.setxattr(at("dir/file"), "user.colour", b"red")
    os.setxattr(at("dir/empty"), "security.capability", CAPABILITY)
    # From the leaves up, because a change below changes the time of a directory.
    for relative, full, _ in sorted(tree.walk(os.fsencode(root)), reverse=True):
        os.utime(full, ns=(0, 1_700_000_000_123_456_789 + len(relative)), follow_symlinks=False)


# Each entry changes one thing of the tree at `root` and names what must be reported.
def rewrite(root, name, data):
    path = os.path.join(root, name)
    info = os.lstat(path)
    with open(path, "r+b") as file:
        file.seek(1500)
        file.write(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def in_dir(root, path, action):
    """Runs action without a trace in the directory's times."""
    parent = os.path.dirname(os.path.join(root, path))
    info = os.lstat(parent)
    action(os.path.join(root, path))
    os.utime(parent, ns=(info.st_atime_ns, info.st_mtime_ns))


def keep_time(path, action):
    info = os.lstat(path)
    action(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def replace_device(path, device):
    def action(path):
        info = os.lstat(path)
        os.unlink(path)
        os.mknod(path, stat.S_IFCHR | 0o600, device)
        os.utime(path, ns=(0, info.st_mtime_ns))
    return action(path)


def retarget(path):
    info = os.lstat(path)
    os.unlink(path)
    os.symlink("dir/File", path)
    os.utime(path, ns=(0, info.st_mtime_ns), follow_symlinks=False)


def bind(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def unlink_and_copy(path):
    """A hard link becomes a file of its own with the same content."""
    info = os.lstat(path)
    shutil.copy2(path, path + ".new")
    os.rename(path + ".new", path)
    os.utime(path, ns=(0, info.st_mtime_ns))


CHANGES = {
    "a byte": (lambda r: rewrite(r, "dir/file", b"y"), "dir/file: sha256"),
    "a mode": (lambda r: os.chmod(f"{r}/dir/sub", 0o700), "dir/sub: mode"),
    "the setuid bit": (lambda r: keep_time(f"{r}/dir/empty", lambda p: os.chmod(p, 0o755)), "dir/empty: mode"),
    "an owner": (lambda r: os.lchown(f"{r}/symlink", 7, 0), "symlink: uid"),
    "a group": (lambda r: os.lchown(f"{r}/fifo", 0, 8), "fifo: gid"),
    "a nanosecond of a file": (lambda r: os.utime(f"{r}/dir/file", ns=(0, os.lstat(f"{r}/dir/file").st_mtime_ns + 1)), "dir/file: mtime"),
    "a nanosecond of a directory": (lambda r: os.utime(f"{r}/dir", ns=(0, os.lstat(f"{r}/dir").st_mtime_ns + 1)), "dir: mtime"),
    "a nanosecond of a symlink": (lambda r: os.utime(f"{r}/symlink", ns=(0, 5), follow_symlinks=False), "symlink: mtime"),
    "the time of the root": (lambda r: os.utime(r, ns=(0, 5)), ".: mtime"),
    "a negative time": (lambda r: os.utime(f"{r}/dir/file", ns=(0, -1)), "mtime is -1.999999999"),
    "a user attribute": (lambda r: os.setxattr(f"{r}/dir/file", "user.colour", b"blue"), "dir/file: xattrs"),
    "one attribute more": (lambda r: os.setxattr(f"{r}/dir", "user.more", b""), "dir: xattrs"),
    "a trusted attribute": (lambda r: os.setxattr(f"{r}/dir", "trusted.more", b"1"), "dir: xattrs"),
    "a capability": (lambda r: os.removexattr(f"{r}/dir/empty", "security.capability"), "dir/empty: xattrs"),
    "a hard link more": (lambda r: in_dir(r, "dir/third", lambda p: os.link(f"{r}/dir/file", p)), "dir/file: nlink"),
    "a hard link broken": (lambda r: in_dir(r, "dir/sub/linked", unlink_and_copy), "dir/sub/linked: group"),
    "a device number": (lambda r: in_dir(r, "char", lambda p: replace_device(p, os.makedev(1, 5))), "char: rdev"),
    "a symlink's target": (lambda r: in_dir(r, "symlink", retarget), "symlink: target"),
    "a file missing": (lambda r: in_dir(r, os.fsdecode(b"odd\xff \n\\\tname"), os.unlink), r"missing: odd\xff\x20\x0a\x5c\x09name"),
    "a file too many": (lambda r: in_dir(r, "new", lambda p: open(p, "x").close()), "too much: new (file)"),
    "a length": (lambda r: keep_time(f"{r}/dir/file", lambda p: os.truncate(p, 2999)), "dir/file: size"),
    "a type": (lambda r: in_dir(r, "empty", lambda p: (os.rmdir(p), os.mkfifo(p))), "empty: type"),
    "a socket": (lambda r: in_dir(r, "sock", bind), "too much: sock (socket)"),
}


class Comparer(unittest.TestCase):
    def setUp(self):
        self.work = tempfile.mkdtemp(prefix="clip-e2e-tree.")
        self.addCleanup(shutil.rmtree, self.work)
        self.a, self.b = f"{self.work}/a", f"{self.work}/b"
        make(self.a)
        make(self.b)

    def run_compare(self, *args):
        done = subprocess.run([sys.executable, f"{HERE}/compare.py", *args], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def test_equal_trees_are_equal(self):
        self.assertEqual(self.run_compare(self.a, self.b), (0, ""))

    def test_manifest_survives_a_round_trip(self):
        manifest = subprocess.run([sys.executable, f"{HERE}/tree.py", self.a], capture_output=True, text=True, check=True).stdout
        with open(f"{self.work}/m", "w") as file:
            file.write(manifest)
        self.assertEqual(self.run_compare(f"{self.work}/m", self.b), (0, ""))
        self.assertEqual(tree.parse(manifest), tree.manifest(self.b))

    def test_every_change_is_reported(self):
        for what, (change, report) in CHANGES.items():
            with self.subTest(what):
                shutil.rmtree(self.b)
                make(self.b)
                change(self.b)
                code, out = self.run_compare(self.a, self.b)
                self.assertEqual(code, 1, out)
                self.assertIn(report, out)

    def test_only_the_listed_directories_may_have_another_time(self):
        os.utime(f"{self.b}/dir", ns=(0, 1))
        os.utime(f"{self.b}/empty", ns=(0, 1))
        os.utime(f"{self.b}/dir/file", ns=(0, 1))
        with open(f"{self.work}/dirs", "w") as file:
            file.write("dir\ndir/file\n")
        code, out = self.run_compare(self.a, self.b, "--ignore-mtime-of-dirs", f"{self.work}/dirs")
        self.assertEqual(code, 1)
        self.assertNotIn("dir: mtime", out)
        self.assertIn("empty: mtime", out)
        self.assertIn("dir/file: mtime", out, "the tolerance is for directories only")

    def test_an_unreadable_side_is_an_error_and_not_a_difference(self):
        self.assertEqual(self.run_compare(self.a, f"{self.work}/nothing")[0], 2)
        with open(f"{self.work}/bad", "w") as file:
            file.write("path\tcolour=red\n")
        self.assertEqual(self.run_compare(self.a, f"{self.work}/bad")[0], 2)

    def test_compare_without_arguments_fails(self):
        self.assertEqual(self.run_compare()[0], 2)


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("test_tree.py: needs root (devices, owners, capabilities)")
    unittest.main()
