"""1,000 nodes, 200 images, 5,000 layers: what pre-warming asks of the Kubernetes API, and of the controller.

etcd, kube-apiserver, registry, Redis and the controller are real. The nodes are agents' own code in one process, each with a
connection, a token and a Node object of its own; only that a disk is filled is modelled: an image takes a while
(benches/prewarm_agents.rs). All of them have the same two cores here, so the times are the longest that anybody will see.
"""

import collections
import concurrent.futures
import http.client
import itertools
import json
import pathlib
import re
import ssl
import subprocess
import threading
import time

import images
from e2e_prewarm_agents import CACHES, NAMESPACE, PREWARMS, TEAM, rendered
from harness import driver, oci, paths, process, services, testregistry
from harness.api_server import AUDIENCE, ApiServer
from harness.process import say
from harness.rawtar import Tar

from . import measure

IMAGES = ()
N_NODES, N_JOINING = 1000, 100
N_OBJECTS, IMAGES_OF_AN_OBJECT, LAYERS_OF_AN_IMAGE = 20, 10, 25
REPOSITORY = "fleet"
# What a node takes for an image: so short that the API is what counts.
FILL_MILLISECONDS = 500
# How often the counters are read: reading them costs the API server something.
SAMPLE_SECONDS = 5
CLIENTS = 4
PATIENCE_SECONDS = 1200
MEGABYTE, KIBIBYTE = 1e6, 1024

MOST_CONTROLLER_MB = 64
# A read, and what it writes when it is told of it, begins and ends.
MOST_CALLS_OF_A_NODE_FOR_AN_OBJECT = 4
# What a control plane of a few cores bears beside all else: calls, and changes that watches are told of.
MOST_CALLS_PER_SECOND, MOST_MESSAGES_PER_SECOND = 500, 5000
# etcd takes 1.5 MiB.
MOST_OBJECT_KIBIBYTES = 256
MOST_SECONDS = 600

SERIES = re.compile(r'^(apiserver_request_total|apiserver_watch_events_total)\{([^}]*)\} (\S+)', re.M)
LABEL = re.compile(r'(\w+)="([^"]*)"')
OURS = ("imageprewarms", "imagerollouts", "nodeimagecaches", "events", "leases")


def layer(number: int) -> tuple[bytes, str]:
    """A blob of a few hundred bytes, and its DiffId."""
    tar = Tar()
    tar.file(f"layer-{number}", f"layer {number}\n" * 100)
    data = tar.bytes()
    return oci.gzipped(data, 1), oci.digest_of(data)


def make_images(directory: pathlib.Path, n_images: int) -> oci.Layout:
    """`n_images` of LAYERS_OF_AN_IMAGE layers each that no other has, tagged i000, i001 …, and one more, `next`."""
    layout, numbers = oci.Layout(directory), itertools.count()
    tags = [*(f"i{number:03}" for number in range(n_images)), "next"]
    for tag in tags:
        layers = [layer(next(numbers)) for _ in range(LAYERS_OF_AN_IMAGE)]
        layout.add_image(tag, [(layout.add(blob, oci.LAYER_GZIP), diff_id) for blob, diff_id in layers])
    return layout


