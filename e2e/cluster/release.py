"""The chart, installed by the real Helm as a user would, and what its pods say of themselves."""

import base64
import contextlib
import http.client
import json
import pathlib
import secrets
import shutil
import tempfile
import time

from harness import driver, oci, paths, process, services

from . import project_image
from .cluster import ADDRESS, NODES, PRIVATE_REGISTRY, REGISTRY, Cluster, condition
from .pods import DRIVER, SHELL

CHART = paths.REPO / "deploy/helm/clip-csi"
NAME = NAMESPACE = "clip-csi"
REMOTE_SECRET = "clip-csi-remote"
METRICS_PORT = 9808
REPOSITORY = "clip-csi/clip-csi"
# The driver's DaemonSets; the containers of the pods of each; where the roles of a node meet.
NODE, FUSE = "node", "fuse"
CONTAINERS = {NODE: ["node", "agent", "node-driver-registrar", "livenessprobe"], FUSE: ["serve"]}
RUN_DIR = f"/run/clip-csi/{DRIVER}"
# What the pods run.
PROGRAMS = {"clip-csi", "csi-node-driver-registrar", "csi-provisioner", "livenessprobe"}
# For the upgrade: the same program in another image, as a new version is.
NEXT_TAG = "next"


def secret(name: str, namespace: str, **data: str) -> dict:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace},
            "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}}


def values() -> dict:
    """What differs from the defaults here: where images come from, the remote cache, and that nobody waits a minute for an unused mount to go."""
    shell, _, tag = SHELL.removeprefix(f"{REGISTRY}/").partition(":")
    local = {"image": {"registry": REGISTRY}}
    return {
        "image": {"registry": REGISTRY},
        "sidecars": {"nodeDriverRegistrar": local, "livenessProbe": local, "provisioner": local},
        # Whatever is replaced under readers is the server, unless a test is about mounts that need none.
        "node": {"idleSourceSeconds": 2, "kernelMounts": "never"},
        "registries": {"hosts": {REGISTRY: {"plainHttp": True}, PRIVATE_REGISTRY: {"plainHttp": True}}},
        "remote": {"kind": "redis", "url": f"redis://{ADDRESS}:6379/0", "existingSecret": {"name": REMOTE_SECRET}},
        "test": {"image": {"registry": REGISTRY, "repository": shell, "tag": tag}},
    }


def merged(base: dict, over: dict) -> dict:
    return {**base, **{key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value for key, value in over.items()}}


def next_version(layout: oci.Layout, directory: pathlib.Path) -> oci.Layout:
    """A copy of the project's image whose label says another version: other digests, the same layers."""
    shutil.copytree(layout.directory, directory)
    copy = oci.Layout(directory)
    manifest = copy.manifest(project_image.TAG)
    config = copy.read_json(manifest["config"]["digest"])
    config["config"]["Labels"]["org.opencontainers.image.version"] = NEXT_TAG
    manifest["config"] = copy.add(json.dumps(config).encode(), oci.CONFIG)
    copy.tag(project_image.TAG, copy.add(json.dumps(manifest).encode(), oci.MANIFEST))
    return copy


