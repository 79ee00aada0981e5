"""A cold layer on disk (fetched, decompressed, verified, indexed), against the inflater alone.

Both bounds are of medians of the same rounds. The inflater is the driver's own decoder on one thread
(benches/inflate.rs) with a blob from the page cache; the driver has the blob from a registry on
loopback. Whoever writes, writes to the same disk; only the driver calls fsync, in the background.
"""

import os
import pathlib
import shlex
import shutil
import sys
import time

import images
from harness import driver, paths, process, services, testregistry

from . import layers, measure, node, node_cache

MAX_COLD = 1.25
MAX_TWO_CORES = 0.75
# What the driver's other thread does most. Done for nobody, until it is killed.
HASHING = "import hashlib; h, b = hashlib.sha256(), bytes(1 << 17)\nwhile True: h.update(b)"
UNPACK = "skopeo copy + umoci unpack"
IMAGES = ("bench-30mb", "bench-300mb")


def inflater() -> pathlib.Path:
    """benches/inflate.rs."""
    return measure.program("inflate")


def inflate(blob: pathlib.Path, until: int | None = None) -> measure.Sample:
    """The inflater alone; its clock is its own, so that its start does not count."""
    out = []
    sample = measure.timed(lambda: out.append(process.run(inflater(), blob, *([str(until)] if until is not None else [])).stdout))
    seconds, _, layer_bytes = out[0].split()
    return measure.Sample(float(seconds), sample.cpu_seconds, int(layer_bytes))


def beside_hashing(blob: pathlib.Path) -> measure.Sample:
    """The inflater with somebody on the other core: what two that run at once cost each other."""
    other = process.Server([sys.executable, "-c", HASHING], stdout=pathlib.Path(os.devnull))
    try:
        # It has begun by then.
        time.sleep(0.2)
        return inflate(blob)
    finally:
        other.kill()


class Layer:
    """One of the layers, and the ways to get it on disk."""

    def __init__(self, work: pathlib.Path, image: images.Image, registry: testregistry.TestRegistry, config: pathlib.Path):
        self.work, self.image, self.registry, self.config = work, image, registry, config
        self.digest, self.diff_id = image.layer_digests()[0], image.layout.diff_ids(images.TAG)[0]
        self.blob = image.layout.blob(self.digest)
        self.reference = testregistry.reference(registry, image)
        self.url = registry.url(f"e2e/{image.name}", "blobs", self.digest)
        self.file = work / "file"
        note = image.note()
        self.layer_bytes, self.first_file = note["layer_bytes"], note["files"][0][0]

    def to_file(self, command: str) -> measure.Sample:
        sample = node.shell(f"{command} > {shlex.quote(str(self.file))}")
        sample.bytes = self.file.stat().st_size
        self.file.unlink()
        return sample

    def skopeo_and_umoci(self) -> measure.Sample:
        layout, bundle = self.work / "oci", self.work / "bundle"
        sample = node.shell(f"skopeo copy --quiet --src-tls-verify=false docker://{self.reference} oci:{layout}:latest"
                            f" && umoci unpack --image {layout}:latest {bundle} >/dev/null")
        for it in (layout, bundle):
            shutil.rmtree(it)
        return sample

    def cold(self, number: int, reference: str) -> measure.Sample:
        """A publish on a node that has nothing."""
        with node.worker(self.work / f"cold-{number}", self.config) as worker:
            cpu = measure.cpu_of(worker.server.pid)
            published = worker.must_publish("v", reference).milliseconds / 1000
            replied = time.perf_counter()
            # The client's start is no part of it. A publish may answer before the layer is whole.
            if not node_cache.is_complete(worker.cache_dir, self.diff_id):
                node.wait_for_layer(worker, self.diff_id)
                published += time.perf_counter() - replied
            return measure.Sample(published, measure.cpu_of(worker.server.pid) - cpu, self.layer_bytes)

    def known(self, number: int, seed: pathlib.Path) -> measure.Sample:
        """A node that has index and access map, but nothing of the layer: from the first read on until all of it is there."""
        cache = self.work / f"known-cache-{number}"
        node_cache.without_data(seed, cache)
        with node.worker(self.work / f"known-{number}", self.config, cache) as worker:
            worker.must_publish("v", self.reference)
            assert node_cache.present(cache, self.diff_id)[0] == 0, "the layer is there already"
            name = self.first_file
            cpu, begin = measure.cpu_of(worker.server.pid), time.perf_counter()
            with open(worker.target("v") / name, "rb", buffering=0) as file:
                file.read(1)
            node.wait_for_layer(worker, self.diff_id)
            return measure.Sample(time.perf_counter() - begin, measure.cpu_of(worker.server.pid) - cpu, self.layer_bytes)


def play(layer: Layer, from_docker_registry: str, verdicts: measure.Verdicts) -> None:
    megabytes = round(layer.layer_bytes / 1e6)
    blob, url = shlex.quote(str(layer.blob)), shlex.quote(layer.url)
    with node.seeded(layer.work, layer.config, layer.reference, [layer.diff_id]) as seed:
        has_map = (node_cache.layer_dir(seed, layer.diff_id) / "access").exists()
        cases = {
            "inflater alone": lambda _: inflate(layer.blob),
            "the same, beside one that hashes": lambda _: beside_hashing(layer.blob),
            "gzip -dc > file": lambda _: layer.to_file(f"gzip -dc < {blob}"),
            "curl | gzip -dc > file": lambda _: layer.to_file(f"curl -sSf --noproxy '*' {url} | gzip -dc"),
            "cold layer by a publish": lambda number: layer.cold(number, layer.reference),
            "the same, from docker-registry": lambda number: layer.cold(number, from_docker_registry),
        }
        if has_map:
            cases["cold layer, checkpoints known"] = lambda number: layer.known(number, seed)
        if shutil.which("skopeo") and shutil.which("umoci"):
            cases[UNPACK] = lambda _: layer.skopeo_and_umoci()
        else:
            verdicts.skip(UNPACK, "not installed; e2e/install.sh demo does")
        samples = measure.interleaved(cases, prepare=measure.settle, fewer={UNPACK: 2})
    measure.cases_table(f"one layer of {megabytes} MB", samples, base="inflater alone")
    base = samples["inflater alone"].median
    verdicts.at_most(f"cold layer of {megabytes} MB, fetched, verified, indexed, on disk / inflater alone", samples["cold layer by a publish"].median / base, MAX_COLD, " x")
    bound = f"cold layer of {megabytes} MB, checkpoints known, two cores / inflater alone"
    if has_map:
        verdicts.at_most(bound, samples["cold layer, checkpoints known"].median / base, MAX_TWO_CORES, " x")
    else:
        verdicts.skip(bound, "this program keeps no access map beside a layer")


def run(work: pathlib.Path, verdicts: measure.Verdicts) -> None:
    chosen = [images.get(name) for name in IMAGES]
    inflater()
    registry = testregistry.serving(work, chosen)
    docker_registry = services.Registry(work, work / "registry")
    try:
        config = driver.write_config(work / "config.toml", plain_http=[registry.host, docker_registry.host])
        for image in chosen:
            directory = work / image.name
            directory.mkdir()
            layer = Layer(directory, image, registry, config)
            # Its file in the layout is in the page cache for everybody.
            layer.to_file(f"cat {shlex.quote(str(layer.blob))}")
            play(layer, image.push(docker_registry.host), verdicts)
    finally:
        registry.stop()
        docker_registry.stop()
