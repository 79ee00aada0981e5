"""`import numpy, pandas` in a tree of FUSE, against the same tree on the same disk. No bounds.

Python is the image's own, in a root of its own (chroot), with compiled modules as images have them. Whoever is
asked first has an empty page cache; `again` has not.
"""

import pathlib
import shutil
import subprocess

import images
from harness import driver, process, testregistry

from . import measure, node, node_cache, page_cache

IMAGES = ("bench-python",)
COMMAND = ["/usr/bin/python3", "-B", "-c", "import numpy, pandas; print(pandas.DataFrame({'a': numpy.arange(3)}).sum().a)"]


def start(tree: pathlib.Path) -> measure.Sample:
    out = []
    sample = measure.timed(lambda: out.append(subprocess.run(["chroot", tree, *COMMAND], check=True, stdout=subprocess.PIPE, text=True).stdout))
    if out[0] != "3\n":
        raise process.Failed(f"python in {tree} printed {out[0]!r}")
    return sample


class Case:
    """Starts on a node that is made anew each time."""

    def __init__(self, work: pathlib.Path, reference: str, config: pathlib.Path):
        self.work, self.reference, self.config, self.again = work, reference, config, measure.Samples()

    def on_node(self, number: int, cache: pathlib.Path | None = None, *, has_layers=False) -> measure.Sample:
        """The publish counts where it has to get something."""
        with node.worker(self.work / f"node-{number}", self.config, cache, keep_cache=has_layers) as worker:
            page_cache.drop()
            cpu = measure.cpu_of(worker.server.pid)
            published = worker.must_publish("v", self.reference).milliseconds / 1000
            sample = start(worker.target("v"))
            sample.seconds += 0 if has_layers else published
            sample.cpu_seconds += measure.cpu_of(worker.server.pid) - cpu
            self.again.all.append(start(worker.target("v")))
            return sample


def run(work: pathlib.Path, verdicts: measure.Verdicts) -> None:
    if page_cache.cannot():
        verdicts.skip("python", page_cache.cannot())
        return
    image = images.get(IMAGES[0])
    registry = testregistry.serving(work, [image])
    try:
        config = driver.write_config(work / "config.toml", plain_http=[registry.host])
        reference = testregistry.reference(registry, image)
        native = work / "native"
        with node.seeded(work, config, reference, image.layout.diff_ids(images.TAG)) as seed:
            with node.worker(work / "copied", config, seed, keep_cache=True) as worker:
                worker.must_publish("v", reference)
                process.run("cp", "-a", worker.target("v"), native)
            play(Case(work, reference, config), seed, native)
    finally:
        registry.stop()
        shutil.rmtree(work / "native", ignore_errors=True)


def play(case: Case, seed: pathlib.Path, native: pathlib.Path) -> None:
    def known(number: int) -> measure.Sample:
        cache = case.work / f"known-{number}"
        node_cache.without_data(seed, cache)
        return case.on_node(number, cache)

    def native_cold(_number: int) -> measure.Sample:
        page_cache.drop()
        return start(native)

    samples = measure.interleaved({
        "native, page cache cold": native_cold,
        "native, again": lambda _: start(native),
        "nothing cached (with the publish)": case.on_node,
        "index known (with the publish)": known,
        "layers on disk, page cache cold": lambda number: case.on_node(number, seed, has_layers=True),
    }, prepare=measure.settle)
    samples["FUSE, again"] = case.again
    measure.cases_table("import numpy, pandas", samples, base="native, page cache cold")
