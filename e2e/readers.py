#!/usr/bin/env python3
"""Reads a mounted image without end and compares every byte with the truth: what pods do while a part of the driver dies.

usage: readers.py KIND DIR PLAN SEED

A reader is a process that does one kind of reading until SIGTERM, then prints a JSON object: what it
did, what failed or was wrong, and when an operation took more than a millisecond. `harness/reading.py`
writes the plan and starts them. The kinds:
  sequential  every file of the tree from its begin to its end
  random      pread of random ranges
  direct      the same past the page cache (O_DIRECT)
  mmap        ranges by page faults
  walk        names, attributes, links and extended attributes of the tree, as `find -ls`
  held        files and directories opened once, before anything died, read again and again
  exec        runs programs of the tree
"""

import contextlib
import hashlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time

import tree

# A read request of the driver's kernel read-ahead or more; not so much that one operation is many.
READ_BYTES = 128 << 10
# Of an error message, how many are kept; all are counted.
MAX_KEPT = 10
# Shorter ones are no pause.
SPAN_SECONDS = 0.001
# Between two steps, so that seven readers leave two cores something for those they read from, and for other cases.
REST_SECONDS = 0.005
HELD_FILES = 40
PAGE = mmap.PAGESIZE


class Watch:
    """Times operations, and counts what went wrong."""

    def __init__(self):
        self.n_operations = self.n_bytes = self.n_errors = 0
        self.kept: list[str] = []
        self.spans: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def operation(self, what):
        """One thing that the kernel does for a reader. An error of it is counted, and what depends on it left out."""
        begin = time.monotonic()
        try:
            yield
        except OSError as error:
            self.wrong(f"{what}: {error}")
        finally:
            end = time.monotonic()
            self.n_operations += 1
            if end - begin > SPAN_SECONDS:
                self.spans.append((begin, end))

    def wrong(self, text: str) -> None:
        self.n_errors += 1
        if len(self.kept) < MAX_KEPT:
            self.kept.append(text)