class Api(ApiServer):
    """With connections that stay, because thousands of objects are made."""

    local = threading.local()

    def request(self, method, path, body=None, kind="application/json", token=None):
        if token is not None:
            return super().request(method, path, body, kind, token)
        connections = self.local.__dict__.setdefault("connections", {})
        if self.port not in connections:
            connections[self.port] = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=120, context=self.tls)
        connection = connections[self.port]
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": kind, "Accept": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException, ssl.SSLError):
            connections.pop(self.port).close()
            raise
        return answer.status, json.loads(text) if text.startswith("{") else text

    def join(self, name: str) -> str:
        """A node that is ready, and the token that its agent would get."""
        ready = {"type": "Ready", "status": "True", "reason": "bench", "message": ""}
        node = self.do("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"conditions": [ready]}})
        # That of a new node, which nobody here takes away.
        self.do("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": None}}, "application/merge-patch+json")
        bound = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node["metadata"]["uid"]}
        spec = {"audiences": [AUDIENCE], "expirationSeconds": 7200, "boundObjectRef": bound}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return self.do("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/clip-csi-node/token", body)["status"]["token"]

    def counted(self) -> tuple[collections.Counter, float]:
        """Calls so far about what is the driver's, by verb and resource, and messages of watches."""
        calls, messages = collections.Counter(), 0.0
        for name, labels, value in SERIES.findall(self.request("GET", "/metrics")[1]):
            found = dict(LABEL.findall(labels))
            if name == "apiserver_watch_events_total":
                kind = found.get("resource") or found.get("kind", "")
                messages += float(value) if "clip-csi" in found.get("group", "") or kind.lower() in OURS else 0
            elif found["resource"] in OURS or (found["resource"], found["verb"]) == ("nodes", "GET"):
                what = found["resource"] + (f"/{found['subresource']}" if found["subresource"] else "")
                calls[f"{found['verb']} {what}"] += float(value)
        return calls, messages


