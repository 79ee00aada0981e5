"""The cluster's cases about volumes that are more than an image in a pod: claims, PersistentVolumes, layers to write, directories."""

from cluster.case import ClusterCase, DriverCase, truth
from cluster.cluster import NODES
from cluster.pods import DRIVER, pod
from harness import process
from harness.process import say

N1, N2 = NODES
CLAIMS, VOLUMES = "api/v1/namespaces/default/persistentvolumeclaims", "api/v1/persistentvolumes"
CLASS = "small-image"
WRITABLE_BYTES = 4 << 20


def claim(name: str, **spec) -> dict:
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": "default"},
            "spec": {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}, **spec}}


def claimed(name: str) -> dict:
    return {"persistentVolumeClaim": {"claimName": name, "readOnly": True}}


class Claims(DriverCase):
    def setUp(self):
        ClusterCase.setUp(self)
        self.release = self.env.release()
        self.reference = self.cluster.push("small")
        over = {"controller": {"enabled": True}, "node": {"maxWritableBytes": WRITABLE_BYTES},
                "storageClasses": [{"name": CLASS, "parameters": {"image": self.reference}}]}
        if not self.release.installed:
            self.release.install(over)
        elif not self.kubectl("get", "storageclass", CLASS, check=False).stdout:
            self.release.upgrade(over)

    def wait_bound(self, name: str) -> str:
        """The claim's volume, once it has one."""
        bound = lambda it: it and it["status"].get("phase") == "Bound"
        try:
            return self.cluster.wait(CLAIMS, name, bound, f"claim {name} to be bound", 60)["spec"]["volumeName"]
        except process.Failed as error:
            self.fail(f"{error}\n{self.kubectl('describe', 'pvc', name).stdout}{self.controller_logs()}")

    def controller_logs(self) -> str:
        return self.kubectl("logs", "--namespace", "clip-csi", "--selector", "app.kubernetes.io/component=controller", "--all-containers", "--prefix", "--tail=20", check=False).stdout

    def test_claim(self):
        """A claim of a StorageClass gets a volume, pods of both nodes read it, and it goes with the claim."""
        it = claim("image", storageClassName=CLASS)
        self.create(it)
        volume = self.wait_bound("image")
        spec = self.cluster.get(f"{VOLUMES}/{volume}")["spec"]
        self.assertEqual((spec["csi"]["driver"], spec["csi"]["volumeAttributes"]["image"]), (DRIVER, self.reference))
        for node in NODES:
            self.run_pod(f"claim-{node}", node=node, volume=claimed("image"))
            self.assertEqual(self.exec(f"claim-{node}", "cat", "/mnt/hello"), "hello\n")
        self.cluster.delete_pods(*[f"claim-{node}" for node in NODES])
        self.cluster.delete(it)
        self.cluster.wait(VOLUMES, volume, lambda it: it is None, "the volume to be gone", 60)

    def test_claim_that_nobody_can_fulfil(self):
        """What an image cannot be is said in an event of the claim."""
        self.create(claim("written", storageClassName=CLASS, accessModes=["ReadWriteMany"]))
        say(f"event of the claim: {self.wait_event('written', 'ReadOnlyMany')}")

    def test_static_volume(self):
        """A PersistentVolume that somebody wrote, whose handle means nothing to the driver."""
        self.create(
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "static"}, "spec": {
                "accessModes": ["ReadOnlyMany"], "capacity": {"storage": "1Gi"}, "persistentVolumeReclaimPolicy": "Retain", "storageClassName": "",
                "csi": {"driver": DRIVER, "volumeHandle": "static", "readOnly": True, "volumeAttributes": {"image": self.reference}}}},
            claim("static", storageClassName="", volumeName="static"))
        self.assertEqual(self.wait_bound("static"), "static")
        it = self.run_pod("static", node=N1, volume=claimed("static"))
        self.assertEqual(self.exec("static", "cat", "/mnt/hello"), "hello\n")
        self.assertIn("Read-only file system", self.exec("static", "touch", "/mnt/new", check=False))
        self.assertEqual(it["spec"]["nodeName"], N1)

    def test_writable(self):
        """A pod writes over an image as much as it may; another one sees nothing of it, and neither does the next."""
        def start(name: str) -> None:
            self.run_pod(name, node=N2, image=self.reference, attributes={"writable": "true"}, mount={"readOnly": False})
        start("writes")
        start("reads")
        self.exec("writes", "sh", "-c", "echo more >>/mnt/hello && mkdir /mnt/dir && echo new >/mnt/dir/new")
        self.assertEqual(self.exec("writes", "cat", "/mnt/hello", "/mnt/dir/new"), "hello\nmore\nnew\n")
        self.assertEqual(self.exec("reads", "cat", "/mnt/hello"), "hello\n")
        self.assertIn("No space left on device", self.exec("writes", "dd", "if=/dev/zero", "of=/mnt/big", "bs=1M", f"count={(WRITABLE_BYTES >> 20) + 1}", check=False))
        # The node service is replaced, and what was written stays.
        self.release.delete_pod(N2, "node")
        self.assertEqual(self.exec("writes", "cat", "/mnt/dir/new"), "new\n")
        self.cluster.delete_pods("writes")
        start("writes")
        self.assertEqual(self.exec("writes", "ls", "/mnt"), self.exec("reads", "ls", "/mnt"))

    def test_path(self):
        """A directory of the image is all that a pod sees; one that the image does not have is named in an event."""
        reference = self.cluster.push("debian-python")
        below = "usr/lib/python3"
        self.assertEqual(truth("debian-python")[below]["type"], "dir")
        self.create(pod("none", node=N1, image=reference, attributes={"path": "usr/lib/none"}))
        self.run_pod("path", node=N1, image=reference, attributes={"path": below})
        self.assert_files("path", "debian-python", below=below)
        say(f"event of pod none: {self.wait_event('none', 'path: the image has no directory')}")
