"""How fast indexes are made (`clip-csi index build`, layers included), and how many bytes they take. No bounds."""

import pathlib
import shutil

import images
from harness import driver, testregistry

from . import measure, node_cache

IMAGES = ("bench-300mb", "bench-tree")
ROUNDS = 3


def run(work: pathlib.Path, verdicts: measure.Verdicts) -> None:
    chosen = [images.get(name) for name in IMAGES]
    registry = testregistry.serving(work, chosen)
    config = driver.write_config(work / "config.toml", plain_http=[registry.host])
    built: dict[str, dict] = {}

    def build(image: images.Image) -> measure.Sample:
        cache, out = work / "cache", []
        sample = measure.timed(lambda: out.append(driver.clip("index", "build", testregistry.reference(registry, image), config=config, cache_dir=cache).stdout))
        sample.bytes = sum(path.stat().st_size for path in cache.glob("layers/*/data"))
        inodes = next(int(line.split()[1]) for line in out[0].splitlines() if line.startswith("inodes"))
        built[image.name] = {"inodes": inodes, **node_cache.index_bytes(cache)}
        shutil.rmtree(cache)
        return sample

    try:
        samples = measure.interleaved({it.name: lambda _, it=it: build(it) for it in chosen}, rounds=ROUNDS, prepare=measure.settle)
    finally:
        registry.stop()
    rows = []
    for name, it in samples.items():
        facts = built[name]
        per_inode = lambda what: f"{facts[what] / facts['inodes']:.0f} B"
        rows.append([name, measure.seconds_text(it.median), measure.seconds_text(it.p90), f"{it.cpu_seconds:.2f} s", f"{it.bytes / 1e6:.0f} MB", f"{it.bytes / it.median / 1e6:.0f} MB/s",
                     str(facts["inodes"]), per_inode("layers"), per_inode("images"), f"{facts['access maps'] / it.bytes:.2%}" if facts["access maps"] else "none"])
    measure.table("index build", ["median", "p90", "CPU", "layers", "rate", "files", "layer indexes per file", "image index per file", "access maps of the layers"], rows)
