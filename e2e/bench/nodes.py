"""1, 4 and 16 nodes that publish the same image at once, with one Redis and one registry.

First with an empty Redis, then with other nodes that find in it what the first ones have put there.
Each node is a process with a cache of its own. All have the same two cores here, so the times say how
the work is shared, and not how fast sixteen machines would be; the counts are what they are anywhere.
"""

import concurrent.futures
import contextlib
import pathlib
import time

import images
from harness import driver, process, services, testregistry

from . import measure, node

IMAGES = ("demo5",)
COUNTS = (1, 4, 16)
UPLOAD_SECONDS = 120


class Crowd:
    """What nodes that started at once did."""

    def __init__(self, publishes: list[float], first_bytes: list[float], registry_gets: list[int], decompressions: int, cpu_seconds: float):
        self.publishes, self.first_bytes = publishes, first_bytes
        self.registry_gets, self.decompressions, self.cpu_seconds = registry_gets, decompressions, cpu_seconds


def start_together(workers: list[driver.Worker], image: images.Image, registry: testregistry.TestRegistry) -> Crowd:
    reference = testregistry.reference(registry, image)
    names = [sorted(layer)[len(layer) // 2] for layer in image.note()["files"]]
    registry.reset()
    cpu = sum(measure.cpu_of(it.server.pid) for it in workers)

    def access(worker: driver.Worker) -> tuple[float, float]:
        """Publish, and the first byte of a file of the last layer, each from the start on; then something of each layer."""
        publish = worker.must_publish("v", reference).milliseconds / 1000
        replied = time.perf_counter()
        for name in reversed(names):
            with open(worker.target("v") / name, "rb", buffering=0) as file:
                file.read(1)
            if name == names[-1]:
                first_byte = publish + time.perf_counter() - replied
        return publish, first_byte

    with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
        times = list(pool.map(access, workers))
    return Crowd(
        [it[0] for it in times], [it[1] for it in times], [registry.blob(digest).gets for digest in image.layer_digests()],
        round(sum(it.metric("layer_decompressions_total", outcome="ok") for it in workers)), sum(measure.cpu_of(it.server.pid) for it in workers) - cpu)


def play(work: pathlib.Path, image: images.Image, registry: testregistry.TestRegistry, count: int) -> dict[str, Crowd]:
    redis = services.Redis(work)
    try:
        config = driver.write_config(work / "config.toml", plain_http=[registry.host], redis=redis, key_file=work / "hmac.key")
        out = {}
        for state in ("cold", "warm"):
            measure.settle()
            with contextlib.ExitStack() as stack:
                workers = [stack.enter_context(node.worker(work / f"{state}{number}", config)) for number in range(count)]
                out[state] = start_together(workers, image, registry)
                if state == "cold":
                    # A manifest is written last (docs/REMOTE_FORMAT.md).
                    keys = [f"clip:oci:layer:decompressed:{it}" for it in image.layout.diff_ids(images.TAG)]
                    process.wait_until(lambda: all(redis.command("EXISTS", it) == "1" for it in keys), "the layers to be in Redis", seconds=UPLOAD_SECONDS)
        return out
    finally:
        redis.stop()


def run(work: pathlib.Path, verdicts: measure.Verdicts) -> None:
    image = images.get(IMAGES[0])
    registry = testregistry.serving(work, [image])
    crowds = {}
    try:
        for count in COUNTS:
            directory = work / f"n{count}"
            directory.mkdir()
            crowds[count] = play(directory, image, registry, count)
    finally:
        registry.stop()
    n_layers = len(image.layer_digests())
    rows = []
    for count, states in crowds.items():
        for state, it in states.items():
            rows.append([f"{count} node{'s' * (count > 1)}, Redis {state}", *(measure.seconds_text(value) for value in (
                sorted(it.publishes)[len(it.publishes) // 2], measure.p90(it.publishes), sorted(it.first_bytes)[len(it.first_bytes) // 2], measure.p90(it.first_bytes))),
                f"{it.cpu_seconds:.2f} s", f"{sum(it.registry_gets)}", str(it.decompressions)])
    measure.table(f"nodes that publish {n_layers} layers at once", ["publish p50", "p90", "first byte p50", "p90", "CPU, all", "GETs of layers", "decompressions"], rows)
    most = crowds[max(COUNTS)]
    verdicts.exactly(f"{max(COUNTS)} nodes, Redis cold: registry GETs of each layer in total, at most", max(most["cold"].registry_gets), 1)
    for count in COUNTS:
        verdicts.exactly(f"{count} nodes, Redis warm: decompressions", crowds[count]["warm"].decompressions, 0)
