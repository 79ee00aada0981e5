"""Brings the cluster up, speaks to it with kubectl, and takes it down without a trace.

A machine `cp` with the control plane, a registry and a Redis; two nodes `n1` and `n2`, and more for as long
as a test has them join. All is below one scratch directory and in namespaces of its own; the host's network, mounts and /var/lib stay as they are.
"""

import contextlib
import json
import pathlib
import shutil
import subprocess
import time
import urllib.parse

import images
from harness import kube_objects, oci, process, services
from harness.process import say

from . import cgroups, containers, leftovers
from .control_plane import ADDRESS, ControlPlane
from .machine import NO_PROXY, are_ended
from .node import Node

REGISTRY = f"{ADDRESS}:5000"
PRIVATE_REGISTRY = f"{ADDRESS}:5001"
NODES = ["n1", "n2"]
# How long a state of the cluster may take on a loaded two-core machine.
PATIENCE_SECONDS = 120


class Cluster:
    def __init__(self, work: pathlib.Path):
        self.work = work
        if pathlib.Path("/var/lib") in work.resolve().parents:
            raise process.Failed(f"{work} is below /var/lib, which the nodes have for themselves: name another place in CLIP_E2E_CACHE")

    def __enter__(self):
        begin = time.monotonic()
        self.tools = containers.tools()
        self.work.mkdir()
        cgroups.remove_of_dead_runs()
        self.before = leftovers.Host()
        self.nodes: dict[str, Node] = {}
        # Of the machines that have gone, too: nothing may be left in them.
        self.namespaces: set[str] = set()
        self.plane = None
        try:
            self._up()
        except BaseException:
            self.show_logs()
            self._down()
            raise
        say(f"cluster of {len(self.nodes)} nodes up in {time.monotonic() - begin:.1f} s")
        return self

    def _up(self) -> None:
        self.plane = ControlPlane(self.work, self.tools)
        # All that can be done while the API server starts.
        self.plane.start()
        machine = self.plane.machine
        self.registry = services.Registry(self.work, self.work / "registry", where=machine, port=5000)
        self.redis = services.Redis(self.work, where=machine, port=6379)
        with machine.network():
            containers.push(REGISTRY, self.work)
        for name in NODES:
            self._add(name)
        self.plane.wait()
        for node in self.nodes.values():
            node.start_kubelet()
        process.wait_until(self._nodes_ready, "both nodes to be ready", PATIENCE_SECONDS)
        process.wait_until(lambda: self._exists("api/v1/namespaces/default/serviceaccounts", "default"), "the ServiceAccount that pods need", PATIENCE_SECONDS)

    def _add(self, name: str) -> Node:
        self.nodes[name] = Node(int(name.removeprefix("n")), self.plane, self.work, f"{REGISTRY}/pause:1", [REGISTRY, PRIVATE_REGISTRY])
        self.namespaces |= self.nodes[name].machine.namespaces
        return self.nodes[name]

    def _nodes_ready(self) -> bool:
        time.sleep(0.2)
        nodes = self.get("api/v1/nodes")["items"]
        return len(nodes) == len(self.nodes) and all(condition(node, "Ready") for node in nodes)

    def join(self, name: str, cache_bytes: int | None = None) -> None:
        """One more node, "n3", ready for pods; with a disk of `cache_bytes` for the driver's cache. Whoever has it join has it leave."""
        node = self._add(name)
        if cache_bytes is not None:
            node.mount_cache(cache_bytes)
        node.start_kubelet()
        process.wait_until(self._nodes_ready, f"{name} to be ready", PATIENCE_SECONDS)

    def leave(self, name: str) -> None:
        """Takes a node away as a cloud does: first the machine ends, then the object is deleted. Nothing of it stays."""
        node = self.nodes.pop(name)
        node.leave()
        self.kubectl("delete", "node", name, "--ignore-not-found")
        # Nobody is there to say that they have ended.
        self.kubectl("delete", "pods", "--all-namespaces", "--field-selector", f"spec.nodeName={name}", "--force", "--grace-period=0")
        shutil.rmtree(node.work)

    def __exit__(self, *_):
        self._down()

    def _down(self) -> None:
        """Ends everything; `left` tells whether it worked."""
        machines = [node.machine for node in self.nodes.values()] + ([self.plane.machine] if self.plane else [])
        self.namespaces |= set().union(*(machine.namespaces for machine in machines))
        stops = [node.stop for node in self.nodes.values()] + ([self.plane.stop] if self.plane else [])
        with contextlib.ExitStack() as stack:
            # All of them, also when one fails.
            for stop in reversed(stops):
                stack.callback(stop)
        # Whoever slipped through all of them.
        with contextlib.suppress(process.Failed):
            process.wait_until(lambda: are_ended(self.namespaces), "the processes of the cluster to end")

    def left(self) -> list[str]:
        """What there still is of the cluster after it was taken down."""
        return leftovers.of(self.work, self.namespaces, self.before)

    def show_logs(self) -> None:
        """After a failure, what each server had to say last."""
        for log in sorted((self.work / "log").glob("*")):
            lines = log.read_text(errors="backslashreplace").splitlines()[-8:]
            print(f"--- end of {log.name}:", *lines, sep="\n", flush=True)

    # --- speaking to it ---

    def kubectl(self, *words, check=True, timeout=300, stdin: str | None = None) -> subprocess.CompletedProcess:
        command = [self.tools / "kubectl", "--kubeconfig", self.plane.kubeconfig, *words]
        return self._client(command, check, timeout, stdin)

    def helm(self, *words, check=True, timeout=600) -> subprocess.CompletedProcess:
        home = self.work / "helm"
        env = {"HELM_CACHE_HOME": str(home), "HELM_CONFIG_HOME": str(home), "HELM_DATA_HOME": str(home)}
        return self._client([self.tools / "helm", "--kubeconfig", self.plane.kubeconfig, *words], check, timeout, None, env)

    def _client(self, command, check, timeout, stdin, env=None) -> subprocess.CompletedProcess:
        with self.plane.machine.network():
            # What kinds there are is remembered by the API server's address, which two clusters have in common.
            env = {**NO_PROXY, "KUBECACHEDIR": str(self.work / "kube-cache"), **(env or {})}
            return process.run(*command, check=check, timeout=timeout, stdin=stdin, env=env)

    # Not by kubectl, which takes longer to start than the answer.

    def apply(self, *objects: dict) -> None:
        for it in objects:
            path = "/".join(kube_objects.place(it))
            answer = self.plane.request("PATCH", f"/{path}?{kube_objects.APPLIED}", it, content_type=kube_objects.APPLY)
            if answer.status not in (200, 201):
                raise process.Failed(f"applying {path}: {answer.status} {answer.read().decode()}")

    def delete(self, *objects: dict) -> None:
        """Deletes objects, and waits until they are gone; it is no error that one is not there."""
        deleted = []
        for it in objects:
            where, name = kube_objects.place(it)
            answer = self.plane.request("DELETE", f"/{where}/{name}")
            body = json.loads(answer.read())
            if answer.status in (200, 202):
                # The object as long as it has to end by itself, else what has become of it.
                deleted.append((where, name, body.get("details", body.get("metadata"))["uid"]))
            elif answer.status != 404:
                raise process.Failed(f"deleting {where}/{name}: {answer.status} {body}")
        for where, name, uid in deleted:
            # There may be another one in its place: a service account comes again.
            self.wait(where, name, lambda it, uid=uid: it is None or it["metadata"]["uid"] != uid, f"{name} to be gone")

    def delete_pods(self, *names: str, namespace: str = "default") -> None:
        self.delete(*({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": namespace, "name": name}} for name in names))

    def logs(self, pod: str) -> str:
        """What a pod of the default namespace has printed; nothing as long as it has no log."""
        answer = self.plane.request("GET", f"/api/v1/namespaces/default/pods/{pod}/log")
        text = answer.read().decode()
        return text if answer.status == 200 else ""

    def get(self, path: str, **query: str) -> dict:
        """What the API server has at a path: "api/v1/nodes", labelSelector="a=b"."""
        answer = self.plane.request("GET", f"/{path}?{urllib.parse.urlencode(query)}")
        body = answer.read()
        if answer.status != 200:
            raise process.Failed(f"GET /{path}: {answer.status} {body.decode()}")
        return json.loads(body)

    def wait(self, resource: str, name: str, condition, what: str, seconds: float = PATIENCE_SECONDS) -> dict:
        """The object once `condition` holds for it, seen the moment the API server has it; None stands for no object.

        `resource` is a path of the API: "api/v1/namespaces/default/pods".
        """
        deadline = time.monotonic() + seconds
        last = None
        try:
            # A watch of version 0 begins with what the API server has in memory, at once. It has a bound so that it is taken up again when it hangs.
            while time.monotonic() < deadline:
                answer = self.plane.request("GET", f"/{resource}?watch=1&resourceVersion=0&timeoutSeconds=30&fieldSelector=metadata.name%3D{name}", timeout=deadline - time.monotonic())
                # Asked for once the watch is there: of what went before, it says nothing.
                if not self._exists(resource, name) and condition(None):
                    return None
                for line in answer:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        # The watch has lost its place: a new one begins again with what is there.
                        break
                    last = None if event["type"] == "DELETED" else event["object"]
                    if condition(last):
                        return last
        except TimeoutError:
            pass
        raise process.Failed(f"waited {seconds} s in vain for {what}; last seen: {json.dumps(last and last.get('status'), indent=1)}")

    def _exists(self, resource: str, name: str) -> bool:
        return self.plane.request("GET", f"/{resource}/{name}").status == 200

    def push(self, name: str, host: str = REGISTRY) -> str:
        """Pushes a test image; its reference."""
        with self.plane.machine.network():
            return images.get(name).push(host)

    def push_as(self, name: str, repository: str) -> None:
        """Pushes a test image under another name."""
        with self.plane.machine.network():
            oci.push(images.get(name).layout, images.TAG, REGISTRY, f"e2e/{repository}")


def condition(thing: dict, name: str) -> bool:
    return any(it["type"] == name and it["status"] == "True" for it in thing.get("status", {}).get("conditions", []))
