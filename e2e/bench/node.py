"""A node for one sample: started with a cache that the sample wants, killed after it."""

import contextlib
import pathlib
import shutil
import subprocess

from harness import driver, process

from . import measure, node_cache


@contextlib.contextmanager
def worker(directory: pathlib.Path, config: pathlib.Path, cache_dir: pathlib.Path | None = None, *, keep_cache=False):
    """A running node. It is gone after it, with its cache: what it still had to do counts for nobody."""
    node = driver.Worker(directory, config, cache_dir=cache_dir)
    try:
        yield node
    finally:
        process.unmount_below(directory)
        node.kill()
        for it in {directory} if keep_cache else {directory, node.cache_dir}:
            shutil.rmtree(it, ignore_errors=True)


@contextlib.contextmanager
def seeded(work: pathlib.Path, config: pathlib.Path, reference: str, diff_ids: list[str]):
    """The cache directory of a node that has had this image whole, and has ended in peace."""
    node = driver.Worker(work / "seed", config)
    try:
        node.must_publish("seed", reference)
        process.wait_until(lambda: all(node_cache.is_complete(node.cache_dir, it) for it in diff_ids), "the layers to be on disk", seconds=120)
        node.must_unpublish("seed")
    finally:
        node.stop()
    try:
        yield node.cache_dir
    finally:
        shutil.rmtree(work / "seed", ignore_errors=True)


def wait_for_layer(node: driver.Worker, diff_id: str) -> None:
    """Known to some ten milliseconds: who looks more often takes time from who is measured."""
    process.wait_until(lambda: node_cache.is_complete(node.cache_dir, diff_id), "the layer to be on disk", seconds=120, most_pause=0.01)


def understands(work: pathlib.Path, section: str, key: str, value) -> bool:
    """Whether the program knows a key of its configuration: older ones refuse what they do not know."""
    config = driver.write_config(work / "probe.toml", **{section: {key: value}})
    return driver.clip("cache", "ls", config=config, cache_dir=work / "probe", check=False).returncode == 0


def shell(command: str) -> measure.Sample:
    """A pipe of the shell, with the CPU time of all in it."""
    return measure.timed(lambda: subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], check=True, stderr=subprocess.DEVNULL))
