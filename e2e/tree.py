#!/usr/bin/env python3
"""Prints a directory tree as a canonical manifest: one line per path, sorted by the path's bytes.

A line is the path, then TAB-separated KEY=VALUE fields, always in the order of KEYS. A field that
has no meaning for the type is left out (the size and link count of a directory, the device number
of a file). Bytes outside printable ASCII, blanks and backslashes are written as \\xNN, so two
manifests can be compared line by line whatever the names are made of.

The root of the tree is ".". Access times and change times are left out: no image carries them.
"""

import argparse
import concurrent.futures
import errno
import hashlib
import itertools
import os
import re
import stat
import sys

KEYS = ("type", "mode", "uid", "gid", "size", "mtime", "nlink", "rdev", "target", "xattrs", "sha256", "group")

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}

# What is written as it is: printable ASCII but for blanks and backslashes.
PLAIN = re.compile(rb"[!-\[\]-~]*")

# Files that a thread reads one after the other: to hand over one costs as much as to hash a small one.
FILES_AT_ONCE = 32

# One FUSE read of the driver is at most 1 MiB.
READ_BYTES = 1 << 20


def escape(raw: bytes) -> str:
    """The bytes as printable ASCII without blanks, reversibly."""
    if PLAIN.fullmatch(raw):
        return raw.decode("ascii")
    return "".join(chr(b) if 0x21 <= b <= 0x7E and b != 0x5C else f"\\x{b:02x}" for b in raw)


def sha256(path: bytes) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def xattrs(path: bytes) -> str:
    """All extended attributes, by name; the values in hex."""
    pairs = []
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        # A file system may say once that it keeps none at all, which spares the kernel asking.
        if error.errno != errno.EOPNOTSUPP:
            raise
        names = []
    for name in sorted(names, key=os.fsencode):
        value = os.getxattr(path, name, follow_symlinks=False)
        pairs.append(f"{escape(os.fsencode(name))}={value.hex()}")
    return ",".join(pairs)


def attributes(full: bytes, info: os.stat_result) -> dict[str, str]:
    """The fields of one path that it has by itself: all but `sha256` and `group`."""
    kind = TYPES[stat.S_IFMT(info.st_mode)]
    fields = {
        "type": kind,
        "mode": f"{stat.S_IMODE(info.st_mode):04o}",
        "uid": str(info.st_uid),
        "gid": str(info.st_gid),
        "mtime": f"{info.st_mtime_ns // 10**9}.{info.st_mtime_ns % 10**9:09d}",
    }
    if kind != "dir":
        fields["nlink"] = str(info.st_nlink)
    if kind in ("file", "link"):
        fields["size"] = str(info.st_size)
    if kind in ("char", "block"):
        fields["rdev"] = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    if kind == "link":
        fields["target"] = escape(os.readlink(full))
    found = xattrs(full)
    if found:
        fields["xattrs"] = found
    return fields


def walk(root: bytes):
    """Yields (path relative to root, full path, lstat) for the root and everything below it."""
    pending = [(b".", root)]
    while pending:
        relative, full = pending.pop()
        info = os.lstat(full)
        yield relative, full, info
        if stat.S_ISDIR(info.st_mode):
            for name in os.listdir(full):
                below = name if relative == b"." else relative + b"/" + name
                pending.append((below, full + b"/" + name))


def manifest(root: str, contents: bool = True, threads: int = 4) -> dict[str, dict[str, str]]:
    """The tree below `root`: escaped path -> fields. Raises OSError on the first path that fails."""
    found = sorted(walk(os.fsencode(root).rstrip(b"/") or b"/"))
    # Hard links are told by inode within the tree; the lowest path names the group.
    groups: dict[tuple[int, int], list[bytes]] = {}
    for relative, _, info in found:
        if not stat.S_ISDIR(info.st_mode):
            groups.setdefault((info.st_dev, info.st_ino), []).append(relative)
    to_hash = {
        (info.st_dev, info.st_ino): full
        for _, full, info in found
        if contents and stat.S_ISREG(info.st_mode)
    }
    paths = list(to_hash.values())
    runs = [paths[at:at + FILES_AT_ONCE] for at in range(0, len(paths), FILES_AT_ONCE)]
    # Several readers at once: they are what a driver has to bear.
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(to_hash, itertools.chain.from_iterable(pool.map(lambda run: [sha256(path) for path in run], runs))))

    lines = {}
    for relative, full, info in found:
        fields = attributes(full, info)
        inode = (info.st_dev, info.st_ino)
        if fields["type"] != "dir" and len(groups[inode]) > 1:
            fields["group"] = escape(groups[inode][0])
        if fields["type"] == "file" and contents:
            fields["sha256"] = digests[inode]
        lines[escape(relative)] = fields
    return lines


def write(tree: dict[str, dict[str, str]], out) -> None:
    for path in sorted(tree):
        fields = tree[path]
        out.write("\t".join([path] + [f"{key}={fields[key]}" for key in KEYS if key in fields]) + "\n")


def parse(text: str) -> dict[str, dict[str, str]]:
    """The reverse of `write`."""
    tree = {}
    for line in text.splitlines():
        path, *fields = line.split("\t")
        if path in tree:
            raise ValueError(f"path twice in a manifest: {path}")
        tree[path] = dict(field.split("=", 1) for field in fields)
        unknown = set(tree[path]) - set(KEYS)
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)} in: {line}")
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints a directory tree as a canonical manifest.")
    parser.add_argument("dir")
    parser.add_argument("--no-contents", action="store_true", help="leave out sha256 (reads no file)")
    parser.add_argument("--threads", type=int, default=4, help="files read at a time")
    args = parser.parse_args()
    try:
        tree = manifest(args.dir, contents=not args.no_contents, threads=args.threads)
    except OSError as error:
        sys.exit(f"tree.py: {error}")
    write(tree, sys.stdout)


if __name__ == "__main__":
    main()
