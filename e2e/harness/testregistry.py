"""The test registry (tools/testregistry): serves OCI layouts with ranges, counts by digest, and misbehaves as it is told."""

import contextlib
import dataclasses
import json
import pathlib
import urllib.request

import images

from . import driver, process


@dataclasses.dataclass
class Count:
    """What was asked for and sent: of one blob or manifest, or in all."""

    requests: dict = dataclasses.field(default_factory=dict)
    ranged: int = 0
    bytes_sent: int = 0
    faults: dict = dataclasses.field(default_factory=dict)

    @property
    def gets(self) -> int:
        return self.requests.get("GET", 0)


class TestRegistry:
    """Has the layouts that it is given, {repository: directory}; nothing can be pushed to it."""

    def __init__(self, work: pathlib.Path, layouts: dict[str, pathlib.Path], *, where=process.Here(), port: int | None = None, **settings):
        """On a free loopback port, or on a machine of the cluster."""
        self.where, self.port = where, port or process.free_port()
        self.host = f"{where.address}:{self.port}"
        words = [word for repository, directory in layouts.items() for word in ("--layout", f"{repository}={directory}")]
        log = work / f"testregistry-{self.port}.log"
        self.server = where.server(
            [driver.csictl().with_name("testregistry"), "--listen", self.host, "--settings", json.dumps(settings), *words], stdout=log)
        self.server.wait_ready(lambda: where.listens(self.port), "testregistry")

    def url(self, repository: str, kind: str, reference: str) -> str:
        return f"http://{self.host}/v2/{repository}/{kind}/{reference}"

    def set(self, **settings) -> None:
        """Replaces the delay, the rate, the users and the faults (tools/testregistry/settings.go has them); what is not named is off."""
        self._call("POST", "/__control", json.dumps(settings).encode())

    def reset(self) -> None:
        """Sets the counters to zero."""
        self._call("POST", "/__reset")

    def total(self) -> Count:
        return Count(**json.loads(self._call("GET", "/__counters"))["total"])

    def blob(self, digest: str) -> Count:
        counted = json.loads(self._call("GET", "/__counters"))["blobs"].get(digest)
        return Count(**counted) if counted else Count()

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(f"http://{self.host}{path}", data=body, method=method)
        # A machine of the cluster has a network of its own.
        with getattr(self.where, "network", contextlib.nullcontext)():
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
                return reply.read()

    def stop(self) -> None:
        self.server.stop()


def serving(work: pathlib.Path, chosen: list[images.Image]) -> TestRegistry:
    """A test registry that has these images as e2e/NAME."""
    return TestRegistry(work, {f"e2e/{it.name}": it.layout.directory for it in chosen})


def reference(registry: TestRegistry, image: images.Image) -> str:
    return f"{registry.host}/e2e/{image.name}:{images.TAG}"
