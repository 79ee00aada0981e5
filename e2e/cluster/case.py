"""The test case of the cluster: pods that end with the test, and what they must show."""

import base64
import json
import time

import compare
import images
import tree
from harness import driver, paths, process, services
from harness.environment import Case

from .cluster import PRIVATE_REGISTRY, condition
from .pods import pod
from .release import secret

PODS = "api/v1/namespaces/default/pods"
EVENTS = "api/v1/namespaces/default/events"
# Where kubelet has a pod's volume; `image` is its name in `pod`.
TARGET = "/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~csi/image/mount"


class ClusterCase(Case):
    """With the cluster alone."""

    def setUp(self):
        super().setUp()
        self.cluster = self.env.cluster()
        self.kubectl = self.cluster.kubectl

    def create(self, *objects: dict) -> None:
        """Objects that end with the test."""
        self.addCleanup(self.cluster.delete, *objects)
        self.cluster.apply(*objects)

    def wait_pod(self, name: str, done, what: str, seconds: float = 120) -> dict:
        """The pod once `done` holds for it; at once a failure if it has failed before."""
        try:
            it = self.cluster.wait(PODS, name, lambda it: it and (done(it) or it["status"].get("phase") == "Failed"), f"pod {name} to be {what}", seconds)
        except process.Failed as error:
            self.fail(f"{error}\n{self.kubectl('describe', 'pod', name).stdout}")
        if not done(it):
            self.fail(f"pod {name} is not {what}:\n{self.kubectl('describe', 'pod', name).stdout}{self.kubectl('logs', name, check=False).stdout}")
        return it

    def wait_ready(self, name: str, seconds: float = 120) -> dict:
        return self.wait_pod(name, lambda it: condition(it, "Ready"), "ready", seconds)

    def wait_succeeded(self, name: str) -> str:
        """What a pod printed that ran to its end."""
        self.wait_pod(name, lambda it: it["status"].get("phase") == "Succeeded", "done")
        return self.cluster.logs(name)

    def wait_gone(self, name: str) -> None:
        self.cluster.wait(PODS, name, lambda it: it is None, f"pod {name} to be gone")

    def run_pod(self, name: str, **settings) -> dict:
        """A pod that is ready; its object."""
        self.create(pod(name, **settings))
        return self.wait_ready(name)

    def exec(self, name: str, *command, check=True) -> str:
        done = self.kubectl("exec", name, "--", *command, check=check)
        return done.stdout if check else done.stdout + done.stderr

    def events(self, name: str) -> list[str]:
        """The messages of a pod's warnings."""
        return [it["message"] for it in self.cluster.get(EVENTS, fieldSelector=f"involvedObject.name={name},type=Warning")["items"]]

    def wait_event(self, name: str, *words: str) -> str:
        """A warning that has these words."""
        def find():
            time.sleep(0.3)
            return next((it for it in self.events(name) if all(word.lower() in it.lower() for word in words)), None)
        try:
            return process.wait_until(find, "an event", 60)
        except process.Failed:
            self.fail(f"no warning of pod {name} has {words}; there are: {self.events(name)}")


    def push_private(self, image: str) -> str:
        """An image in a registry that asks who is there, and Secrets `right` and `wrong` with credentials for it; its reference."""
        self.cluster.push(image)
        plane, port = self.cluster.plane.machine, int(PRIVATE_REGISTRY.rpartition(":")[2])
        htpasswd = process.run("htpasswd", "-Bbn", "user", "right-password").stdout
        registry = services.Registry(self.work, self.cluster.work / "registry", htpasswd=htpasswd, name="private", where=plane, port=port)
        self.addCleanup(registry.stop)
        for name in ("right", "wrong"):
            it = secret(name, "default", **{".dockerconfigjson": docker_config(PRIVATE_REGISTRY, "user", f"{name}-password")})
            self.create({**it, "type": "kubernetes.io/dockerconfigjson"})
        return f"{PRIVATE_REGISTRY}/e2e/{image}:{images.TAG}"


class DriverCase(ClusterCase):
    """With the chart installed by its plain values."""

    def setUp(self):
        super().setUp()
        self.release = self.env.release()
        self.release.ensure()

    def target(self, it: dict) -> str:
        return TARGET.format(uid=it["metadata"]["uid"])

    def machine(self, it: dict):
        return self.cluster.nodes[it["spec"]["nodeName"]].machine

    def assert_files(self, name: str, image: str, below: str = "", at: str = "/mnt") -> None:
        """Every file of the image has its content, as the pod reads it."""
        top = f"{below}/" if below else ""
        wanted = {path.removeprefix(top): fields["sha256"] for path, fields in truth(image).items() if fields["type"] == "file" and path.startswith(top)}
        self.assertGreater(len(wanted), 0)
        found = {}
        for line in self.exec(name, "sh", "-c", f"cd {at} && find . -type f -exec sha256sum {{}} +").splitlines():
            digest, _, path = line.partition("  ./")
            found[tree.escape(path.encode())] = digest
        wrong = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
        self.assertFalse(wrong, f"{len(wrong)} of {len(wanted)} files are missing, too many, or have other bytes: {wrong[:10]}")

    def assert_mounted_tree(self, it: dict, image: str) -> None:
        """The pod's volume shows the image in everything that a tree has, as the node sees it."""
        found = tree.parse(self.machine(it).run("python3", paths.E2E / "tree.py", self.target(it)).stdout)
        differences = compare.differences(truth(image), found, images.get(image).dirs_without_time())
        if differences:
            self.fail(f"{image}: {len(differences)} differences from the truth:\n" + "\n".join(differences[:compare.MAX_PRINTED]))

    def metric(self, node: str, name: str, **labels: str) -> float:
        return driver.metric(self.release.metrics(node), name, **labels)

    def blob_gets(self, image: str, mark: int) -> list[int]:
        """How often each layer's blob was fetched from the cluster's registry since the mark."""
        gets = self.cluster.registry.blob_gets(mark)
        return [gets[digest] for digest in images.get(image).layer_digests()]

    def warm(self, image: str, node: str) -> str:
        """Puts an image that nobody has yet on a node's disk and into the remote cache; its reference."""
        reference = self.cluster.push(image)
        before = self.metric(node, "remote_uploads_total", outcome="ok")
        self.run_pod("warm", node=node, image=reference)
        self.exec("warm", "sh", "-c", "find /mnt -type f -exec cat {} + >/dev/null")
        layers = len(set(images.get(image).layout.diff_ids(images.TAG)))
        process.wait_until(lambda: self.metric(node, "remote_uploads_total", outcome="ok") >= before + layers, "the uploads", 120)
        self.cluster.delete_pods("warm")
        return reference


def truth(image: str) -> dict[str, dict[str, str]]:
    return tree.parse(images.get(image).truth().read_text(encoding="ascii"))


def docker_config(host: str, user: str, password: str) -> str:
    return json.dumps({"auths": {host: {"username": user, "password": password, "auth": base64.b64encode(f"{user}:{password}".encode()).decode()}}})
