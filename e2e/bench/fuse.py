"""Reads and looks through FUSE and in the kernel, with all layers on disk, against a copy of the same tree on the same disk.

Through FUSE an image is read that was not whole when it was mounted; one that was, the kernel serves alone (`node.kernel_mounts`).
The share is native time / time of the medians: 1 is as fast, more is faster. What reads is compiled and
does nothing else (tools/benchreader). Warm: all trees have been gone through before. Cold: the page
cache, names and inodes of this machine are dropped before each run.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import images
from harness import driver, paths, process, testregistry, trio

from . import layers, measure, node, page_cache

IMAGES = ("bench-tree",)
# What a run can read of a cold disk in about a second.
WARM_READS, COLD_READS = 50_000, 2000


@dataclasses.dataclass
class Way:
    """A way to read; `share` is the bound, if there is one."""

    name: str
    words: list
    share: float | None
    path: str = ""
    listed: str = ""


def ways(warm: bool) -> list[Way]:
    reads = WARM_READS if warm else COLD_READS
    big = layers.BIG_FILE
    bounds = {"seq": 0.85, "4k": 0.75, "128k": 0.75, "walk": 0.9, "stat": 0.9, "small": 0.9, "exec": 0.9} if warm else {"seq": 0.85, "4k": 0.45, "walk": 0.95, "small": 0.8, "parallel": 1.3}
    both = [
        Way("sequential, 512 MiB", ["seq"], bounds["seq"], big),
        Way("random 4 KiB", ["rand", "--block", 4096, "--count", reads], bounds["4k"], big),
        Way("random 128 KiB", ["rand", "--block", 131072, "--count", reads // 10], bounds.get("128k"), big),
        Way("walk (find -ls)", ["walk"], bounds["walk"]),
        Way("many small files, one reader", ["small"], bounds["small"], listed="small"),
        Way("mmap, in order", ["mmap"], None, big),
        Way("mmap, at random", ["mmap-rand", "--count", reads], None, big),
    ]
    if warm:
        return [*both, Way("stat of each name", ["stat"], bounds["stat"], listed="names"), Way("exec", ["exec", "--count", 200], bounds["exec"])]
    return [*both, Way("many small files, four readers", ["small", "--readers", 4], bounds["parallel"], listed="small")]


class Trees:
    """The same tree more than once."""

    def __init__(self, work: pathlib.Path, worker: driver.Worker, native: pathlib.Path, kernel: pathlib.Path | None):
        self.worker, self.trees = worker, {"native": native, "fuse": worker.target("v"), **({"kernel": kernel} if kernel else {})}
        self.lists = {"names": work / "names", "small": work / "small-files"}
        # In one order for both, that of the layer and of the copy, and not what either directory happens to answer.
        names = sorted(str(path.relative_to(native)) for path in native.rglob("*"))
        self.lists["names"].write_text("".join(f"{name}\n" for name in names if "\n" not in name))
        self.lists["small"].write_text("".join(f"{name}\n" for name in names if name.startswith(layers.SMALL_DIR) and name.count("/") == 3))

    def read(self, way: Way, tree: str, number: int) -> measure.Sample:
        listed = ["--list", self.lists[way.listed]] if way.listed else []
        before = measure.cpu_of(self.worker.server.pid)
        # Another seed each round, or a cold disk would be asked for the same blocks.
        words = [driver.csictl().with_name("benchreader"), *way.words, "--seed", number + 1, *listed, self.trees[tree] / way.path if way.path else self.trees[tree]]
        out = json.loads(process.run(*map(str, words)).stdout)
        served = measure.cpu_of(self.worker.server.pid) - before if tree == "fuse" else 0.0
        return measure.Sample(out["seconds"], out["cpu_seconds"] + served, out["bytes"], out["operations"])

    def compare(self, warm: bool, verdicts: measure.Verdicts) -> None:
        chosen = ways(warm)
        cases = {(way.name, tree): (lambda number, way=way, tree=tree: self.read(way, tree, number)) for way in chosen for tree in self.trees}
        if warm:
            for case in cases.values():
                case(0)
        samples = measure.interleaved(cases, prepare=(lambda: None) if warm else page_cache.drop)
        state = "page cache warm" if warm else "page cache cold"
        rows = []
        for way in chosen:
            native, ours = samples[way.name, "native"], samples[way.name, "fuse"]
            kernel = [samples[way.name, it] for it in self.trees if it == "kernel"]
            operations = {one.operations for it in (native, ours, *kernel) for one in it.all}
            if len(operations) != 1:
                raise process.Failed(f"{way.name}: not the same was done each time: {operations}")
            rows.append([way.name, *(measure.seconds_text(value) for value in (native.median, native.p90, ours.median, ours.p90)),
                         f"{native.cpu_seconds:.2f} s", f"{ours.cpu_seconds:.2f} s", f"{ours.bytes / 1e6:.0f} MB" if ours.bytes else "-", f"{native.median / ours.median:.2f}",
                         *(text for it in kernel for text in (measure.seconds_text(it.median), measure.seconds_text(it.p90), f"{it.cpu_seconds:.2f} s", f"{native.median / it.median:.2f}"))])
        columns = ["native p50", "p90", "FUSE p50", "p90", "CPU native", "CPU FUSE, with server", "bytes", "share"]
        measure.table(state, [*columns, *(["kernel p50", "p90", "CPU kernel", "share"] if "kernel" in self.trees else [])], rows)
        for tree, where in {"fuse": "through FUSE", "kernel": "in the kernel"}.items():
            for way in chosen if tree in self.trees else []:
                if way.share is not None:
                    verdicts.at_least(f"{state}, {way.name}: share of native {where}", samples[way.name, "native"].median / samples[way.name, tree].median, way.share)


@contextlib.contextmanager
def in_kernel(work: pathlib.Path, host: str, reference: str):
    """The image as the kernel serves it on another node, or nothing where it cannot."""
    config = driver.write_config(work / "kernel.toml", plain_http=[host], node={"kernel_mounts": "whole-on-any-kernel"})
    other = trio.Trio(work / "kernel", config, paths.install(work / "bin"))
    try:
        other.must_publish("v", reference)
        yield other.target("v") if other.metric("kernel_mounts") else None
    finally:
        other.end()
        shutil.rmtree(other.directory, ignore_errors=True)


def run(work: pathlib.Path, verdicts: measure.Verdicts) -> None:
    image = images.get(IMAGES[0])
    registry = testregistry.serving(work, [image])
    reference = testregistry.reference(registry, image)
    try:
        config = driver.write_config(work / "config.toml", plain_http=[registry.host])
        with node.worker(work / "node", config) as worker, in_kernel(work, registry.host, reference) as kernel:
            worker.must_publish("v", reference)
            for diff_id in image.layout.diff_ids(images.TAG):
                node.wait_for_layer(worker, diff_id)
            native = work / "native"
            process.run("cp", "-a", worker.target("v"), native)
            measure.settle()
            print(f"    all on {process.run('findmnt', '--noheadings', '--output', 'FSTYPE', '--target', native).stdout.strip()}")
            if not kernel:
                verdicts.skip("in the kernel", "this one has no EROFS of files")
            trees = Trees(work, worker, native, kernel)
            trees.compare(True, verdicts)
            if page_cache.cannot():
                verdicts.skip("page cache cold", page_cache.cannot())
            else:
                trees.compare(False, verdicts)
    finally:
        registry.stop()
        shutil.rmtree(work / "native", ignore_errors=True)