class Release:
    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.installed = False
        self.changed = False
        layout = project_image.layout()
        with cluster.plane.machine.network():
            oci.push(layout, project_image.TAG, REGISTRY, REPOSITORY, project_image.version())
            oci.push(next_version(layout, cluster.work / "next-image"), project_image.TAG, REGISTRY, REPOSITORY, NEXT_TAG)
        cluster.kubectl("create", "namespace", NAMESPACE)
        cluster.apply(secret(REMOTE_SECRET, NAMESPACE, **{"hmac-key": secrets.token_hex(32)}))

    def helm(self, verb: str, over: dict | None = None, *words, check=True):
        """install, upgrade or template, with `over` beside the values above."""
        with tempfile.NamedTemporaryFile("w", suffix=".json", dir=self.cluster.work) as file:
            json.dump(merged(values(), over or {}), file)
            file.flush()
            return self.cluster.helm(verb, NAME, CHART, "--namespace", NAMESPACE, "--values", file.name, *words, check=check)

    def install(self, over: dict | None = None) -> None:
        """As the README says, until the pods are ready."""
        # Also when it fails: then it is there, and no good to the next case.
        self.installed = self.changed = True
        try:
            self.helm("install", over, "--wait", "--timeout", "120s")
        except process.Failed as error:
            raise process.Failed(f"{error}\n{self.describe()}") from error
        self.changed = bool(over)

    def upgrade(self, over: dict | None = None) -> None:
        """As OPERATIONS.md says: until all pods are those of the new release, and ready."""
        self.changed = True
        try:
            self.helm("upgrade", over, "--wait", "--timeout", "180s")
        except process.Failed as error:
            raise process.Failed(f"{error}\n{self.describe()}") from error

    def uninstall(self) -> None:
        self.cluster.helm("uninstall", NAME, "--namespace", NAMESPACE, "--wait", "--timeout", "120s")
        process.wait_until(lambda: not self.all_pods(), "the driver's pods to end", 60)
        self.installed = False

    def ensure(self) -> None:
        """Installed with the plain values: what most cases want."""
        if self.installed and self.changed:
            self.uninstall()
        if not self.installed:
            self.install()

    def empty(self, *nodes: str) -> None:
        """Nothing is left in the caches of these nodes, as an operator does it; what pods have mounted until now is let go first."""
        for node in nodes:
            process.wait_until(lambda node=node: time.sleep(0.3) or driver.metric(self.metrics(node), "mounts") == 0, f"the mounts of {node} to go", 30)
            self.exec(node, "/usr/local/bin/clip-csi", "cache", "rm", "--all", "--config", "/etc/clip-csi/config.toml")

    def empty_all(self) -> None:
        """Nothing is in any cache, on the nodes or in Redis."""
        self.empty(*NODES)
        self.cluster.redis.command("FLUSHALL")

    def all_pods(self, component: str | None = None) -> list[dict]:
        which = f"app.kubernetes.io/component={component}" if component else f"app.kubernetes.io/component in ({NODE}, {FUSE})"
        return self.cluster.get(f"api/v1/namespaces/{NAMESPACE}/pods", labelSelector=which)["items"]

    def pods(self, component: str = NODE) -> dict[str, dict]:
        """The pods of a DaemonSet by node; one that is ending only if there is no other."""
        ordered = sorted(self.all_pods(component), key=lambda it: "deletionTimestamp" not in it["metadata"])
        return {it["spec"]["nodeName"]: it for it in ordered if it["spec"].get("nodeName")}

    def delete_pod(self, node: str, component: str) -> None:
        """Deletes the pod of a DaemonSet on a node, and waits until another one is ready in its place."""
        old = self.pods(component)[node]["metadata"]["name"]
        self.cluster.delete_pods(old, namespace=NAMESPACE)
        def new():
            time.sleep(0.3)
            it = self.pods(component).get(node)
            return it and it["metadata"]["name"] != old and condition(it, "Ready")
        try:
            process.wait_until(new, f"the new {component} pod of {node} to be ready", 120)
        except process.Failed as error:
            raise process.Failed(f"{error}\n{self.describe()}") from error

    def processes(self, node: str, role: str) -> list[int]:
        """The processes of a role on a node, as pids of the host, oldest first; those that kubelet runs as probes are not among them."""
        # `clip-csi serve` becomes clip-csi-serve, and so does `clip-csi node`.
        commands = ([f"clip-csi-{role}"], ["clip-csi", role])
        component = next(it for it, names in CONTAINERS.items() if role in names)
        statuses = self.pods(component)[node]["status"]["containerStatuses"]
        container = next(it for it in statuses if it["name"] == role)["containerID"].rpartition("/")[2]
        found = []
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = [it.rpartition("/")[2] for it in (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")]
                if container in (entry / "cgroup").read_text() and any(words[:len(it)] == it for it in commands):
                    found.append(int(entry.name))
        return sorted(found)

    def exec(self, node: str, *command) -> str:
        """A command of the agent's container."""
        return self.cluster.kubectl("exec", self.pods()[node]["metadata"]["name"], "--namespace", NAMESPACE, "--container", "agent", "--", *command).stdout

    def describe(self) -> str:
        return self.cluster.kubectl("describe", "pods", "--namespace", NAMESPACE, check=False).stdout + "".join(self.logs(node) for node in NODES)

    def logs(self, node: str, lines: int = 20) -> str:
        """The last lines of every container of the driver on the node."""
        names = [it["metadata"]["name"] for it in self.all_pods() if it["spec"].get("nodeName") == node]
        return "".join(self.cluster.kubectl("logs", name, "--namespace", NAMESPACE, "--all-containers", "--prefix", f"--tail={lines}", check=False).stdout for name in names)

    def registered(self, node: str) -> bool:
        return any(it["name"] == DRIVER for it in self.cluster.get(f"apis/storage.k8s.io/v1/csinodes/{node}")["spec"].get("drivers") or [])

    def page(self, node: str, path: str = "/metrics") -> str:
        address = self.pods()[node]["status"]["podIP"]
        with self.cluster.plane.machine.network():
            connection = http.client.HTTPConnection(address, METRICS_PORT, timeout=10)
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def metrics(self, node: str) -> dict[str, float]:
        return services.parse_metrics(self.page(node))

    def left_on_nodes(self) -> list[str]:
        """Mounts, directories, sockets and processes of the driver on the nodes."""
        found = []
        for name in NODES:
            node = self.cluster.nodes[name]
            found += [f"{name}: mount {it}" for it in node.machine.mounts() if DRIVER in it or "kubernetes.io~csi" in it]
            found += [f"{name}: process {it}" for it in node.machine.processes().values() if it.split(" ")[0].rpartition("/")[2] in PROGRAMS]
            found += [f"{name}: {it.relative_to(node.work)}" for pattern in (f"kubelet/plugins/{DRIVER}", "kubelet/plugins_registry/*", "kubelet/pods/*/volumes/kubernetes.io~csi")
                      for it in node.work.glob(pattern)]
        return found