class Fleet:
    """The simulated nodes, and what is real."""

    def __init__(self, work: pathlib.Path, n_nodes: int, n_images: int):
        self.work, self.ends, self.n_nodes = work, [], 0
        begin = time.monotonic()
        self.layout = make_images(work / "layout", n_images)
        say(f"{n_images} images of {LAYERS_OF_AN_IMAGE} layers made in {time.monotonic() - begin:.0f} s")
        try:
            self._start(n_nodes)
        except BaseException:
            self.end()
            raise

    def _start(self, n_nodes: int) -> None:
        self.registry = testregistry.TestRegistry(self.work, {REPOSITORY: self.layout.directory})
        self.ends.append(self.registry.stop)
        self.redis = services.Redis(self.work)
        self.ends.append(self.redis.stop)
        self.api = Api(self.work)
        self.ends.append(self.api.stop)
        for namespace in (NAMESPACE, TEAM):
            self.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        self.api.apply(*rendered(discovery=False))
        self.agents = subprocess.Popen(
            [measure.program("prewarm_agents"), self.api.pki.server, self.api.pki.file("ca.crt"), str(FILL_MILLISECONDS)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=open(self.work / "agents.log", "wb"), text=True)
        self.ends.append(lambda: (self.agents.kill(), self.agents.wait()))
        config = driver.write_config(self.work / "config.toml", plain_http=[self.registry.host], redis=self.redis, key_file=self.work / "key", prewarm={"parallel_images": 4})
        kubeconfig = self.api.kubeconfig_of("prewarm", self.api.token(NAMESPACE, "clip-csi-prewarm"))
        self.port = process.free_port()
        self.controller = process.Server(
            [paths.binary(), "prewarm-controller", "--lease-namespace", NAMESPACE, "--identity", "c1", "--config", config, "--cache-dir", self.work / "cache",
             "--kubeconfig", kubeconfig, "--metrics-addr", f"127.0.0.1:{self.port}"], stdout=self.work / "controller.log")
        self.ends.append(self.controller.kill)
        begin = time.monotonic()
        self.join(n_nodes)
        process.wait_until(lambda: time.sleep(1) or self.n_caches() == n_nodes, "all nodes to tell of themselves", PATIENCE_SECONDS)
        say(f"{n_nodes} nodes are there after {time.monotonic() - begin:.0f} s")

    def end(self) -> None:
        while self.ends:
            self.ends.pop()()

    def join(self, n_nodes: int) -> None:
        names = [f"node-{number:05}" for number in range(self.n_nodes, self.n_nodes + n_nodes)]
        self.n_nodes += n_nodes
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            for name, token in zip(names, pool.map(self.api.join, names)):
                self.agents.stdin.write(f"{name} {token}\n")
                self.agents.stdin.flush()

    def n_caches(self) -> int:
        found = self.api.get(f"{CACHES}?limit=1")
        return len(found["items"]) + found["metadata"].get("remainingItemCount", 0)

    def metric(self, name: str, **labels: str) -> float:
        if not self.controller.alive() or self.agents.poll() is not None:
            logs = [driver.last_lines(self.work / name, 20) for name in ("controller.log", "agents.log")]
            raise process.Failed("the controller or the agents have ended:\n" + "\n".join(logs))
        return driver.metric(services.metrics(self.port), name, **labels)

    def prewarm(self, name: str, tags: list[str], **spec) -> None:
        references = [{"image": f"{self.registry.host}/{REPOSITORY}:{tag}"} for tag in tags]
        self.api.do("POST", PREWARMS, {"apiVersion": "clip-csi.dev/v1alpha1", "kind": "ImagePrewarm", "metadata": {"name": name}, "spec": {"images": references, **spec}})

    def is_ready(self, n_objects: int) -> bool:
        """Every object is ready on every node there is, as the controller says."""
        return self.metric("prewarm_objects", phase="Ready") == n_objects and self.metric("prewarm_nodes", warmup="ready") == n_objects * self.n_nodes

    def sizes(self, path: str) -> list[int]:
        """Bytes of each object, as etcd has it: the JSON of a custom resource."""
        return [len(json.dumps(it, separators=(",", ":"))) for it in self.api.get(path)["items"]]


class Phase:
    """What the API server was asked between two moments."""

    def __init__(self, fleet: Fleet, name: str, act, done):
        self.fleet, self.name = fleet, name
        pids = {"controller": fleet.controller.pid, "API server": fleet.api.server.pid, "agents": fleet.agents.pid}
        cpu = {who: measure.cpu_of(pid) for who, pid in pids.items()}
        before, messages = fleet.api.counted()
        begin = last = time.monotonic()
        act()
        self.peak, self.most_messages, seen, seen_messages = 0.0, 0.0, sum(before.values()), messages
        deadline = begin + PATIENCE_SECONDS
        while True:
            is_done = done()
            now = time.monotonic()
            if is_done or now - last >= SAMPLE_SECONDS:
                calls, total = fleet.api.counted()
                # One of a moment is no rate.
                if now - last >= SAMPLE_SECONDS / 2:
                    self.peak = max(self.peak, (sum(calls.values()) - seen) / (now - last))
                    self.most_messages = max(self.most_messages, (total - seen_messages) / (now - last))
                last, seen, seen_messages = now, sum(calls.values()), total
            if is_done:
                break
            if now > deadline:
                raise process.Failed(f"{name}: not done after {PATIENCE_SECONDS} s: {fleet.metric('prewarm_nodes', warmup='ready'):.0f} nodes are warm")
            time.sleep(0.25)
        self.seconds, self.calls, self.messages = now - begin, calls - before, total - messages
        self.cpu = {who: measure.cpu_of(pid) - cpu[who] for who, pid in pids.items()}

    @property
    def n_calls(self) -> float:
        return sum(self.calls.values())

    def row(self) -> list[str]:
        return [self.name, f"{self.seconds:.0f} s", f"{self.n_calls:,.0f}", f"{self.n_calls / self.seconds:.0f}", f"{self.peak:.0f}", f"{self.messages / self.seconds:,.0f}",
                f"{self.most_messages:,.0f}", *(f"{seconds:.1f} s" for seconds in self.cpu.values())]


def show(phases: list[Phase]) -> None:
    measure.table("phase", ["time", "calls", "calls/s", "at most", "messages/s", "at most", *(f"CPU of {who}" for who in phases[0].cpu)], [it.row() for it in phases])
    verbs = sorted(set().union(*(it.calls for it in phases)))
    measure.table("calls", [it.name for it in phases], [[verb, *(f"{it.calls[verb]:,.0f}" for it in phases)] for verb in verbs])


def run(work: pathlib.Path, verdicts: measure.Verdicts) -> None:
    fleet = Fleet(work, N_NODES, N_OBJECTS * IMAGES_OF_AN_OBJECT)
    try:
        measured(fleet, verdicts)
    finally:
        fleet.end()


def measured(fleet: Fleet, verdicts: measure.Verdicts) -> None:
    n_images, tags = N_OBJECTS * IMAGES_OF_AN_OBJECT, iter(range(N_OBJECTS * IMAGES_OF_AN_OBJECT))
    seeded: list[float] = []

    def create() -> None:
        seeded.append(time.monotonic())
        for number in range(N_OBJECTS):
            fleet.prewarm(f"images-{number:02}", [f"i{tag:03}" for tag in itertools.islice(tags, IMAGES_OF_AN_OBJECT)])

    def all_ready() -> bool:
        if len(seeded) == 1 and fleet.metric("prewarm_seed_attempts_total", outcome="ok") >= n_images:
            seeded.append(time.monotonic())
        return fleet.is_ready(N_OBJECTS)

    def move() -> None:
        fleet.layout.tag("i000", fleet.layout.find("next"))
        # Any other spec has the tags looked up at once, as an interval has after a while.
        fleet.api.do("PATCH", f"{PREWARMS}/images-00", {"spec": {"refreshIntervalSeconds": 3600}}, "application/merge-patch+json")
        process.wait_until(lambda: fleet.metric("prewarm_nodes", warmup="ready") < N_OBJECTS * fleet.n_nodes, "the controller to see it", 60)

    first = Phase(fleet, f"{N_OBJECTS} objects, {n_images} images", create, all_ready)
    joined = Phase(fleet, f"{N_JOINING} nodes join", lambda: fleet.join(N_JOINING), lambda: fleet.is_ready(N_OBJECTS))
    moved = Phase(fleet, "a tag moves", move, lambda: fleet.is_ready(N_OBJECTS))
    show([first, joined, moved])

    say(f"the {n_images * LAYERS_OF_AN_IMAGE:,} layers were in the remote after {seeded[1] - seeded[0]:.0f} s")
    memory = driver.memory_of(fleet.controller.pid)
    say(f"VmHWM: controller {memory['VmHWM'] / MEGABYTE:.1f} MB (now {memory['VmRSS'] / MEGABYTE:.1f}), API server {driver.memory_of(fleet.api.server.pid)['VmHWM'] / MEGABYTE:.0f} MB, "
        f"{fleet.n_nodes:,} agents {driver.memory_of(fleet.agents.pid)['VmHWM'] / MEGABYTE:.0f} MB")
    verdicts.at_most("controller, VmHWM", memory["VmHWM"] / MEGABYTE, MOST_CONTROLLER_MB, " MB")
    verdicts.at_most(f"{N_NODES:,} nodes and {n_images} images, until all is ready", first.seconds, MOST_SECONDS, " s")
    of_nodes = sum(number for what, number in first.calls.items() if what in ("GET imageprewarms", "APPLY nodeimagecaches", "APPLY nodeimagecaches/status"))
    verdicts.at_most("calls of a node for an object", of_nodes / N_NODES / N_OBJECTS, MOST_CALLS_OF_A_NODE_FOR_AN_OBJECT)
    for phase in (first, joined, moved):
        verdicts.at_most(f"{phase.name}: calls, mean", phase.n_calls / phase.seconds, MOST_CALLS_PER_SECOND, "/s")
        verdicts.at_most(f"{phase.name}: messages of watches, mean", phase.messages / phase.seconds, MOST_MESSAGES_PER_SECOND, "/s")
    for path in (PREWARMS, CACHES):
        verdicts.at_most(f"{path.rpartition('/')[2]}, the largest", max(fleet.sizes(path)) / KIBIBYTE, MOST_OBJECT_KIBIBYTES, " KiB")
