"""The cluster's cases about pods: what a user of Kubernetes sees of the driver, on a real one of two nodes."""

import time
import unittest

import images
from cluster import project_image
from cluster.case import PODS, ClusterCase, DriverCase, truth
from cluster.cluster import NODES, PRIVATE_REGISTRY, REGISTRY, condition
from cluster.pods import SHELL, STAY, pod
from cluster.release import CHART, CONTAINERS, REPOSITORY, secret
from harness import process, services
from harness.process import say

N1, N2 = NODES
# A user of the images that is not root.
NOBODY = {"runAsUser": 65534, "runAsGroup": 65534, "runAsNonRoot": True}

# Layers that a node decompressed itself; reads that the remote cache answered.
MADE = ("layer_decompressions_total", {"outcome": "ok"})
FOUND = ("tier_reads_total", {"tier": "content_cache", "outcome": "hit"})


class Platform(ClusterCase):
    def test_smoke(self):
        """The cluster without the driver: images from the registry, logs, exec, and pods that reach each other and the API server."""
        self.assertTrue(all(condition(node, "Ready") for node in self.cluster.get("api/v1/nodes")["items"]))
        for node in NODES:
            self.create(pod(f"smoke-{node}", node=node, command=f"echo hello from {node}; echo {node} >/tmp/name; httpd -f -p 80 -h /tmp"))
        pods = {node: self.wait_ready(f"smoke-{node}") for node in NODES}
        for node, other in zip(NODES, reversed(NODES)):
            self.assertEqual(pods[node]["spec"]["nodeName"], node)
            self.assertEqual(self.cluster.logs(f"smoke-{node}"), f"hello from {node}\n")
            address = pods[other]["status"]["podIP"]
            self.assertEqual(self.exec(f"smoke-{node}", "wget", "-q", "-O", "-", f"http://{address}/name"), f"{other}\n")
            self.assertEqual(self.exec(f"smoke-{node}", "sh", "-c", "nc -w 5 10.96.0.1 443 </dev/null"), "")


class Install(ClusterCase):
    def test_image(self):
        """The image that buildah makes of the Dockerfile: small, labelled, not root, and its program runs with nothing beside it."""
        self.env.release()
        layout = project_image.layout()
        config = layout.read_json(layout.manifest(project_image.TAG)["config"]["digest"])["config"]
        self.assertEqual(config["User"], "65532:65532")
        self.assertEqual(config["Labels"]["org.opencontainers.image.version"], project_image.version())
        compressed = sum(it["size"] for it in layout.layers(project_image.TAG))
        say(f"the project's image has {compressed / 1e6:.1f} MB compressed, of which nothing is a shell")
        self.assertLess(compressed, 20e6)
        image = f"{REGISTRY}/{REPOSITORY}:{project_image.version()}"
        self.create(pod("image", command=[], container={"image": image, "command": None, "args": ["--version"]}, securityContext={"runAsNonRoot": True}))
        self.assertEqual(self.wait_succeeded("image"), f"clip-csi {project_image.version()}\n")
        self.create(pod("no-shell", container={"image": image}))
        self.wait_pod("no-shell", lambda it: it["status"].get("phase") == "Failed", "refused, because there is no shell")

    def test_install(self):
        """`helm install --wait`: the pods are ready on both nodes, and kubelet knows the driver."""
        self.cluster.helm("lint", "--strict", CHART, "--set", f"image.registry={REGISTRY}")
        release = self.env.release()
        if release.installed:
            release.uninstall()
        begin = time.monotonic()
        release.install()
        say(f"helm install --wait took {time.monotonic() - begin:.1f} s")
        for component, containers in CONTAINERS.items():
            pods = release.pods(component)
            self.assertEqual(sorted(pods), NODES)
            for node in NODES:
                self.assertTrue(condition(pods[node], "Ready"))
                self.assertEqual({it["name"]: it["restartCount"] for it in pods[node]["status"]["containerStatuses"]}, dict.fromkeys(containers, 0), release.logs(node))
        for node in NODES:
            process.wait_until(lambda node=node: release.registered(node), f"the driver to be in CSINode {node}", 30)
            self.assertEqual(release.page(node, "/readyz"), "ok\n")
        image = release.pods()[N1]["spec"]["containers"][0]["image"]
        listed = self.cluster.nodes[N1].ctr("images", "ls", f"name=={image}").stdout
        self.assertIn(image, listed, "kubelet pulled the image that buildah built")


