"""The cluster's cases: what a user of Kubernetes does with the driver, on a real one of two nodes."""

import unittest

from cluster.cluster import NODES, condition
from cluster.pods import pod
from harness import process
from harness.environment import Case


class ClusterCase(Case):
    def setUp(self):
        super().setUp()
        self.cluster = self.env.cluster()
        self.kubectl = self.cluster.kubectl

    def create(self, *objects: dict) -> None:
        """Objects that end with the test."""
        for it in objects:
            where = ["--namespace", it["metadata"]["namespace"]] if "namespace" in it["metadata"] else []
            self.addCleanup(self.kubectl, "delete", it["kind"], it["metadata"]["name"], *where, "--ignore-not-found", "--timeout=60s")
        self.cluster.apply(*objects)

    def run_pod(self, name: str, **settings) -> dict:
        """A pod that is ready; its object."""
        self.create(pod(name, **settings))
        return self.wait_ready(name)

    def wait_pod(self, name: str, done, what: str) -> dict:
        """The pod once `done` holds for it; at once a failure if it has failed before."""
        try:
            it = self.cluster.wait("api/v1/namespaces/default/pods", name, lambda it: it and (done(it) or it["status"].get("phase") == "Failed"), f"pod {name} to be {what}")
        except process.Failed as error:
            self.fail(f"{error}\n{self.kubectl('describe', 'pod', name).stdout}")
        if not done(it):
            self.fail(f"pod {name} is not {what}:\n{self.kubectl('describe', 'pod', name).stdout}")
        return it

    def wait_ready(self, name: str) -> dict:
        return self.wait_pod(name, lambda it: condition(it, "Ready"), "ready")

    def exec(self, name: str, *command) -> str:
        return self.kubectl("exec", name, "--", *command).stdout


class Platform(ClusterCase):
    def test_smoke(self):
        """The cluster without the driver: images from the registry, logs, exec, and pods that reach each other and the API server."""
        self.assertTrue(all(condition(node, "Ready") for node in self.cluster.get("nodes")["items"]))
        for node in NODES:
            self.create(pod(f"smoke-{node}", node=node, command=f"echo hello from {node}; echo {node} >/tmp/name; httpd -f -p 80 -h /tmp"))
        pods = {node: self.wait_ready(f"smoke-{node}") for node in NODES}
        for node, other in zip(NODES, reversed(NODES)):
            self.assertEqual(pods[node]["spec"]["nodeName"], node)
            self.assertEqual(self.kubectl("logs", f"smoke-{node}").stdout, f"hello from {node}\n")
            address = pods[other]["status"]["podIP"]
            self.assertEqual(self.exec(f"smoke-{node}", "wget", "-q", "-O", "-", f"http://{address}/name"), f"{other}\n")
            self.assertEqual(self.exec(f"smoke-{node}", "sh", "-c", "nc -w 5 10.96.0.1 443 </dev/null"), "")


# In this order: later cases find what earlier ones have put up, and each puts up what it lacks.
ORDER = [Platform]


def load_tests(loader, _tests, _pattern):
    return unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in ORDER)
