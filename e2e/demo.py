#!/usr/bin/env python3
"""The demo: three stories of one image through the CSI socket, told in a table.

  A, first     worker A has nothing: publish, first byte, 50 files of all layers, everything
  A, again     worker A later: its disk has the layers
  B, cold      worker B has nothing, but the remote content cache has what A put there

A real docker-registry, a real redis-server, an image of five layers of 30 MB of real files, and the
program itself; nothing is simulated. Every file is compared with its digest. Takes down all that it
put up, and exits with 1 if a bound is missed.

What is measured how:
  - "publish" is the time of the RPC NodePublishVolume as the client sees it.
  - "first byte" is from the start of the publish to the first byte of a file; "after open" is from
    its open(2) only.
  - Reads go through the kernel. The first time a file is read on a mount, the page cache has nothing
    of it, so the read reaches the driver. "again" reads reach it because the volume was unpublished
    and published anew in between; what a second read of the same mount takes, from the page cache,
    is told apart. The layer's file on the cache disk may itself be in the page cache, as it is on a
    node that has just written it.
  - The ratio: one layer, fetched, decompressed, verified against both digests, indexed and stored,
    against `curl BLOB | gzip -dc > FILE` of the same layer from the same registry, in turns in this
    run. Both write to the same disk; only the driver calls fsync. It has no remote cache then.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shlex
import statistics
import sys
import time

import images
from harness import driver, paths, process, services
from harness.process import Failed, say
from harness.table import megabytes, milliseconds, print_table

FILES_READ = 50
# The median of fewer moves with what else the machine does.
RATIO_SAMPLES = 9
READ_BYTES = 1 << 20

# The bounds of the issue.
MAX_FIRST_BYTE_SECONDS = 0.15
MAX_RATIO = 0.6
MIN_DISK_HITS = 0.95
MAX_HIGHWATER_BYTES = 20 * 1000 * 1000


def read_file(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def timed(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


class Story:
    """One worker's access to the demo image, measured."""

    def __init__(self, name: str, worker: driver.Worker, registry: services.Registry, image: images.Image, reference: str):
        self.name, self.worker, self.registry, self.image, self.reference = name, worker, registry, image, reference
        self.layers = image.note()["files"]
        self.digests = {name: digest for layer in self.layers for name, digest in layer.items()}

    def read(self, names) -> None:
        root = self.worker.target(self.volume)
        for name in names:
            seen = read_file(root / name)
            if seen != self.digests[name]:
                raise Failed(f"{self.name}: {name} has sha256 {seen}, should have {self.digests[name]}")

    def play(self, volume: str) -> None:
        self.volume = volume
        self.mark, self.before = self.registry.mark(), self.worker.metrics()
        # The same 50 files each time, ten of each layer, in mixed order.
        dice = random.Random(50)
        fifty = [name for layer in self.layers for name in dice.sample(sorted(layer), FILES_READ // len(self.layers))]
        dice.shuffle(fifty)
        self.publish = self.worker.must_publish(volume, self.reference).milliseconds / 1000
        begin = time.perf_counter()
        with open(self.worker.target(volume) / fifty[0], "rb", buffering=0) as file:
            file.read(1)
        self.open_to_first_byte = time.perf_counter() - begin
        self.first_byte = self.publish + self.open_to_first_byte
        self.fifty = timed(lambda: self.read(fifty))
        self.decompressions_after_fifty = self.delta("layer_decompressions_total", outcome="ok")
        self.everything = self.fifty + timed(lambda: self.read(name for name in sorted(self.digests) if name not in set(fifty)))
        self.hits = {tier: self.delta("tier_reads_total", tier=tier, outcome="hit") for tier in ("disk", "content_cache", "registry")}
        self.decompressions = self.delta("layer_decompressions_total", outcome="ok")
        # What the page cache has is read without the driver.
        self.from_page_cache = timed(lambda: self.read(fifty))
        self.count_gets()

    def delta(self, name: str, **labels) -> int:
        return round(self.worker.metric(name, **labels) - driver.metric(self.before, name, **labels))

    def count_gets(self) -> None:
        gets = self.registry.blob_gets(self.mark)
        self.layer_gets = sum(gets[digest] for digest in self.image.layer_digests())
        self.other_gets = sum(gets.values()) - self.layer_gets

    def finish(self) -> None:
        """At the end of the story: what the worker holds, and what it asked for in the meantime."""
        self.memory = self.worker.memory()
        self.count_gets()


def curl_and_gzip(url: str, target: pathlib.Path) -> float:
    command = f"set -o pipefail; curl -sSf --noproxy '*' {shlex.quote(url)} | gzip -dc > {shlex.quote(str(target))}"
    seconds = timed(lambda: process.run("bash", "-c", command))
    target.unlink()
    return seconds


def measure_ratio(work: pathlib.Path, registry: services.Registry, config: pathlib.Path, one: images.Image, reference: str) -> dict:
    """Samples in turns, because the machine is not the same from one second to the next."""
    digest = one.layer_digests()[0]
    url = f"http://{registry.host}/v2/e2e/{one.name}/blobs/{digest}"
    samples = {"curl": [], "publish": [], "index": [], "first_byte": []}
    name = sorted(one.note()["files"][0])[0]
    # The registry's own file is in the page cache for everybody.
    curl_and_gzip(url, work / "warm-up")
    for number in range(RATIO_SAMPLES):
        samples["curl"].append(curl_and_gzip(url, work / "unpacked"))

        cold = driver.Worker(work / f"cold-{number}", config)
        try:
            publish = cold.must_publish("one", reference).milliseconds / 1000
            replied = time.perf_counter()
            with open(cold.target("one") / name, "rb", buffering=0) as file:
                file.read(1)
            samples["first_byte"].append(publish + time.perf_counter() - replied)
            # A publish may reply before the whole layer is there: then until it is.
            complete = lambda: cold.metric("layer_decompressions_total", outcome="ok") == 1
            if not complete():
                process.wait_until(complete, "the layer to be decompressed", most_pause=0.01)
                publish += time.perf_counter() - replied
            samples["publish"].append(publish)
            cold.must_unpublish("one")
        finally:
            cold.stop()

        samples["index"].append(timed(lambda: driver.clip("index", "build", reference, config=config, cache_dir=work / f"index-{number}")))
    return samples


def print_stories(stories: list[Story]) -> None:
    print()
    print_table([
        ["", *(story.name for story in stories)],
        ["publish", *(milliseconds(s.publish) for s in stories)],
        ["first byte (from publish)", *(milliseconds(s.first_byte) for s in stories)],
        ["first byte (after open)", *(milliseconds(s.open_to_first_byte) for s in stories)],
        [f"{FILES_READ} files of all layers", *(milliseconds(s.fifty) for s in stories)],
        ["all files", *(milliseconds(s.everything) for s in stories)],
        [f"the same {FILES_READ}, page cache", *(milliseconds(s.from_page_cache) for s in stories)],
        ["tier hits: disk", *(str(s.hits["disk"]) for s in stories)],
        ["tier hits: content cache", *(str(s.hits["content_cache"]) for s in stories)],
        ["tier hits: registry", *(str(s.hits["registry"]) for s in stories)],
        ["decompressions", *(str(s.decompressions) for s in stories)],
        ["registry GETs: layers", *(str(s.layer_gets) for s in stories)],
        ["registry GETs: other blobs", *(str(s.other_gets) for s in stories)],
        ["worker's VmRSS at the end", *(megabytes(s.memory["VmRSS"]) for s in stories)],
        ["worker's VmHWM", *(megabytes(s.memory["VmHWM"]) for s in stories)],
    ])


def print_ratio(samples: dict, layer_bytes: int) -> None:
    base = statistics.median(samples["curl"])
    print(f"\nOne layer, {layer_bytes / 1e6:.1f} MB decompressed, {RATIO_SAMPLES} samples in turns:\n")
    print_table([
        ["", "min", "median", "max", "ratio of medians"],
        *([label, *(milliseconds(f(samples[key])) for f in (min, statistics.median, max)), f"{statistics.median(samples[key]) / base:.2f}"]
          for key, label in [("curl", "curl | gzip -dc > file"), ("publish", "whole layer by a publish, cold worker"),
                             ("index", "clip-csi index build (with its start)"), ("first_byte", "first byte from a cold publish")]),
    ])


def bounds(stories: dict[str, Story], samples: dict) -> list[tuple[bool, str]]:
    first, again, second = stories["first"], stories["again"], stories["second"]
    n_layers = len(first.layers)
    answered = sum(again.hits.values())
    share = again.hits["disk"] / answered if answered else 0.0
    base = statistics.median(samples["curl"])
    publish = statistics.median(samples["publish"]) / base
    cold_first_byte = statistics.median(samples["first_byte"])
    out = [
        (first.decompressions_after_fifty == n_layers == first.decompressions,
         f"{FILES_READ} reads on A: {first.decompressions_after_fifty} decompressions, {first.decompressions} after all reads; {n_layers} layers"),
        (again.decompressions == 0, f"later on A: {again.decompressions} decompressions (0)"),
        (answered > 0 and share >= MIN_DISK_HITS, f"later on A: {share:.1%} of {answered} reads are disk hits (>= {MIN_DISK_HITS:.0%})"),
        (second.layer_gets == 0, f"worker B: {second.layer_gets} GETs of layers at the registry (0)"),
        (second.decompressions == 0, f"worker B: {second.decompressions} decompressions (0)"),
        (cold_first_byte <= MAX_FIRST_BYTE_SECONDS,
         f"first byte of a cold layer: {milliseconds(cold_first_byte)} from the publish (<= {milliseconds(MAX_FIRST_BYTE_SECONDS)})"),
        (publish <= MAX_RATIO, f"whole layer on disk, verified and indexed: {publish:.2f} x curl | gzip -dc (<= {MAX_RATIO})"),
    ]
    for story in (again, second):
        highwater = story.memory["VmHWM"]
        out.append((highwater < MAX_HIGHWATER_BYTES, f"worker {story.name[0]}: VmHWM {megabytes(highwater)} (< {megabytes(MAX_HIGHWATER_BYTES)})"))
    return out


def play(work: pathlib.Path) -> tuple[dict, dict]:
    image, one = images.get("demo5"), images.get("demo1")
    registry = services.Registry(work, work / "registry")
    running = [registry]
    try:
        redis = services.Redis(work)
        running.append(redis)
        reference, one_reference = image.push(registry.host), one.push(registry.host)
        say(f"registry at {registry.host} has {reference}; redis-server at {redis.url}")
        config = driver.write_config(work / "config.toml", plain_http=[registry.host], redis=redis, key_file=work / "hmac.key")
        alone = driver.write_config(work / "no-remote.toml", plain_http=[registry.host])

        stories = {}
        worker_a = driver.Worker(work / "a", config)
        running.append(worker_a)
        say("worker A, first access")
        stories["first"] = Story("A, first", worker_a, registry, image, reference)
        stories["first"].play("first")
        begin = time.perf_counter()
        process.wait_until(lambda: worker_a.metric("remote_uploads_total", outcome="ok") >= len(image.layer_digests()),
                           "the uploads to the remote cache", seconds=120)
        say(f"all layers are in the remote cache {time.perf_counter() - begin:.1f} s after the last read")
        stories["first"].finish()
        worker_a.must_unpublish("first")

        say("worker A, again")
        stories["again"] = Story("A, again", worker_a, registry, image, reference)
        stories["again"].play("again")
        stories["again"].finish()

        say("worker B, cold disk, warm remote")
        worker_b = driver.Worker(work / "b", config)
        running.append(worker_b)
        stories["second"] = Story("B, cold", worker_b, registry, image, reference)
        stories["second"].play("second")
        stories["second"].finish()

        for worker, volume in ((worker_a, "again"), (worker_b, "second")):
            worker.must_unpublish(volume)
            if worker.left_behind():
                raise Failed(f"left behind after the last unpublish: {worker.left_behind()}")
            running.remove(worker)
            worker.stop()
        say(f"one layer against curl | gzip -dc, {RATIO_SAMPLES} samples in turns")
        samples = measure_ratio(work, registry, alone, one, one_reference)
        return stories, samples
    except Failed:
        for it in running:
            if isinstance(it, driver.Worker):
                say(f"the last lines of worker {it.directory.name}'s log:\n{it.tail()}")
        raise
    finally:
        for it in reversed(running):
            it.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave logs and caches for a look")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("demo.py: run as root: mounting needs it")
    if not paths.binary().exists():
        sys.exit(f"demo.py: no {paths.binary()}: run `make demo`, which builds it, or name one in CLIP_CSI_BIN")
    try:
        with process.workspace("demo", keep=args.keep) as work:
            stories, samples = play(work)
    except Failed as error:
        sys.exit(f"demo.py: {error}")
    print_stories(list(stories.values()))
    print_ratio(samples, images.get("demo1").note()["layer_bytes"][0])
    print()
    verdicts = bounds(stories, samples)
    for held, text in verdicts:
        print(f"{'held  ' if held else 'MISSED'}  {text}")
    if args.json:
        plain = {name: {key: value for key, value in vars(story).items() if isinstance(value, (int, float, dict)) and key not in ("before", "digests")}
                 for name, story in stories.items()}
        pathlib.Path(args.json).write_text(json.dumps({"stories": plain, "samples": samples}, indent=1))
    missed = sum(not held for held, _ in verdicts)
    print(f"\n{len(verdicts) - missed} bounds held, {missed} missed; everything is taken down")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
