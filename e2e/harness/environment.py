"""What all end-to-end tests share: one registry, one cluster, the images, and a test case that cleans up."""

import functools
import os
import pathlib
import random
import subprocess
import tempfile
import unittest

import compare
import images
import tree
from cluster.cluster import Cluster
from cluster.release import Release

from . import driver, paths, process, reading, services
from .api_server import ApiServer
from .trio import Trio

# Set by run.py for the time of the run.
shared: "Environment | None" = None


class Environment:
    """One registry for all tests; images are pushed, and the cluster is put up, when a test first wants them."""

    def __init__(self, work: pathlib.Path):
        self.work = work
        self.pushed: dict[str, str] = {}
        self.plans: dict[str, pathlib.Path] = {}
        self._binary: pathlib.Path | None = None
        self._api: ApiServer | None = None
        self._cluster: Cluster | None = None
        self._release: Release | None = None

    def __enter__(self):
        self.registry = services.Registry(self.work, self.work / "registry")
        return self

    def __exit__(self, *_):
        self.registry.stop()
        self.take_down_cluster()

    def api_server(self) -> ApiServer:
        """A Kubernetes API without a cluster; whoever uses it clears it afterwards."""
        if self._api is None:
            self._api = ApiServer(self.work)
        return self._api

    def cluster(self) -> Cluster:
        if self._cluster is None:
            self._cluster = Cluster(self.work / "cluster").__enter__()
        return self._cluster

    def release(self) -> Release:
        """The chart on the cluster; `ensure` installs it."""
        if self._release is None:
            self._release = Release(self.cluster())
        return self._release

    def take_down_cluster(self) -> list[str]:
        """And the API server alone. What is left of the cluster afterwards: nothing."""
        api, self._api = self._api, None
        if api:
            api.stop()
        cluster, self._cluster = self._cluster, None
        if cluster is None:
            return []
        cluster.__exit__()
        return cluster.left()

    def push(self, name: str) -> str:
        if name not in self.pushed:
            self.pushed[name] = images.get(name).push(self.registry.host)
        return self.pushed[name]

    def binary(self) -> pathlib.Path:
        """The program under test where every user may run it."""
        if self._binary is None:
            self._binary = paths.install(self.work / "bin")
        return self._binary

    def plan(self, name: str) -> pathlib.Path:
        """For readers: what the image must show."""
        if name not in self.plans:
            self.plans[name] = reading.plan(self.work, name)
        return self.plans[name]


@functools.cache
def truth_of(manifest: pathlib.Path) -> dict[str, dict[str, str]]:
    return tree.parse(manifest.read_text(encoding="ascii"))


def children_left() -> list[str]:
    """Processes that run the program under test from this run's work directory."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if shared and f"{shared.work}/" in command and not command.startswith("docker-registry"):
            found.append(f"process {entry.parent.name}: {command.strip()}")
    return found


class Case(unittest.TestCase):
    """A test with a directory of its own; what it starts and mounts is gone after it."""

    maxDiff = None

    def setUp(self):
        self.env = shared
        self.registry = shared.registry
        # Short, because a socket's path must be.
        self.work = pathlib.Path(tempfile.mkdtemp(prefix="t", dir=shared.work))
        self.addCleanup(subprocess.run, ["rm", "-rf", "--one-file-system", self.work], check=False)
        self.addCleanup(process.unmount_below, self.work)
        self.seed = int(os.environ.get("CLIP_E2E_SEED") or random.randrange(2**32))
        self.dice = random.Random(self.seed)

    def config(self, name="config.toml", **settings) -> pathlib.Path:
        settings.setdefault("plain_http", [self.registry.host])
        return driver.write_config(self.work / name, **settings)

    def redis(self, **settings) -> services.Redis:
        redis = services.Redis(self.work, **settings)
        self.addCleanup(redis.stop)
        return redis

    def s3(self) -> services.S3:
        s3 = services.S3(self.work)
        self.addCleanup(s3.stop)
        return s3

    def worker(self, name="a", config: pathlib.Path | None = None, **settings) -> driver.Worker:
        worker = driver.Worker(self.work / name, config or self.config(), **settings)
        self.addCleanup(worker.stop)
        self.addCleanup(self.show_log, worker)
        return worker

    def trio(self, name="a", config: pathlib.Path | None = None, **settings) -> Trio:
        """The three roles. What of the test's own files they read (a key) must be theirs."""
        for it in self.work.glob("*key*"):
            os.chown(it, process.UNPRIVILEGED, process.UNPRIVILEGED)
        trio = Trio(self.work / name, config or self.config(), self.env.binary(), **settings)
        # Killed and not asked to end, so that nothing waits on a mount that a failed test left without a server.
        self.addCleanup(trio.end)
        self.addCleanup(self.show_log, trio)
        return trio

    def show_log(self, worker: driver.Driver) -> None:
        """After a failure, what the worker had to say."""
        outcome = self._outcome.result
        if any(getattr(it, "test_case", it) is self for it, _ in [*outcome.failures, *outcome.errors]):
            print(f"--- seed {self.seed}; the logs' end in {worker.directory}:\n{worker.tail(25)}\n---", flush=True)

    def mountpoint(self, name="mnt") -> pathlib.Path:
        path = self.work / name
        path.mkdir(exist_ok=True)
        return path

    def mount(self, reference: str, name="mnt", *words, config=None, cache_dir=None) -> pathlib.Path:
        """`clip-csi mount`, unmounted at the test's end."""
        directory = self.mountpoint(name)
        driver.clip("mount", reference, directory, *words, config=config or self.config(), cache_dir=cache_dir or self.work / "cache")
        self.addCleanup(self.unmount, directory)
        self.assertIn(str(directory), process.mounts_below(directory), "mount returned, but nothing is mounted")
        return directory

    def unmount(self, directory: pathlib.Path) -> None:
        if process.mounts_below(directory):
            driver.clip("unmount", directory)
            self.assertEqual(process.mounts_below(directory), [], "still mounted after unmount")

    def assert_tree(self, name: str, directory) -> None:
        """The directory shows the image, byte for byte and attribute for attribute."""
        image = images.get(name)
        found = compare.differences(truth_of(image.truth()), tree.manifest(str(directory)), image.dirs_without_time())
        if found:
            self.fail(f"{name}: {len(found)} differences from the truth:\n" + "\n".join(found[:compare.MAX_PRINTED]))

    def layer_gets(self, name: str, mark: int) -> list[int]:
        """How often each layer's blob was fetched since the mark."""
        gets = self.registry.blob_gets(mark)
        return [gets[digest] for digest in images.get(name).layer_digests()]
