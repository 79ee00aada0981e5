"""Pre-warming on the cluster: what was warmed is read by pods without the registry; controller, nodes and the remote may die; what is wrong is said."""

import contextlib
import json
import os
import signal
import time

from cluster.case import ClusterCase, DriverCase
from cluster.cluster import NODES, PRIVATE_REGISTRY, REGISTRY
from cluster.pods import pod
from cluster.release import NAMESPACE
from harness import process, services
from harness.process import say

PREWARMS, CACHES = "apis/clip-csi.dev/v1alpha1/namespaces/default/imageprewarms", "apis/clip-csi.dev/v1alpha1/nodeimagecaches"
EVENTS = "api/v1/namespaces/default/events"
LEASE = f"apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/clip-csi-prewarm"
COMPONENT = "app.kubernetes.io/component=prewarm"


def prewarm(name: str, *references: str, **spec) -> dict:
    return {"apiVersion": "clip-csi.dev/v1alpha1", "kind": "ImagePrewarm", "metadata": {"name": name, "namespace": "default"},
            "spec": {"images": [{"image": it} for it in references], **spec}}


class PrewarmCase(DriverCase):
    def setUp(self):
        ClusterCase.setUp(self)
        self.release = self.env.release()
        over = {"prewarm": {"enabled": True, "pullSecrets": {"namespaces": ["default"]}}}
        if not self.release.installed:
            self.release.install(over)
        elif not self.kubectl("get", "deployment", "clip-csi-prewarm", "--namespace", NAMESPACE, check=False).stdout:
            self.release.upgrade(over)
        process.wait_until(lambda: time.sleep(0.3) or len(self.cluster.get(CACHES)["items"]) == len(NODES), "the agents' objects", 60)

    def wait_phase(self, name: str, phase: str, seconds: float = 60) -> dict:
        try:
            return self.cluster.wait(PREWARMS, name, lambda it: it and it.get("status", {}).get("phase") == phase, f"ImagePrewarm {name} to be {phase}", seconds)
        except process.Failed as error:
            logs = self.kubectl("logs", "--namespace", NAMESPACE, "--selector", COMPONENT, "--prefix", "--tail=30", check=False).stdout
            self.fail(f"{error}\n{logs}{''.join(self.release.logs(node) for node in NODES)}")

    def condition(self, it: dict, name: str) -> tuple[str, str, str]:
        return next((condition["status"], condition["reason"], condition["message"]) for condition in it["status"]["conditions"] if condition["type"] == name)

    def leader(self) -> str:
        return self.cluster.get(LEASE)["spec"].get("holderIdentity") or ""

    def read_everywhere(self, image: str, reference: str, mark: int, nodes=NODES) -> None:
        """Pods of the nodes read every file, and no layer's blob comes from the registry."""
        for node in nodes:
            self.run_pod(f"warm-{image}-{node}", node=node, image=reference)
            self.assert_files(f"warm-{image}-{node}", image)
        self.assertEqual(sum(self.blob_gets(image, mark)), 0)

    def wait_nodes(self, name: str, ready: str, seconds: float = 60) -> None:
        self.cluster.wait(PREWARMS, name, lambda it: it and it["status"]["nodesReady"] == ready, f"{ready} nodes to be warm", seconds)

    def warnings(self, name: str) -> list[tuple[str, str]]:
        """Reason and message of each warning about an ImagePrewarm."""
        found = self.cluster.get(EVENTS, fieldSelector=f"involvedObject.name={name},involvedObject.kind=ImagePrewarm,type=Warning")["items"]
        return [(it["reason"], it["message"]) for it in found]