class Reader:
    def __init__(self, top: str, plan: dict, seed: int):
        self.top, self.plan, self.dice, self.watch = top, plan, random.Random(seed), Watch()
        # Of files that have bytes: [size, sha256, file with the truth, offset in it].
        self.files: dict[str, list] = plan["files"]
        self.names = sorted(self.files)
        # As `random.choices` wants it: each byte is as likely as any other.
        self.weights = [self.files[name][0] for name in self.names]
        self.truths = {it[2]: os.open(it[2], os.O_RDONLY) for it in self.files.values()}

    def path(self, name: str) -> str:
        return f"{self.top}/{name}"

    def true_bytes(self, name: str, offset: int, n_bytes: int) -> bytes:
        _, _, file, start = self.files[name]
        return os.pread(self.truths[file], n_bytes, start + offset)

    def open(self, name: str, flags: int = 0) -> int | None:
        with self.watch.operation(f"open {name}"):
            return os.open(self.path(name), os.O_RDONLY | flags)
        return None

    def somewhere(self) -> tuple[str, int, int]:
        """A file, and a range of it that begins at a page."""
        [name] = self.dice.choices(self.names, self.weights)
        size = self.files[name][0]
        offset = self.dice.randrange(size) // PAGE * PAGE
        return name, offset, min(self.dice.choice((PAGE, 16 << 10, READ_BYTES)), size - offset)

    def compare(self, name: str, offset: int, n_bytes: int, found) -> None:
        if found is None:
            return
        self.watch.n_bytes += len(found)
        if bytes(found) != self.true_bytes(name, offset, n_bytes):
            self.watch.wrong(f"{name}: {n_bytes} bytes at {offset} are not what they should be ({len(found)} came)")

    def sequential(self):
        while True:
            for name in self.dice.sample(self.names, len(self.names)):
                fd = self.open(name)
                if fd is not None:
                    drop(fd)
                    self.hash(name, fd)
                    os.close(fd)
                yield

    def hash(self, name: str, fd: int) -> None:
        digest, block = hashlib.sha256(), b"?"
        while block:
            block = None
            with self.watch.operation(f"read {name}"):
                block = os.read(fd, READ_BYTES)
            if block is None:
                return
            digest.update(block)
            self.watch.n_bytes += len(block)
        if digest.hexdigest() != self.files[name][1]:
            self.watch.wrong(f"{name}: sha256 is {digest.hexdigest()}")

    def random(self):
        while True:
            name, offset, n_bytes = self.somewhere()
            fd = self.open(name)
            if fd is not None:
                drop(fd)
                self.pread(name, fd, offset, n_bytes)
                os.close(fd)
            yield

    def pread(self, name: str, fd: int, offset: int, n_bytes: int) -> None:
        found = None
        with self.watch.operation(f"pread {name}"):
            found = os.pread(fd, n_bytes, offset)
        self.compare(name, offset, n_bytes, found)

    def direct(self):
        # Of whole pages at a whole page, as O_DIRECT may want it.
        buffer = mmap.mmap(-1, READ_BYTES)
        while True:
            name, offset, n_bytes = self.somewhere()
            fd = self.open(name, os.O_DIRECT)
            if fd is not None:
                n_read = None
                with self.watch.operation(f"O_DIRECT read {name}"):
                    n_read = os.preadv(fd, [memoryview(buffer)[:-(-n_bytes // PAGE) * PAGE]], offset)
                if n_read is not None:
                    self.compare(name, offset, n_bytes, buffer[:min(n_read, n_bytes)])
                os.close(fd)
            yield

    def mmap(self):
        while True:
            name, offset, n_bytes = self.somewhere()
            fd = self.open(name)
            if fd is not None:
                drop(fd)
                found = None
                # An error of a page fault is SIGBUS: it ends this process, which whoever started it sees.
                with self.watch.operation(f"mmap {name}"), mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                    found = mapped[offset:offset + n_bytes]
                self.compare(name, offset, n_bytes, found)
                os.close(fd)
            yield

    def walk(self):
        entries: dict[str, dict[str, str]] = self.plan["entries"]
        names: dict[str, list[str]] = self.plan["names"]
        while True:
            for relative, truth in entries.items():
                full = os.fsencode(self.path(relative))
                found = None
                with self.watch.operation(f"lstat {relative}"):
                    found = tree.attributes(full, os.lstat(full))
                if found is not None and found != truth and {**found, "mtime": truth["mtime"]} != {**truth, "mtime": truth["mtime"]}:
                    self.watch.wrong(f"{relative}: {found} should be {truth}")
                elif found is not None and found["mtime"] != truth["mtime"] and relative not in self.plan["dirs_without_time"]:
                    self.watch.wrong(f"{relative}: mtime {found['mtime']} should be {truth['mtime']}")
                if truth["type"] == "dir":
                    listed = None
                    with self.watch.operation(f"readdir {relative}"):
                        listed = sorted(tree.escape(it) for it in os.listdir(full))
                    if listed is not None and listed != names[relative]:
                        self.watch.wrong(f"{relative}: {len(listed)} names, should be {len(names[relative])}")
                yield

    def held(self):
        files = [(name, self.open(name)) for name in self.dice.choices(self.names, self.weights, k=HELD_FILES)]
        directories = [(name, self.open(name, os.O_DIRECTORY)) for name in self.dice.sample(sorted(self.plan["names"]), 5)]
        while True:
            name, fd = self.dice.choice(files)
            size = self.files[name][0]
            offset = self.dice.randrange(size)
            if fd is not None:
                drop(fd)
                self.pread(name, fd, offset, min(READ_BYTES, size - offset))
            name, fd = self.dice.choice(directories)
            if fd is not None:
                listed = None
                with self.watch.operation(f"readdir {name}"):
                    listed = sorted(tree.escape(os.fsencode(it)) for it in os.listdir(fd))
                if listed is not None and listed != self.plan["names"][name]:
                    self.watch.wrong(f"{name}: {len(listed)} names")
            yield

    def exec(self):
        while True:
            name, wanted = self.dice.choice(self.plan["programs"])
            fd = self.open(name)
            if fd is not None:
                drop(fd)
                os.close(fd)
            with self.watch.operation(f"exec {name}"):
                done = subprocess.run([self.path(name), "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
                if (done.returncode, done.stdout) != (0, wanted):
                    self.watch.wrong(f"exec {name}: {done}")
            yield


KINDS = ("sequential", "random", "direct", "mmap", "walk", "held", "exec")


def drop(fd: int) -> None:
    """Out of the page cache with this file, so that a read reaches whoever serves it."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    kind, top, plan, seed = sys.argv[1:]
    ended = []
    # The system call that waits goes on: no wait for an answer is cut short.
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    with open(plan) as file:
        reader = Reader(top, json.load(file), int(seed))
    print("ready", flush=True)
    for _ in getattr(reader, kind)():
        if ended:
            break
        time.sleep(REST_SECONDS)
    watch = reader.watch
    print(json.dumps({"operations": watch.n_operations, "bytes": watch.n_bytes, "errors": watch.n_errors, "kept": watch.kept, "spans": watch.spans}))


if __name__ == "__main__":
    main()
