"""The first 4 KiB that a node reads of a layer whose index it knows and of which it has nothing else.

A node with index and access map on disk, but no data, publishes the image; the registry is given its
delay; one read of 4 KiB in a file that lies at 1, 50 or 99 % of the layer is timed. Nothing is streamed
beside it (`cache.complete_layers = false`), so that what is fetched and decompressed was for the read
alone. Beside it, what the inflater alone needs to get there: no stream is faster.
"""

import os
import pathlib
import random
import time

import images
from harness import driver, process, testregistry

from . import inflate, layers, measure, node, node_cache

IMAGES = tuple(layers.SIZES)
MAX_P50_SECONDS = 0.015
MAX_INFLATED_BYTES = 4 << 20
DEPTHS = (0.01, 0.50, 0.99)
DELAYS_MILLISECONDS = (0, 5, 20, 80)
READ_BYTES = 4096
# Without delay there is a bound, so it is looked at more often.
BOUND_ROUNDS = 15
# How far from the depth it may be, of the layer.
NEARNESS = 0.005


class Touch(measure.Sample):
    """A read, and what it cost elsewhere: `bytes` are those that the registry sent."""

    def __init__(self, seconds: float, counted: testregistry.Count, inflated: int):
        super().__init__(seconds, bytes=counted.bytes_sent)
        self.ranged, self.whole, self.inflated = counted.ranged, counted.gets - counted.ranged, inflated


class Layer:
    """A layer, the cache of a node that knows it, and its content to compare with."""

    def __init__(self, work: pathlib.Path, image: images.Image, registry: testregistry.TestRegistry, config: pathlib.Path, seed: pathlib.Path):
        self.work, self.image, self.registry, self.config, self.seed = work, image, registry, config, seed
        self.digest, self.diff_id = image.layer_digests()[0], image.layout.diff_ids(images.TAG)[0]
        self.reference = testregistry.reference(registry, image)
        note = image.note()
        self.layer_bytes = note["layer_bytes"]
        self.files = [it for it in note["files"] if it[2] >= READ_BYTES]

    def place(self, depth: float, number: int) -> tuple[str, int, int]:
        """A file, a page of it, and where that is in the layer: near this depth, at another place each round."""
        wanted = (depth + random.Random(f"{depth} {number}").uniform(-NEARNESS, NEARNESS)) * self.layer_bytes
        name, at, size = min(self.files, key=lambda it: max(it[1] - wanted, wanted - it[1] - it[2], 0))
        last = size // READ_BYTES - 1
        offset = min(max(int(wanted - at) // READ_BYTES, 0), last) * READ_BYTES
        return name, offset, at + offset

    def touch(self, depth: float, delay: int, number: int) -> Touch:
        name, offset, layer_offset = self.place(depth, number)
        cache = self.work / "cache"
        node_cache.without_data(self.seed, cache)
        with node.worker(self.work / "node", self.config, cache) as worker:
            worker.must_publish("v", self.reference)
            assert node_cache.present(cache, self.diff_id)[0] == 0, "the layer is there already"
            file = os.open(worker.target("v") / name, os.O_RDONLY)
            try:
                # One page is wanted, not what the kernel would read ahead.
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
                before = worker.metric("layer_decompressed_bytes_total")
                self.registry.set(delay_milliseconds=delay)
                self.registry.reset()
                begin = time.perf_counter()
                content = os.pread(file, READ_BYTES, offset)
                seconds = time.perf_counter() - begin
            finally:
                os.close(file)
            self.registry.set()
            counted = self.registry.blob(self.digest)
            # What was thrown away before the first chunk is in the metric alone.
            inflated = max(round(worker.metric("layer_decompressed_bytes_total") - before), node_cache.present(cache, self.diff_id)[0] * node_cache.CHUNK_BYTES)
        if content != self.truth(layer_offset):
            raise process.Failed(f"{name} of {self.image.name} is wrong at {offset}")
        return Touch(seconds, counted, inflated)

    def truth(self, layer_offset: int) -> bytes:
        with open(node_cache.layer_dir(self.seed, self.diff_id) / "data", "rb") as data:
            return os.pread(data.fileno(), READ_BYTES, layer_offset)


def play(layer: Layer, size: int, verdicts: measure.Verdicts) -> None:
    cases = {(delay, depth): (lambda number, delay=delay, depth=depth: layer.touch(depth, delay, number)) for delay in DELAYS_MILLISECONDS for depth in DEPTHS}
    # One that nobody counts: the layer's file may have left the page cache.
    layer.touch(DEPTHS[-1], 0, BOUND_ROUNDS)
    touched = measure.interleaved(cases, rounds=BOUND_ROUNDS, fewer={(delay, depth): measure.ROUNDS for delay, depth in cases if delay > 0})
    streamed = measure.interleaved(
        {depth: lambda _, depth=depth: inflate.inflate(layer.image.layout.blob(layer.digest), int(depth * layer.layer_bytes)) for depth in DEPTHS}, rounds=3)
    rows = []
    for (delay, depth), it in touched.items():
        greatest = lambda what: max(getattr(one, what) for one in it.all)
        rows.append([f"delay {delay} ms, depth {depth:.0%}", measure.seconds_text(it.median), measure.seconds_text(it.p90), str(greatest("ranged")), str(greatest("whole")),
                     f"{it.bytes / 1e6:.2f} MB", f"{greatest('inflated') / 2**20:.2f} MiB", measure.seconds_text(streamed[depth].median)])
    measure.table(f"4 KiB of a layer of {size} MB", ["p50", "p90", "ranged GETs", "whole GETs", "fetched", "inflated (most)", "inflater alone up to there"], rows)
    for depth in DEPTHS:
        verdicts.at_most(f"{size} MB at {depth:.0%}: first touch, p50", touched[0, depth].median * 1000, MAX_P50_SECONDS * 1000, " ms")
    every = [one for it in touched.values() for one in it.all]
    asked = {(one.ranged, one.whole) for one in every}
    verdicts.bound(asked == {(1, 0)}, f"{size} MB: GETs per first touch, (ranged, whole): {', '.join(map(str, sorted(asked)))} ((1, 0) alone)")
    verdicts.at_most(f"{size} MB: inflated per first touch, at most", max(one.inflated for one in every) / 2**20, MAX_INFLATED_BYTES / 2**20, " MiB")


def run(work: pathlib.Path, verdicts: measure.Verdicts) -> None:
    if not node.understands(work, "cache", "complete_layers", False):
        verdicts.skip("first touch", "this program cannot read at random in a compressed layer (it has no cache.complete_layers)")
        return
    for name, size in layers.SIZES.items():
        image, directory = images.get(name), work / name
        directory.mkdir()
        registry = testregistry.serving(directory, [image])
        try:
            config = driver.write_config(directory / "config.toml", plain_http=[registry.host], cache={"complete_layers": False})
            with node.seeded(directory, config, testregistry.reference(registry, image), image.layout.diff_ids(images.TAG)) as seed:
                play(Layer(directory, image, registry, config, seed), size // layers.MB, verdicts)
        finally:
            registry.stop()