class PrewarmNodes(PrewarmCase):
    """Nodes come and go, and so does the remote."""

    def test_a_third_node_joins_with_a_full_disk_and_leaves(self):
        """It fails alone, and it is said why; with room it is warmed, without the registry; pods there read everything; when it leaves, nobody counts it any more."""
        self.release.empty_all()
        reference = self.cluster.push("demo5")
        self.create(prewarm("joined", reference, parallelism="100%"))
        self.wait_phase("joined", "Ready")
        mark, third = self.cluster.registry.mark(), "n3"
        self.addCleanup(self.take_away, third)
        # Less than what cache.min_free_bytes leaves free.
        self.cluster.join(third, cache_bytes=300 << 20)
        it = self.wait_phase("joined", "Degraded")
        [failed] = it["status"]["failedNodes"]
        self.assertEqual((failed["node"], failed["reason"], it["status"]["nodesReady"]), (third, "NoSpace", "2/3"))
        self.assertIn("a larger disk or cache.max_bytes", failed["message"])
        for name in ("Distributed", "Ready"):
            self.assertEqual(self.condition(it, name)[:2], ("False", "NoSpace"))
        process.wait_until(lambda: time.sleep(0.2) or "NoSpace" in [reason for reason, _ in self.warnings("joined")], "an event", 10)

        self.cluster.nodes[third].mount_cache(2 << 30)
        begin = time.monotonic()
        # It would try again by itself after half a minute.
        self.kubectl("patch", "imageprewarm", "joined", "--type=merge", "--patch", json.dumps({"spec": {"priority": 1}}))
        self.wait_nodes("joined", "3/3")
        say(f"{third} was warm {time.monotonic() - begin:.1f} s after it had room")
        self.assertEqual(self.metric(third, "registry_read_bytes_total"), 0)
        self.assertGreater(self.metric(third, "prewarm_bytes_total", tier="content_cache"), 150e6)
        self.read_everywhere("demo5", reference, mark, [third])
        self.cluster.delete_pods(f"warm-demo5-{third}")
        self.take_away(third)
        self.wait_nodes("joined", "2/2")

    def take_away(self, node: str) -> None:
        """With all that the cluster knows of it."""
        if node not in self.cluster.nodes:
            return
        self.cluster.leave(node)
        process.wait_until(lambda: time.sleep(0.2) or len(self.cluster.get(CACHES)["items"]) == len(NODES), f"the NodeImageCache of {node} to go with it", 60)

    def test_a_node_dies_in_the_middle(self):
        """Kubelet and agent of a node are killed while it is warmed: the other one is warm without it, and it is, too, once it is back."""
        self.release.empty_all()
        reference, (stays, dies) = self.cluster.push("demo5"), NODES
        mark = self.cluster.registry.mark()
        # 150 MB in a quarter of a minute: it is in the middle for long enough.
        self.create(prewarm("dying", reference, parallelism="100%", bytesPerSecondPerNode=10_000_000))
        self.cluster.wait(PREWARMS, "dying", lambda it: it and it.get("status", {}).get("nodes", {}).get("warming") == 2, "both nodes to be at it")
        node = self.cluster.nodes[dies]
        node.kubelet.kill()
        self.addCleanup(lambda: node.kubelet.alive() or node.start_kubelet())
        for pid in self.release.processes(dies, "agent"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # What the node controller says of a node of which it has not heard for 40 seconds.
        lost = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "Kubelet stopped posting node status."}
        self.kubectl("patch", "node", dies, "--subresource=status", "--type=strategic", "--patch", json.dumps({"status": {"conditions": [lost]}}))
        self.wait_phase("dying", "Ready")
        self.wait_nodes("dying", "1/1")
        told = self.cluster.get(f"{CACHES}/{dies}")["status"]["warmups"]
        self.assertEqual([it["phase"] for it in told], ["Warming"], "what it was at is known")
        begin = time.monotonic()
        node.start_kubelet()
        # A node that has missed the remote meanwhile waits half a minute before it tries again.
        self.wait_nodes("dying", "2/2", 120)
        say(f"{dies} was warm {time.monotonic() - begin:.1f} s after its kubelet came back")
        self.assertEqual(self.blob_gets("demo5", mark), [1] * 5)
        self.read_everywhere("demo5", reference, self.cluster.registry.mark(), [stays, dies])

    def test_the_remote_dies_in_the_middle(self):
        """Redis is killed while an image is put into it: condition and event say so; an empty one comes back, and all goes on."""
        self.release.empty_all()
        reference = self.cluster.push("demo5")
        mark, port = self.cluster.registry.mark(), self.cluster.redis.port
        self.create(prewarm("away", reference, parallelism="100%"))
        process.wait_until(lambda: any(self.blob_gets("demo5", mark)), "a layer to be fetched", 30)
        self.cluster.redis.kill()
        def again():
            self.cluster.redis = services.Redis(self.cluster.work, where=self.cluster.plane.machine, port=port)
        self.addCleanup(lambda: self.cluster.redis.server.alive() or again())
        down = lambda it: it and it.get("status", {}).get("images", [{}])[0].get("reason") == "RemoteDown"
        it = self.cluster.wait(PREWARMS, "away", down, "the controller to miss the remote", 120)
        for name in ("Seeded", "Ready"):
            status, why, message = self.condition(it, name)
            self.assertEqual((status, why), ("False", "RemoteDown"))
            self.assertIn("see that it runs", message)
        process.wait_until(lambda: time.sleep(0.2) or "RemoteDown" in [reason for reason, _ in self.warnings("away")], "an event", 10)
        again()
        begin = time.monotonic()
        self.assertEqual(self.wait_phase("away", "Ready", 90)["status"]["nodesReady"], "2/2")
        say(f"both nodes were warm {time.monotonic() - begin:.1f} s after the remote came back")


