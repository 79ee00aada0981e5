"""The most that the three roles of a node ever hold (VmHWM), whatever the image and whoever reads.

Each case is a node of its own, run as the chart does: agent, serve and node, with Redis as the remote. Beside
it is what the kernel has counted for all three together at most, their share of the page cache included.
"""

import pathlib
import shutil
import subprocess

import images
from harness import driver, memory_group, oci, paths, process, services, testregistry, trio

from . import layers, measure, node_cache

IMAGES = ("demo5", "bench-300mb", "bench-1200mb", "bench-million")
MEGABYTE = 1e6
MOST_MB = {"serve": 10, "agent": 16, "node": 10}
N_READERS = 64
# What the group may take is more than any machine has: it only counts.
NO_LIMIT_BYTES = 1 << 50


class Node:
    """A node with a cold cache, that ends with its case."""

    def __init__(self, work: pathlib.Path, name: str, config: pathlib.Path, binary: pathlib.Path):
        self.group = None if memory_group.why_not() else memory_group.MemoryGroup(f"bench-{name}", NO_LIMIT_BYTES)
        self.trio = trio.Trio(work / name, config, binary, start=())

    def __enter__(self) -> trio.Trio:
        self.trio.start(*trio.ROLES, prefix=self.group.prefix if self.group else ())
        return self.trio

    def __exit__(self, *_):
        self.trio.end()
        shutil.rmtree(self.trio.directory, ignore_errors=True)
        if self.group:
            self.group.remove()

    def most(self) -> dict[str, float]:
        """In MB, by role and of all together."""
        out = {role: self.trio.memory(role)["VmHWM"] / MEGABYTE for role in trio.ROLES}
        if self.group:
            out["all, with page cache"] = self.group.peak_bytes() / MEGABYTE
        return out


def read_all(*below: pathlib.Path) -> None:
    """Every byte, one reader for each directory at the same time."""
    command = "find . -type f -exec cat {} + >/dev/null"
    readers = [subprocess.Popen(["sh", "-c", command], cwd=it) for it in below]
    if any([it.wait(900) for it in readers]):
        raise process.Failed("a reader failed")


def whole(name: str, tops: list[str]):
    """Publishes an image on a cold node and reads what is below `tops`, until its layers are whole on disk."""
    def case(node: trio.Trio, registry: testregistry.TestRegistry) -> None:
        image = images.get(name)
        node.must_publish("v", testregistry.reference(registry, image))
        read_all(*(node.target("v") / it for it in tops))
        for diff_id in image.layout.diff_ids(images.TAG):
            process.wait_until(lambda it=diff_id: node_cache.is_complete(node.cache_dir, it), "a layer to be on disk", seconds=300)
    return case


def readers(node: trio.Trio, registry: testregistry.TestRegistry) -> None:
    """Many readers of one cold image at once, each of files of its own."""
    image = images.get("bench-300mb")
    node.must_publish("v", testregistry.reference(registry, image))
    names = [name for name, _, _ in image.note()["files"]]
    running = []
    for number in range(N_READERS):
        running.append(subprocess.Popen(["xargs", "-d", "\\n", "cat"], cwd=node.target("v"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
        running[-1].stdin.write("\n".join(names[number::N_READERS]).encode())
        running[-1].stdin.close()
    if any([it.wait(900) for it in running]):
        raise process.Failed("a reader failed")


def million(node: trio.Trio, registry: testregistry.TestRegistry) -> None:
    """`find` through a tree of a million files."""
    node.must_publish("v", testregistry.reference(registry, images.get("bench-million")))
    found = subprocess.run("find . -type f -size -1 | wc -l", shell=True, check=True, cwd=node.target("v"), stdout=subprocess.PIPE, text=True, timeout=900)
    if int(found.stdout) != layers.N_MILLION:
        raise process.Failed(f"find saw {found.stdout.strip()} files of {layers.N_MILLION}")


CASES = {
    "five layers of 30 MB at once, uploaded meanwhile": whole("demo5", [f"layer-{number}" for number in range(1, 6)]),
    "one layer of 1.2 GB, read to its end": whole("bench-1200mb", ["files"]),
    f"{N_READERS} readers of a layer of 300 MB": readers,
    "find in a tree of a million files": million,
}


def run(work: pathlib.Path, verdicts: measure.Verdicts) -> None:
    registry = testregistry.serving(work, [images.get(it) for it in IMAGES])
    binary, rows = paths.install(work / "bin"), []
    try:
        for number, (name, case) in enumerate(CASES.items()):
            redis = services.Redis(work)
            try:
                key = work / f"key{number}"
                config = driver.write_config(work / f"config{number}.toml", plain_http=[registry.host], redis=redis, key_file=key)
                process.run("chown", str(process.UNPRIVILEGED), key)
                node = Node(work, f"n{number}", config, binary)
                with node as started:
                    case(started, registry)
                    most = node.most()
                rows.append((name, most))
            finally:
                redis.stop()
    finally:
        registry.stop()
    columns = list(dict.fromkeys(column for _, most in rows for column in most))
    measure.table("VmHWM", columns, [[name, *(f"{most[it]:.1f} MB" for it in columns)] for name, most in rows])
    for name, most in rows:
        for role, limit in MOST_MB.items():
            verdicts.at_most(f"{role}, {name}", most[role], limit, " MB")