class Volumes(DriverCase):
    def test_inline(self):
        """A pod reads a tree of thousands of files in a volume that names the image."""
        it = self.run_pod("inline", node=N1, image=self.cluster.push("debian-python"))
        self.assert_files("inline", "debian-python")
        self.assert_mounted_tree(it, "debian-python")

    def test_nasty(self):
        """Every odd thing that a layer may have, through kubelet."""
        self.assert_mounted_tree(self.run_pod("nasty", node=N2, image=self.cluster.push("nasty")), "nasty")

    def test_shared(self):
        """Two pods of a node share one source mount; it goes some time after the last of them."""
        reference = self.cluster.push("small")
        process.wait_until(lambda: self.metric(N1, "mounts") == 0, "the mounts of former cases to go", 30)
        before = self.metric(N1, "mounts")
        pods = [self.run_pod(f"shared-{number}", node=N1, image=reference) for number in (1, 2)]
        self.assertEqual(self.metric(N1, "mounts"), before + 1)
        self.assertEqual(self.metric(N1, "volumes"), 2)
        devices = {self.machine(it).run("stat", "--format", "%d", self.target(it)).stdout for it in pods}
        self.assertEqual(len(devices), 1, "one file system")
        self.cluster.delete_pods("shared-1")
        self.assertEqual(self.exec("shared-2", "cat", "/mnt/hello"), "hello\n")
        self.cluster.delete_pods("shared-2")
        process.wait_until(lambda: self.metric(N1, "mounts") == before, "the source mount to go", 30)

    def test_second_node(self):
        """What one node has read, another gets from Redis: not one blob is fetched from the registry."""
        self.release.empty_all()
        reference = self.warm("demo5", N1)
        mark = self.cluster.registry.mark()
        made, found = (self.metric(N2, name, **labels) for name, labels in (MADE, FOUND))
        self.run_pod("second", node=N2, image=reference)
        self.assert_files("second", "demo5")
        self.assertEqual(set(self.blob_gets("demo5", mark)), {0})
        self.assertEqual(self.metric(N2, MADE[0], **MADE[1]), made)
        self.assertGreater(self.metric(N2, FOUND[0], **FOUND[1]), found)

    def test_subpath(self):
        """One directory and one file of the image, mounted by subPath."""
        reference = self.cluster.push("debian-python")
        file = next(path for path, it in truth("debian-python").items() if path.endswith("os.py") and it["type"] == "file")
        self.create(pod("subpath", node=N1, image=reference, container={"volumeMounts": [
            {"name": "image", "mountPath": "/mnt", "subPath": "usr/lib/python3", "readOnly": True},
            {"name": "image", "mountPath": "/file", "subPath": file, "readOnly": True},
        ]}))
        self.wait_ready("subpath")
        self.assert_files("subpath", "debian-python", below="usr/lib/python3")
        self.assertEqual(self.exec("subpath", "sha256sum", "/file").split()[0], truth("debian-python")[file]["sha256"])

    def test_thirty(self):
        """Thirty pods at once on one image, on a node that has nothing of it: one mount, each layer fetched once."""
        self.release.empty_all()
        reference = self.cluster.push("demo5")
        file = max(images.get("demo5").note()["files"][0])
        mark = self.cluster.registry.mark()
        names = [f"thirty-{number}" for number in range(30)]
        begin = time.monotonic()
        self.create(*[pod(name, node=N1, image=reference, command=f"sha256sum '/mnt/{file}'; {STAY}") for name in names])
        for name in names:
            self.wait_ready(name)
        say(f"thirty pods on one image were ready in {time.monotonic() - begin:.1f} s")
        self.assertEqual(self.metric(N1, "mounts"), 1)
        self.assertEqual(self.metric(N1, "volumes"), 30)
        for name in names:
            self.assertEqual(self.cluster.logs(name).split()[0], images.get("demo5").note()["files"][0][file])
        self.assertLessEqual(max(self.blob_gets("demo5", mark)), 1)
        self.cluster.delete_pods(*names)
        process.wait_until(lambda: self.metric(N1, "volumes") == 0 and self.metric(N1, "mounts") == 0, "all volumes to be taken down", 60)