class Prewarm(PrewarmCase):
    def test_pods_of_both_nodes_read_what_was_warmed(self):
        """The registry is read once, by the controller; then pods start and read without it."""
        self.release.empty_all()
        reference = self.cluster.push("demo5")
        mark = self.cluster.registry.mark()
        begin = time.monotonic()
        self.create(prewarm("demo", reference, parallelism="100%"))
        it = self.wait_phase("demo", "Ready")
        say(f"both nodes were warm {time.monotonic() - begin:.1f} s after the object was made")
        self.assertEqual(self.blob_gets("demo5", mark), [1] * 5)
        self.assertEqual(it["status"]["nodesReady"], "2/2")
        for node in NODES:
            self.assertEqual(self.metric(node, "prewarm_bytes_total", tier="registry"), 0)
            self.assertEqual([(warmup["name"], warmup["phase"]) for warmup in self.cluster.get(f"{CACHES}/{node}")["status"]["warmups"]], [("demo", "Ready")])
        hits = [self.metric(node, "tier_reads_total", tier="content_cache", outcome="hit") for node in NODES]
        self.read_everywhere("demo5", reference, self.cluster.registry.mark())
        self.assertEqual([self.metric(node, "tier_reads_total", tier="content_cache", outcome="hit") for node in NODES], hits, "all is on the disks")

    def test_a_controller_that_is_killed_is_followed(self):
        """The leading pod is deleted by force in the middle; the other replica goes on, and no layer is read twice but the one that was under way."""
        self.release.empty_all()
        reference = self.cluster.push("demo5")
        process.wait_until(lambda: time.sleep(0.2) or self.leader(), "a leader", 60)
        mark = self.cluster.registry.mark()
        self.create(prewarm("killed", reference))
        process.wait_until(lambda: any(self.blob_gets("demo5", mark)), "a layer to be fetched", 30)
        leader = self.leader()
        self.kubectl("delete", "pod", leader, "--namespace", NAMESPACE, "--force", "--grace-period=0")
        begin = time.monotonic()
        process.wait_until(lambda: time.sleep(0.2) or self.leader() not in ("", leader), "another leader", 60)
        say(f"another replica led {time.monotonic() - begin:.1f} s after {leader} was deleted")
        self.wait_phase("killed", "Ready", 90)
        self.assertLessEqual(sum(self.blob_gets("demo5", mark)), 5 + 2)
        self.read_everywhere("demo5", reference, self.cluster.registry.mark())

    def test_what_is_wrong_is_said(self):
        """A wrong secret, and an image that is not there: conditions and events; a right secret makes it good."""
        reference = self.push_private("small")
        self.create(prewarm("wrong", reference, backoffLimit=0, imagePullSecrets=[{"name": "wrong"}]),
                    prewarm("missing", f"{REGISTRY}/e2e/nosuch:1", backoffLimit=0),
                    prewarm("right", reference, imagePullSecrets=[{"name": "right"}]))
        for name, reason, words in (("wrong", "Unauthorized", "check the pull secret"), ("missing", "NotFound", "not found")):
            status, why, message = self.condition(self.wait_phase(name, "Failed"), "Ready")
            self.assertEqual((status, why), ("False", reason))
            self.assertIn(words, message)
            warnings = self.warnings(name)
            self.assertTrue(any(why == reason and words in said for why, said in warnings), warnings)
        self.wait_phase("right", "Ready")
        # What is warm is no right to read it.
        self.create(pod("anonymous", node=NODES[0], image=reference))
        self.wait_event("anonymous", PRIVATE_REGISTRY, "credentials")
        self.run_pod("entitled", node=NODES[0], image=reference, secret="right")
        self.assertEqual(self.exec("entitled", "cat", "/mnt/hello"), "hello\n")

    def test_a_deployment_is_warm_before_it_has_pods(self):
        """A Deployment of no replicas is found, and warmed on both nodes; when it is scaled up, its pods read without a blob from the registry."""
        self.release.upgrade({"prewarm": {"enabled": True, "discovery": {"enabled": True}, "pullSecrets": {"namespaces": ["default"]}}})
        self.release.empty_all()
        reference = self.cluster.push("demo5")
        of_pod = pod("web", image=reference)
        spec = {it: value for it, value in of_pod["spec"].items() if it != "restartPolicy"}
        labels = of_pod["metadata"]["labels"]
        following = prewarm("web", parallelism="100%", workloads={"selector": {"matchLabels": labels}})
        del following["spec"]["images"]
        self.create({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "default", "labels": labels},
                     "spec": {"replicas": 0, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": spec}}}, following)
        self.cluster.wait(PREWARMS, "web", lambda it: it and it.get("status", {}).get("imagesSeeded") == "1/1" and it["status"]["phase"] == "Ready", "the Deployment's image to be warm", 60)
        self.assertEqual(self.cluster.get(f"{PREWARMS}/web")["status"]["nodesReady"], "2/2")
        mark = self.cluster.registry.mark()
        asked = lambda: [self.metric(node, "registry_requests_total", op=op) for node in NODES for op in ("blob", "config")]
        before = asked()
        begin = time.monotonic()
        self.kubectl("scale", "deployment", "web", "--replicas=3")
        self.kubectl("rollout", "status", "deployment", "web", "--timeout=60s")
        say(f"three pods were ready {time.monotonic() - begin:.1f} s after the Deployment was scaled up")
        for it in self.cluster.get("api/v1/namespaces/default/pods", labelSelector="app=web")["items"]:
            self.assert_files(it["metadata"]["name"], "demo5")
        self.assertEqual((sum(self.blob_gets("demo5", mark)), asked()), (0, before))
