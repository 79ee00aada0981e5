"""Starts readers on a mounted image, and makes one report of what they saw."""

import dataclasses
import gzip
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile

import images
import readers
import tree

from . import oci, paths, process

# How long a reader may take to end: longer than any pause that is no failure.
END_SECONDS = 30
# Programs of coreutils: they need the C library alone, which is this machine's, as the image's Debian is.
PROGRAMS = ("cat", "cut", "csplit", "dirname", "expr", "factor", "fold", "head", "join", "nl", "od", "paste", "sha256sum", "sort", "tac", "tr", "uniq", "wc")
ELF = b"\x7fELF"


def plan(work: pathlib.Path, name: str) -> pathlib.Path:
    """For readers.py, what an image must show. The image's layers hide nothing of each other (demo5, demo1)."""
    image = images.get(name)
    truth = tree.parse(image.truth().read_text(encoding="ascii"))
    where: dict[str, tuple[pathlib.Path, int]] = {}
    for number, layer in enumerate(image.layout.layers(images.TAG)):
        tar = work / f"{name}.{number}.tar"
        with image.layout.blob(layer["digest"]).open("rb") as packed, tar.open("wb") as out:
            shutil.copyfileobj(gzip.open(packed) if layer["mediaType"] == oci.LAYER_GZIP else packed, out)
        with tarfile.open(tar) as members:
            for member in members:
                if member.isfile():
                    where[tree.escape(member.name.encode("utf-8", "surrogateescape")).removeprefix("./")] = (tar, member.offset_data)
    # A name that had to be escaped is left to the walk.
    files = {path: [int(it["size"]), it["sha256"], str(where[path][0]), where[path][1]]
             for path, it in truth.items() if it["type"] == "file" and it["size"] != "0" and path in where and "\\" not in path}
    assert len(files) > 100, f"{name}: only {len(files)} files to read"
    names: dict[str, list[str]] = {path: [] for path, it in truth.items() if it["type"] == "dir"}
    for path in truth.keys() - {"."}:
        parent, _, last = path.rpartition("/")
        names[parent or "."].append(last)
    written = work / f"{name}.plan"
    written.write_text(json.dumps({
        "files": files,
        "entries": {path: {key: value for key, value in it.items() if key not in ("sha256", "group")} for path, it in truth.items() if "\\" not in path},
        "names": {path: sorted(below) for path, below in names.items() if "\\" not in path},
        "dirs_without_time": sorted(image.dirs_without_time()),
        "programs": programs(work, files),
    }))
    return written


def programs(work: pathlib.Path, files: dict) -> list[tuple[str, str]]:
    """Programs of the image that run on this machine, and what they say to `--version`: found out with copies of them."""
    found = []
    for path, (size, _, tar, offset) in files.items():
        last = path.rpartition("/")[2]
        if last in PROGRAMS and "/bin/" in path:
            with open(tar, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            if data.startswith(ELF):
                copy = work / last
                copy.write_bytes(data)
                copy.chmod(0o755)
                done = process.run(copy, "--version", check=False)
                copy.unlink()
                if done.returncode == 0:
                    found.append((path, done.stdout))
    assert found, "no program of the image runs on this machine"
    return found


@dataclasses.dataclass
class Report:
    """What readers did, and what they saw of it."""

    operations: dict[str, int]
    n_bytes: int
    errors: list[str]
    # When operations began and ended that took more than a millisecond: all readers', on the clock of time.monotonic().
    spans: list[tuple[float, float]]

    def add(self, other: "Report") -> None:
        for kind, count in other.operations.items():
            self.operations[kind] = self.operations.get(kind, 0) + count
        self.n_bytes += other.n_bytes
        self.errors += other.errors
        self.spans += other.spans

    def take(self, kind: str, said: dict) -> None:
        """Adds what one reader said at its end."""
        self.operations[kind] = said["operations"]
        self.n_bytes += said["bytes"]
        self.errors += [f"{kind}: {text}" for text in said["kept"]] + [f"{kind}: and another"] * (said["errors"] - len(said["kept"]))
        self.spans += [tuple(it) for it in said["spans"]]

    def pauses(self, windows: list[tuple[float, float]]) -> list[float]:
        """For each window of time, the longest operation that was under way in it; 0 if all were fast."""
        return [max((end - begin for begin, end in self.spans if overlaps((begin, end), it)), default=0.0) for it in windows]

    def outside(self, windows: list[tuple[float, float]]) -> list[float]:
        """The operations that none of the windows has touched and that took more than a millisecond."""
        return [end - begin for begin, end in self.spans if not any(overlaps((begin, end), it) for it in windows)]


def overlaps(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def spread(seconds: list[float]) -> str:
    """p50/p99/max in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return "none"
    return "/".join(f"{ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1000:.1f}" for share in (0.5, 0.99, 1)) + " ms"


class Readers:
    """One reader of each kind on a directory."""

    def __init__(self, directory: pathlib.Path, written: pathlib.Path, seed: int, kinds=readers.KINDS):
        self.started = {}
        for number, kind in enumerate(kinds):
            command = ["setpriv", "--pdeathsig", "KILL", sys.executable, paths.E2E / "readers.py", kind, directory, written, str(seed + number)]
            self.started[kind] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for kind, it in self.started.items():
            if it.stdout.readline() != "ready\n":
                raise process.Failed(f"reader {kind}: {it.communicate()[1]}")

    def stop(self) -> Report:
        """Ends them; one that does not end or has died is an error."""
        report = Report({}, 0, [], [])
        for it in self.started.values():
            it.send_signal(signal.SIGTERM)
        for kind, it in self.started.items():
            try:
                out, err = it.communicate(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                # Not waited for: while nobody serves, not even this ends it.
                it.kill()
                it.stdout.close()
                it.stderr.close()
                report.errors.append(f"{kind}: hangs")
                continue
            if it.returncode != 0:
                report.errors.append(f"{kind}: ended with {it.returncode}: {err[-500:]}")
                continue
            report.take(kind, json.loads(out))
        return report

    def kill(self) -> None:
        for it in self.started.values():
            if it.poll() is None:
                it.kill()