class Users(DriverCase):
    """Pods of every kind of privilege."""

    def test_nonroot(self):
        """A pod that is not root reads what the image lets it read, and nothing else."""
        self.run_pod("nonroot", node=N1, image=self.cluster.push("debian-python"), securityContext=NOBODY)
        self.assertEqual(self.exec("nonroot", "id", "-u"), "65534\n")
        path = "etc/debian_version"
        self.assertEqual(self.exec("nonroot", "sha256sum", f"/mnt/{path}").split()[0], truth("debian-python")[path]["sha256"])
        self.assertEqual(truth("debian-python")["etc/shadow"]["mode"], "0640")
        self.assertIn("Permission denied", self.exec("nonroot", "cat", "/mnt/etc/shadow", check=False))

    def test_readonly_root(self):
        """A pod whose own root is read-only, without any capability; the volume is read-only, too."""
        security = {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}}
        self.run_pod("readonly", node=N2, image=self.cluster.push("small"), container={"securityContext": security})
        self.assertEqual(self.exec("readonly", "cat", "/mnt/hello"), "hello\n")
        for place in ("/mnt/new", "/new"):
            self.assertIn("Read-only file system", self.exec("readonly", "touch", place, check=False))

    def test_scratch(self):
        """A pod whose own image has no shell and no libraries runs a program out of the mounted image."""
        self.create(pod("scratch", node=N1, image=SHELL, command=["/mnt/bin/busybox", "sha256sum", "/mnt/bin/busybox"],
                        container={"image": f"{REGISTRY}/pause:1"}, securityContext=NOBODY))
        digest = self.wait_succeeded("scratch").split()[0]
        self.run_pod("whole", node=N1)
        self.assertEqual(digest, self.exec("whole", "sha256sum", "/bin/busybox").split()[0])


class Faults(DriverCase):
    """What goes wrong, and what the user is told."""

    def test_private(self):
        """A registry that asks who is there: the Secret of the volume opens it; without or with a wrong one an event says so."""
        reference = self.push_private("small")
        self.run_pod("private", node=N1, image=reference, secret="right")
        self.assertEqual(self.exec("private", "cat", "/mnt/hello"), "hello\n")
        # The layers are on this node now, and that gives nobody else a right to them.
        self.create(pod("anonymous", node=N1, image=reference), pod("wrong", node=N1, image=reference, secret="wrong"))
        for name in ("anonymous", "wrong"):
            say(f"event of pod {name}: {self.wait_event(name, PRIVATE_REGISTRY, 'credentials')}")
            self.assertFalse(condition(self.cluster.get(f"{PODS}/{name}"), "Ready"))
        told = "".join(self.events("wrong")) + self.release.logs(N1, 1000)
        for private in ("right-password", "wrong-password"):
            self.assertNotIn(private, told)

    def test_missing_image(self):
        """An image that is not there: an event says so, and the pod starts by itself when it appears."""
        repository = f"late-{self.seed}"
        reference = f"{REGISTRY}/e2e/{repository}:{images.TAG}"
        self.create(pod("missing", node=N1, image=reference))
        say(f"event of pod missing: {self.wait_event('missing', reference, 'not found')}")
        self.cluster.push_as("small", repository)
        begin = time.monotonic()
        self.wait_ready("missing", 180)
        say(f"the pod was ready {time.monotonic() - begin:.1f} s after its image appeared")
        self.assertEqual(self.exec("missing", "cat", "/mnt/hello"), "hello\n")

    def test_force_delete(self):
        """A pod that is deleted by force leaves nothing on its node, and its name can be used again at once."""
        reference = self.cluster.push("small")
        for _ in range(2):
            it = self.run_pod("forced", node=N1, image=reference)
            self.kubectl("delete", "pod", "forced", "--force", "--grace-period=0")
            again = self.run_pod("forced", node=N1, image=reference)
            self.assertEqual(self.exec("forced", "cat", "/mnt/hello"), "hello\n")
            self.assertNotEqual(it["metadata"]["uid"], again["metadata"]["uid"])
            process.wait_until(lambda it=it: self.target(it) not in self.machine(it).mounts(), "the forced pod's mount to go", 60)
            self.kubectl("delete", "pod", "forced", "--force", "--grace-period=0")
        process.wait_until(lambda: self.metric(N1, "volumes") == 0, "the volumes to be taken down", 60)


# In this order, which spares installations.
ORDER = [Platform, Install, Volumes, Users, Faults]


def load_tests(loader, _tests, _pattern):
    return unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in ORDER)
