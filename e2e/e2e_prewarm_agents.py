"""Pre-warming by a real API server, real controllers and many real agents, as processes of this machine: no kubelet, no pods.

RBAC and the admission policy are the chart's, and the tokens are what kubelet gets for pods on nodes.
"""

import json
import pathlib
import time
import urllib.error
import urllib.request

import images
import yaml
from cluster import containers
from cluster.case import docker_config
from cluster.release import secret
from harness import dashboard, driver, paths, process, prometheus, services
from harness.environment import Case
from harness.kube_objects import APPLY, collection
from harness.process import say

NAMESPACE, TEAM = "clip-csi", "team"
CHART = paths.REPO / "deploy/helm/clip-csi"
GRANTS = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ServiceAccount", "CustomResourceDefinition", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
PREWARMS = f"/apis/clip-csi.dev/v1alpha1/namespaces/{TEAM}/imageprewarms"
CACHES = "/apis/clip-csi.dev/v1alpha1/nodeimagecaches"
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/clip-csi-prewarm"
DRIVER = "csi.clip-csi.dev"
# How long an agent waits after its first word until it begins anything (src/prewarm/agent/queue.rs).
UNCOUNTED_SECONDS = 5
WORKLOADS = {"Pod": "v1", "Deployment": "apps/v1", "StatefulSet": "apps/v1", "DaemonSet": "apps/v1", "Job": "batch/v1", "CronJob": "batch/v1"}
# What a case and its programs leave in the Kubernetes API.
LEFT = (PREWARMS[1:], CACHES[1:], "apis/clip-csi.dev/v1alpha1/imagerollouts", "api/v1/nodes", LEASE[1:].rpartition("/")[0], f"api/v1/namespaces/{TEAM}/events",
        *(collection(api, kind, namespace) for kind, api in WORKLOADS.items() for namespace in (TEAM, "default")))
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Agent:
    """`clip-csi agent --prewarm` of a node."""

    def __init__(self, case: "PrewarmCase", node: str, toml: pathlib.Path | None):
        self.toml = toml
        self.directory = case.work / node
        self.directory.mkdir()
        (self.directory / "run").mkdir(mode=0o700)
        self.node, self.case = node, case
        self.kubeconfig = case.api.kubeconfig_of(node, case.api.token(NAMESPACE, "clip-csi-node", node))
        self.start()

    def start(self) -> None:
        self.port = process.free_port()
        self.server = process.Server(
            [paths.binary(), "agent", "--run-dir", self.directory / "run", "--cache-dir", self.directory / "cache", "--config", self.toml or self.case.toml, "--node-id", self.node, "--prewarm",
             "--kubeconfig", self.kubeconfig, "--metrics-addr", f"127.0.0.1:{self.port}", *self.case.options()], stdout=self.directory / "log")
        self.server.wait_ready(lambda: process.listens(self.port), f"agent of {self.node}")

    def metric(self, name: str, **labels: str) -> float:
        return driver.metric(services.metrics(self.port), name, **labels)

    def layers(self) -> int:
        """Layers that its disk has."""
        return len(list((self.directory / "cache/layers").glob("*/data")))


class Controller:
    def __init__(self, case: "PrewarmCase", name: str):
        self.name, self.port = name, process.free_port()
        self.log = case.work / f"{name}.log"
        self.server = process.Server(
            [paths.binary(), "prewarm-controller", "--lease-namespace", NAMESPACE, "--identity", name, "--config", case.toml, "--cache-dir", case.work / f"{name}-cache",
             "--kubeconfig", case.controller_kubeconfig, "--metrics-addr", f"127.0.0.1:{self.port}", *case.options()], stdout=self.log)
        self.server.wait_ready(lambda: process.listens(self.port), f"controller {name}")

    def metric(self, name: str, **labels: str) -> float:
        return driver.metric(services.metrics(self.port), name, **labels)

    def is_ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5).status == 200
        except urllib.error.HTTPError:
            return False


def rendered(discovery: bool) -> list[dict]:
    """What the chart grants for pre-warming."""
    helm = containers.tools() / "helm"
    prewarm = {"enabled": True, "pullSecrets": {"namespaces": [TEAM]}, "discovery": {"enabled": discovery}}
    values = {"image": {"registry": "r"}, "prewarm": prewarm, "agent": {"events": {"enabled": False}}}
    text = process.run(helm, "template", "clip-csi", CHART, "--namespace", NAMESPACE, "--kube-version", "1.36.0", "--values", "/dev/stdin", stdin=json.dumps(values)).stdout
    return [it for it in yaml.safe_load_all(text) if it and it["kind"] in GRANTS]


class PrewarmCase(Case):
    N_AGENTS = 0
    remote = True
    discovery = False

    def setUp(self):
        super().setUp()
        self.api = self.env.api_server()
        self.addCleanup(self.api.clear, *LEFT)
        for namespace in (NAMESPACE, TEAM):
            self.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        self.api.apply(*rendered(self.discovery))
        self.store = self.redis() if self.remote else None
        self.toml = self.toml_with()
        self.controller_kubeconfig = self.api.kubeconfig_of("prewarm", self.api.token(NAMESPACE, "clip-csi-prewarm"))
        self.agents = [self.agent(f"n{number:02}") for number in range(self.N_AGENTS)]
        self.addCleanup(self.show_logs)

    def toml_with(self, name="config.toml", **sections) -> pathlib.Path:
        remote = {"redis": self.store, "key_file": self.work / "key"} if self.remote else {}
        return self.config(name, **remote, **sections)

    def agent(self, node: str, toml: pathlib.Path | None = None) -> Agent:
        self.api.node(node)
        return self.start_agent(node, toml)

    def start_agent(self, node: str, toml: pathlib.Path | None = None) -> Agent:
        """On a node that is there."""
        agent = Agent(self, node, toml)
        # Before the directory goes, and whatever it is at.
        self.addCleanup(lambda: agent.server.kill())
        return agent

    def controller(self, name: str) -> Controller:
        it = Controller(self, name)
        self.addCleanup(lambda: it.server.kill())
        return it

    def show_logs(self) -> None:
        outcome = self._outcome.result
        if any(getattr(it, "test_case", it) is self for it, _ in [*outcome.failures, *outcome.errors]):
            for log in [*self.work.glob("*.log"), *self.work.glob("n*/log")]:
                print(f"--- {log.name} of {log.parent.name}:\n{driver.last_lines(log, 25)}", flush=True)

    def options(self) -> list[str]:
        return ["--discover"] if self.discovery else []

    # --- objects ---

    def prewarm(self, name: str, *references: str, **spec) -> str:
        """Makes an ImagePrewarm; its path."""
        self.api.do("POST", PREWARMS, {"apiVersion": "clip-csi.dev/v1alpha1", "kind": "ImagePrewarm", "metadata": {"name": name},
                                       "spec": {**({"images": [{"image": it} for it in references]} if references else {}), **spec}})
        return f"{PREWARMS}/{name}"

    def change(self, path: str, **spec) -> None:
        self.api.do("PATCH", path, {"spec": spec}, "application/merge-patch+json")

    def wait_phase(self, path: str, *phases: str, seconds: float = 90) -> dict:
        return self.api.wait(path, lambda it: it and it.get("status", {}).get("phase") in phases and it["status"]["observedGeneration"] == it["metadata"]["generation"],
                             f"{path} to be {phases}", seconds)

    def condition(self, it: dict, name: str) -> dict:
        return next(condition for condition in it["status"]["conditions"] if condition["type"] == name)

    def events(self, name: str) -> list[tuple[str, str, str]]:
        found = self.api.get(f"/api/v1/namespaces/{TEAM}/events")["items"]
        return [(it["type"], it["reason"], it["message"]) for it in found if it["involvedObject"]["name"] == name]

    def leader(self) -> str:
        status, lease = self.api.request("GET", LEASE)
        return lease["spec"].get("holderIdentity") or "" if status == 200 else ""


class PrewarmFleet(PrewarmCase):
    N_AGENTS = 16

    def test_each_layer_is_fetched_once_for_all_nodes_and_a_new_one_is_warmed(self):
        """Sixteen nodes, one registry read of each layer, no read by a node; a node that joins later; a restart repeats nothing."""
        controller = self.controller("c1")
        reference = self.env.push("demo5")
        mark = self.registry.mark()
        begin = time.monotonic()
        path = self.prewarm("demo", reference, parallelism="50%")
        it = self.wait_phase(path, "Ready")
        say(f"{self.N_AGENTS} nodes were warm {time.monotonic() - begin:.1f} s after the object was made")
        status = it["status"]
        self.assertEqual((status["imagesSeeded"], status["nodesReady"], status["admittedPermille"]), ("1/1", "16/16", 1000))
        self.assertEqual({condition["type"]: condition["status"] for condition in status["conditions"]}, {"Seeded": "True", "Distributed": "True", "Ready": "True"})
        self.assertEqual(self.layer_gets("demo5", mark), [1] * 5)
        for agent in self.agents:
            self.assertEqual(agent.metric("registry_read_bytes_total"), 0, agent.node)
            self.assertEqual(agent.metric("prewarm_bytes_total", tier="registry"), 0, agent.node)
            self.assertGreater(agent.metric("prewarm_bytes_total", tier="content_cache"), 0, agent.node)
            self.assertEqual(agent.layers(), 5, agent.node)
        self.assertEqual(sorted(reason for _, reason, _ in self.events("demo")), ["Ready", "Seeded"])
        caches = {it["metadata"]["name"]: it for it in self.api.get(CACHES)["items"]}
        self.assertEqual(sorted(caches), [agent.node for agent in self.agents])
        cache = caches["n00"]
        self.assertEqual((cache["status"]["warmupsReady"], cache["metadata"]["ownerReferences"][0]["kind"]), ("1/1", "Node"))
        table = self.api.kubectl("--namespace", TEAM, "get", "ipw").splitlines()
        self.assertEqual(table[0].split()[:6], ["NAME", "PHASE", "SEEDED", "NODES", "FAILED", "REASON"])
        self.assertEqual(table[1].split()[:6], ["demo", "Ready", "1/1", "16/16", "0", "Ready"])
        writes = sum(agent.metric("prewarm_api_writes_total") for agent in self.agents)
        say(f"writes to the API: {controller.metric('prewarm_api_writes_total'):.0f} of the controller, {writes:.0f} of {self.N_AGENTS} agents")
        self.assertLessEqual(writes, 6 * self.N_AGENTS)

        joined = self.agent("n90")
        self.api.wait(path, lambda it: it and it["status"]["nodesReady"] == "17/17", "the node that joined to be warm")
        self.assertEqual(joined.metric("registry_read_bytes_total"), 0)
        self.assertEqual(self.layer_gets("demo5", mark), [1] * 5)

        first = self.agents[0]
        first.server.kill()
        first.start()
        # Longer than it waits until it is counted.
        time.sleep(UNCOUNTED_SECONDS + 3)
        self.assertEqual(first.metric("prewarm_warmups_total"), 0, "what was warmed is not warmed again")
        self.assertEqual(self.api.get(path)["status"]["nodesReady"], "17/17")


class PrewarmPanels(PrewarmCase):
    N_AGENTS = 2

    def test_every_panel_of_prewarming_has_data(self):
        """A real Prometheus scrapes agents and controller; each query of the dashboard about pre-warming returns something."""
        controller = self.controller("c1")
        addresses = {agent.node: f"127.0.0.1:{agent.port}" for agent in self.agents}
        watching = prometheus.Prometheus(self.work, addresses, controllers={"n00": f"127.0.0.1:{controller.port}"}, scrape_interval="1s")
        self.addCleanup(watching.stop)
        process.wait_until(lambda: time.sleep(0.2) or watching.targets_up() == 3, "all to be scraped", 30)
        begin = time.time()
        self.wait_phase(self.prewarm("demo", self.env.push("demo5"), parallelism="100%"), "Ready")
        panels = [it for it in dashboard.panels(dashboard.load(), rate_interval="10s") if any("clip_csi_prewarm_" in query.expr for query in it.queries)]
        self.assertGreaterEqual(len(panels), 6)
        queries = [query for it in panels for query in it.queries]
        # A metric that is not there is as empty as one that nobody counts, so that each query is looked at by itself.
        without = lambda: [it.expr for it in queries if not watching.query_range(it.expr, begin, time.time(), 1)]
        process.wait_until(lambda: time.sleep(0.5) or not without(), f"data for all of them; now there is none for {without()}", 30)
        nodes = next(it for it in queries if "prewarm_nodes" in it.expr)
        newest = lambda: {it["metric"]["warmup"]: it["value"][1] for it in watching.query(nodes.expr)}
        both_ready = {"pending": "0", "warming": "0", "ready": "2", "failed": "0"}
        # Prometheus knows what it scraped last, which may be from before the last node was ready.
        process.wait_until(lambda: time.sleep(0.2) or newest() == both_ready, f"Prometheus to show {both_ready}", 30)


class PrewarmLeading(PrewarmCase):
    N_AGENTS = 3

    def test_a_killed_leader_is_followed_and_nothing_is_read_twice(self):
        """The leader dies in the middle of seeding; another replica goes on, and no layer that was seeded is read again."""
        # So slow that it is under way when the leader dies: the blobs of demo5 have 51 MB, and its progress is told every ten seconds.
        fast, self.toml = self.toml, self.toml_with("slow.toml", prewarm={"bytes_per_second": 3_000_000, "parallel_images": 1})
        first = self.controller("c1")
        process.wait_until(lambda: self.leader() == "c1", "c1 to lead")
        self.toml = fast
        second = self.controller("c2")
        reference = self.env.push("demo5")
        mark = self.registry.mark()
        path = self.prewarm("demo", reference)
        self.api.wait(path, lambda it: it and it.get("status", {}).get("images", [{}])[0].get("blobBytesDone", 0) > 5e6, "some bytes to be seeded", 30)
        first.server.kill()
        begin = time.monotonic()
        process.wait_until(lambda: time.sleep(0.1) or self.leader() == "c2", "c2 to lead", 40)
        say(f"c2 led {time.monotonic() - begin:.1f} s after c1 was killed")
        self.wait_phase(path, "Ready", seconds=120)
        gets = self.layer_gets("demo5", mark)
        self.assertLessEqual(sum(gets), 5 + 2, f"only layers that were under way are read again: {gets}")
        self.assertGreater(second.metric("prewarm_seed_attempts_total", outcome="ok"), 0)
        # One that is asked to end lets the other lead at once.
        third = self.controller("c3")
        begin = time.monotonic()
        self.assertEqual(second.server.stop(), 0)
        process.wait_until(lambda: time.sleep(0.1) or self.leader() == "c3", "c3 to lead", 40)
        self.assertLess(time.monotonic() - begin, 8)
        self.assertTrue(third.is_ready())


class PrivateCase(PrewarmCase):
    """With a registry that asks for a password."""

    N_AGENTS = 2

    def setUp(self):
        htpasswd = process.run("htpasswd", "-Bbn", "user", "right-password").stdout
        super().setUp()
        self.private = services.Registry(self.work, self.env.work / "registry", htpasswd=htpasswd, name="private")
        self.addCleanup(self.private.stop)

    def private_image(self) -> str:
        self.env.push("small")
        self.toml.write_text(f"{self.toml.read_text()}[registry.hosts.\"{self.private.host}\"]\nplain_http = true\n")
        return f"{self.private.host}/e2e/small:{images.TAG}"

    def secret(self, name: str, password: str) -> None:
        it = secret(name, TEAM, **{".dockerconfigjson": docker_config(self.private.host, "user", password)})
        self.api.apply({**it, "type": "kubernetes.io/dockerconfigjson"})


class PrewarmFaults(PrivateCase):
    def test_what_is_wrong_is_said(self):
        """A wrong secret, none, one that is not there, an image that is not there, a name that is none: conditions and events say so, and what is made good goes on."""
        reference = self.private_image()
        controller = self.controller("c1")
        self.secret("wrong", "wrong-password")
        self.api.apply(secret("opaque", TEAM, password="x"))
        spec = lambda *secrets: {"imagePullSecrets": [{"name": it} for it in secrets], "backoffLimit": 0}
        cases = {
            "wrong": (reference, spec("wrong"), "Unauthorized", "check the pull secret"),
            "none": (reference, spec(), "Unauthorized", "give a pull secret"),
            "nosuch": (reference, spec("nosuch"), "SecretNotFound", "make it"),
            "opaque": (reference, spec("opaque"), "SecretInvalid", "not kubernetes.io/dockerconfigjson"),
            "missing": (f"{self.registry.host}/e2e/nosuch:1", spec(), "NotFound", "not found"),
            "badname": ("UPPER/case:1:2", spec(), "InvalidImage", "UPPER"),
        }
        made = {name: self.prewarm(name, image, **fields) for name, (image, fields, _, _) in cases.items()}
        for name, (_, _, reason, words) in cases.items():
            with self.subTest(name):
                it = self.wait_phase(made[name], "Failed")
                ready = self.condition(it, "Ready")
                self.assertEqual((ready["status"], ready["reason"]), ("False", reason), ready)
                self.assertIn(words, ready["message"])
                self.assertIn("change the spec to have it tried again", ready["message"])
                self.assertEqual(it["status"]["admittedPermille"], 0)
                told = self.events(name)
                self.assertEqual({(kind, why) for kind, why, _ in told}, {("Warning", reason)})
                self.assertIn(words, told[0][2])
        # No node was bothered.
        self.assertEqual(self.api.get(CACHES)["items"][0]["status"].get("warmups", []), [])
        self.secret("wrong", "right-password")
        self.change(made["wrong"], backoffLimit=1)
        self.wait_phase(made["wrong"], "Ready")
        # The first secret may be of no use if another one is.
        both = self.prewarm("both", reference, **spec("opaque2", "wrong"))
        self.assertEqual(self.condition(self.wait_phase(both, "Failed"), "Ready")["reason"], "SecretNotFound")
        text = controller.log.read_text() + json.dumps([self.api.get(it) for it in made.values()])
        for private in ("right-password", "wrong-password"):
            self.assertNotIn(private, text)

    def test_a_node_writes_about_itself_alone(self):
        """RBAC and the admission policy: no other node's object, no Secret, no status of an ImagePrewarm."""
        process.wait_until(lambda: len(self.api.get(CACHES)["items"]) == 2, "the agents' objects")
        token = self.api.token(NAMESPACE, "clip-csi-node", "n00")
        body = lambda node: {"apiVersion": "clip-csi.dev/v1alpha1", "kind": "NodeImageCache", "metadata": {"name": node}, "status": {"warmupsReady": "9/9"}}
        ask = lambda method, path, body=None, kind=APPLY: self.api.request(method, path, body, kind, token)[0]
        self.assertEqual(ask("PATCH", f"{CACHES}/n00/status?fieldManager=e2e&force=true", body("n00")), 200)
        # A policy takes some seconds to be in force everywhere.
        process.wait_until(lambda: time.sleep(0.2) or ask("PATCH", f"{CACHES}/n01/status?fieldManager=e2e&force=true", body("n01")) == 403, "the policy to be in force", 30)
        for node in ("n01", "n02"):
            status, answer = self.api.request("PATCH", f"{CACHES}/{node}?fieldManager=e2e&force=true", {**body(node), "status": {}}, APPLY, token)
            self.assertEqual(status, 403, answer)
            self.assertIn("an agent writes the NodeImageCache of its own node alone", answer["message"])
        unbound = self.api.token(NAMESPACE, "clip-csi-node")
        self.assertEqual(self.api.request("PATCH", f"{CACHES}/n00/status?fieldManager=e2e&force=true", body("n00"), APPLY, unbound)[0], 403)
        path = self.prewarm("any", "r/i:1", suspend=True)
        for method, what in (("GET", f"/api/v1/namespaces/{TEAM}/secrets"), ("GET", f"/api/v1/namespaces/{TEAM}/secrets/x"), ("DELETE", path), ("DELETE", f"{CACHES}/n00")):
            self.assertEqual(ask(method, what), 403, what)
        self.assertEqual(ask("PATCH", f"{path}/status", {"status": {}}, "application/merge-patch+json"), 403)
        controller = self.api.token(NAMESPACE, "clip-csi-prewarm")
        for what in ("secrets", "configmaps", "pods"):
            self.assertEqual(self.api.request("GET", f"/api/v1/namespaces/{TEAM}/{what}", token=controller)[0], 403, what)
        self.assertEqual(self.api.request("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/x", token=controller)[0], 403)


class PrewarmBounds(PrewarmCase):
    def test_a_full_disk_and_a_dead_remote_are_said(self):
        """A node whose disk is too small fails alone, and says so; a remote that is away is waited for, and then all goes on."""
        small = self.toml_with("small.toml", cache={"max_bytes": 60_000_000})
        agents = [self.agent("n00"), self.agent("n01", small)]
        self.controller("c1")
        it = self.wait_phase(self.prewarm("large", self.env.push("demo5"), parallelism="100%"), "Degraded")
        [failed] = it["status"]["failedNodes"]
        self.assertEqual((failed["node"], failed["reason"], it["status"]["nodesReady"]), ("n01", "NoSpace", "1/2"))
        self.assertIn("a larger disk or cache.max_bytes", failed["message"])
        self.assertEqual((self.condition(it, "Distributed")["reason"], self.condition(it, "Ready")["reason"]), ("NoSpace", "NoSpace"))
        self.assertIn(("Warning", "NoSpace"), [(kind, why) for kind, why, _ in self.events("large")])
        used = sum(file.stat().st_blocks * 512 for file in (agents[1].directory / "cache").rglob("*") if file.is_file())
        self.assertLess(used, 60_000_000)

        port = self.store.port
        self.store.kill()
        path = self.prewarm("away", self.env.push("small"))
        self.api.wait(path, lambda it: it and it.get("status", {}).get("images", [{}])[0].get("reason") == "RemoteDown", "the controller to miss the remote")
        it = self.api.get(path)
        self.assertIn("see that it runs", self.condition(it, "Seeded")["message"])
        self.assertIn("retryAt", it["status"]["images"][0])
        self.assertIn(("Warning", "RemoteDown"), [(kind, why) for kind, why, _ in self.events("away")])
        self.redis(port=port)
        self.wait_phase(path, "Ready")


class PrewarmStopping(PrewarmCase):

    def setUp(self):
        super().setUp()
        # A node takes a minute for an image of 150 MB.
        slow = self.toml_with("slow.toml", prewarm={"bytes_per_second": 3_000_000})
        self.agents = [self.agent(node, slow) for node in ("n00", "n01")]
        self.controller("c1")

    def under_way(self, name: str, **spec) -> str:
        path = self.prewarm(name, self.env.push("demo5"), parallelism="100%", **spec)
        self.api.wait(path, lambda it: it and it.get("status", {}).get("nodes", {}).get("warming") == 2, "both nodes to be at it")
        return path

    def active(self) -> list[float]:
        return [agent.metric("prewarm_queue", warmup="warming") for agent in self.agents]

    def test_deletion_suspension_and_deadline_stop_work_at_once(self):
        """Nodes stop within seconds; what was suspended goes on where it was."""
        path = self.under_way("deleted")
        self.api.do("DELETE", path)
        process.wait_until(lambda: time.sleep(0.2) or self.active() == [0, 0], "both agents to stop", 5)
        process.wait_until(lambda: time.sleep(0.2) or all(not it["status"].get("warmups") for it in self.api.get(CACHES)["items"]), "nobody to tell of it", 10)

        path = self.under_way("suspended")
        self.change(path, suspend=True)
        it = self.wait_phase(path, "Suspended", seconds=10)
        self.assertEqual((self.condition(it, "Ready")["reason"], it["status"]["admittedPermille"]), ("Suspended", 0))
        process.wait_until(lambda: time.sleep(0.2) or self.active() == [0, 0], "both agents to stop", 5)
        self.change(path, suspend=False)
        self.api.wait(path, lambda it: it and it["status"]["nodes"]["warming"] == 2, "both nodes to be at it again")
        self.api.do("DELETE", path)

        path = self.under_way("late", activeDeadlineSeconds=8)
        it = self.wait_phase(path, "Failed", seconds=20)
        self.assertEqual(self.condition(it, "Ready")["reason"], "DeadlineExceeded")
        process.wait_until(lambda: time.sleep(0.2) or self.active() == [0, 0], "both agents to stop", 5)

    def test_an_object_goes_after_its_time(self):
        """ttlSecondsAfterFinished, for the remote content cache alone."""
        path = self.prewarm("short", self.env.push("small"), target="Remote", ttlSecondsAfterFinished=3)
        it = self.wait_phase(path, "Ready")
        self.assertEqual(it["status"]["nodes"]["desired"], 0)
        self.api.wait(path, lambda it: it is None, "the object to be deleted", 15)

    def test_a_node_whose_taint_goes_is_warmed_soon(self):
        """A node that comes up has taints that go within a minute: those of Kubernetes, and the driver's own."""
        path = self.prewarm("any", self.env.push("small"), parallelism="100%")
        self.wait_phase(path, "Ready")
        self.api.node("n02")
        taint = lambda *taints: self.api.do("PATCH", "/api/v1/nodes/n02", {"spec": {"taints": [{"key": it, "effect": "NoSchedule"} for it in taints]}}, "application/merge-patch+json")
        taint("node.kubernetes.io/not-ready")
        late = self.start_agent("n02")
        process.wait_until(lambda: time.sleep(0.2) or len(self.api.get(CACHES)["items"]) == 3, "its object", 30)
        self.assertEqual(self.api.get(path)["status"]["nodesReady"], "2/2")
        taint()
        self.api.wait(path, lambda it: it["status"]["nodesReady"] == "3/3", "the node to be warmed", 40)
        self.assertEqual(late.metric("prewarm_warmups_total", outcome="ok"), 1)

    def test_a_dead_node_holds_up_nobody(self):
        """A node whose kubelet is gone is not waited for; one whose agent alone is gone keeps its place for a minute at most."""
        self.agents[0].server.kill()
        self.api.node("n00", ready=False)
        path = self.prewarm("one", self.env.push("small"), parallelism=1)
        it = self.wait_phase(path, "Ready")
        self.assertEqual(it["status"]["nodesReady"], "1/1")


class PrewarmAlone(PrewarmCase):
    N_AGENTS = 2
    remote = False

    def test_without_a_remote_nodes_go_to_the_registry(self):
        """No remote content cache: the digest is resolved once, each node reads the registry with its own credentials, and a condition says so."""
        self.controller("c1")
        mark = self.registry.mark()
        path = self.prewarm("demo", self.env.push("demo1"))
        it = self.wait_phase(path, "Ready")
        seeded = self.condition(it, "Seeded")
        self.assertEqual((seeded["status"], seeded["reason"]), ("False", "NoRemote"))
        self.assertIn("set remote.kind", seeded["message"])
        self.assertEqual(it["status"]["images"][0]["state"], "Resolved")
        self.assertEqual(self.layer_gets("demo1", mark), [2])


def place(kind: str, name="", namespace: str = TEAM) -> str:
    return f"/{collection(WORKLOADS[kind], kind, namespace)}{'/' * bool(name)}{name}"


def workload(kind: str, name: str, image: str, *, secret: str | None = None, labels: dict | None = None, node: str | None = None) -> dict:
    """A workload of the kind, with a volume of the image; of what makes pods, for no pod."""
    csi = {"driver": DRIVER, "volumeAttributes": {"image": image}, **({"nodePublishSecretRef": {"name": secret}} if secret else {})}
    spec = {"containers": [{"name": "c", "image": "none"}], "volumes": [{"name": "v", "csi": csi}]}
    template = {"metadata": {"labels": {"app": name}}, "spec": spec}
    of_kind = {
        "Pod": {**spec, **({"nodeName": node} if node else {})},
        "Job": {"suspend": True, "template": {"spec": {**spec, "restartPolicy": "Never"}}},
        "CronJob": {"schedule": "@yearly", "jobTemplate": {"spec": {"template": {"spec": {**spec, "restartPolicy": "Never"}}}}},
    }
    makes = {"selector": {"matchLabels": {"app": name}}, "template": template, **({"replicas": 0} if kind != "DaemonSet" else {}), **({"serviceName": "s"} if kind == "StatefulSet" else {})}
    return {"apiVersion": WORKLOADS[kind], "kind": kind, "metadata": {"name": name, "labels": labels or {}}, "spec": of_kind.get(kind, makes)}


class PrewarmWorkloads(PrivateCase):
    """What workloads use, by the rights that the chart gives for that."""

    discovery = True

    def make(self, kind: str, name: str, image: str, namespace: str = TEAM, **more) -> str:
        self.api.do("POST", place(kind, namespace=namespace), workload(kind, name, image, **more))
        return place(kind, name, namespace)

    def tags(self, reference: str, *tags: str) -> list[str]:
        """The image under further tags."""
        name, _, tag = reference.rpartition(":")
        host, _, repository = name.partition("/")
        at = lambda tag: f"http://{host}/v2/{repository}/manifests/{tag}"
        manifest = urllib.request.urlopen(urllib.request.Request(at(tag), headers={"Accept": MANIFEST}), timeout=10).read()
        for tag in tags:
            urllib.request.urlopen(urllib.request.Request(at(tag), manifest, {"Content-Type": MANIFEST}, method="PUT"), timeout=10)
        return [f"{name}:{tag}" for tag in tags]

    def wait_images(self, path: str, *references: str) -> dict:
        """Waits until the object has exactly these images, and is ready."""
        is_so = lambda it: it and [image["image"] for image in it.get("status", {}).get("images", [])] == sorted(references) and it["status"]["phase"] == "Ready"
        return self.api.wait(path, is_so, f"{path} to be ready with {references}")

    def test_what_workloads_use_is_warm_before_there_are_pods_and_leaves_with_them(self):
        """A Deployment of no replicas: its image is read once, and is on all nodes; the next one joins it; a deleted one leaves the status, and no node is bothered."""
        self.controller("c1")
        path = self.prewarm("all", workloads={})
        it = self.wait_phase(path, "Ready")
        self.assertEqual([self.condition(it, name)["reason"] for name in ("Seeded", "Distributed", "Ready")], ["NoWorkloads"] * 3)
        self.assertNotIn("nodeBytesPerSecond", it["status"])
        demo, small = self.env.push("demo1"), self.env.push("small")
        mark = self.registry.mark()
        begin = time.monotonic()
        web = self.make("Deployment", "web", demo)
        it = self.wait_images(path, demo)
        say(f"both nodes were warm {time.monotonic() - begin:.1f} s after the Deployment was made")
        self.assertEqual((it["status"]["imagesSeeded"], it["status"]["nodesReady"]), ("1/1", "2/2"))
        self.assertEqual(self.layer_gets("demo1", mark), [1])
        self.assertEqual([agent.layers() for agent in self.agents], [1, 1])
        self.make("CronJob", "nightly", small)
        # Of another namespace, and of another driver: no business of this object.
        self.make("Deployment", "web", f"{self.registry.host}/e2e/nosuch:1", "default")
        it = self.wait_images(path, demo, small)
        self.assertEqual(it["status"]["nodesReady"], "2/2")
        self.assertEqual([agent.metric("registry_read_bytes_total") for agent in self.agents], [0, 0])
        warmups = [agent.metric("prewarm_warmups_total", outcome="ok") for agent in self.agents]
        self.api.do("DELETE", web)
        left = self.wait_images(path, small)
        self.assertEqual(left["status"]["revision"], it["status"]["revision"])
        time.sleep(3)
        self.assertEqual([agent.metric("prewarm_warmups_total", outcome="ok") for agent in self.agents], warmups, "nobody is asked again")

    def test_all_kinds_count_and_a_selector_chooses(self):
        """Pods and all that makes pods, by their own labels; a pod that has ended, or that a template makes, does not count."""
        self.controller("c1")
        tags = self.tags(self.env.push("small"), *(kind.lower() for kind in WORKLOADS), "ended", "made")
        by_kind = dict(zip(WORKLOADS, tags))
        for kind, image in by_kind.items():
            self.make(kind, kind.lower(), image, labels={"kind": kind})
        ended = self.make("Pod", "ended", tags[-2])
        self.api.do("PATCH", f"{ended}/status", {"status": {"phase": "Succeeded"}}, "application/merge-patch+json")
        owner = self.api.get(place("StatefulSet", "statefulset"))["metadata"]["uid"]
        made = workload("Pod", "made", tags[-1])
        made["metadata"]["ownerReferences"] = [{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "statefulset", "uid": owner, "controller": True}]
        self.api.do("POST", place("Pod"), made)
        everything = self.prewarm("everything", target="Remote", workloads={"selector": {}})
        some = self.prewarm("some", target="Remote", workloads={"selector": {"matchExpressions": [{"key": "kind", "operator": "In", "values": ["Job", "Pod"]}]}})
        one = self.prewarm("one", by_kind["Job"], target="Remote", workloads={"selector": {"matchLabels": {"kind": "DaemonSet"}}})
        self.wait_images(everything, *by_kind.values())
        self.wait_images(some, by_kind["Job"], by_kind["Pod"])
        it = self.wait_phase(one, "Ready")
        self.assertEqual([image["image"] for image in it["status"]["images"]], [by_kind["Job"], by_kind["DaemonSet"]])

    def test_volumes_secrets_are_used_and_what_has_no_room_is_said(self):
        """nodePublishSecretRef, with user and password or a docker config; without one, and with another one later; 33 images and more."""
        small = self.env.push("small")
        reference = self.private_image()
        controller = self.controller("c1")
        path = self.prewarm("all", target="Remote", backoffLimit=0, workloads={})
        web = self.make("Deployment", "web", reference, secret="user")
        it = self.wait_phase(path, "Failed")
        self.assertEqual(self.condition(it, "Ready")["reason"], "SecretNotFound")
        self.api.apply(secret("other", TEAM, username="user", password="right-password"))
        self.api.do("PATCH", web, {"spec": {"template": {"spec": {"volumes": [{"name": "v", "csi": {"driver": DRIVER, "nodePublishSecretRef": {"name": "other"}}}]}}}}, "application/strategic-merge-patch+json")
        self.wait_phase(path, "Ready")
        self.api.do("DELETE", web)
        self.wait_images(path)
        self.secret("config", "right-password")
        self.make("Job", "once", reference, secret="config")
        self.wait_images(path, reference)
        self.assertNotIn("right-password", controller.log.read_text() + json.dumps(self.api.get(path)))

        tags = self.tags(small, *(f"t{at:02}" for at in range(40)))
        for at, image in enumerate(tags):
            self.make("Pod", f"p{at:02}", image, labels={"many": "yes"})
        many = self.prewarm("many", target="Remote", workloads={"selector": {"matchLabels": {"many": "yes"}}})
        it = self.wait_phase(many, "Degraded")
        self.assertEqual([image["image"] for image in it["status"]["images"]], tags[:32])
        ready = self.condition(it, "Ready")
        self.assertEqual(ready["reason"], "TooManyImages")
        self.assertIn("8 images that workloads name are left out", ready["message"])
        self.assertIn(("Warning", "TooManyImages"), [(kind, why) for kind, why, _ in self.events("many")])

    def test_a_pod_that_is_bound_has_its_image_filled_at_once(self):
        """target Remote: nothing is on nodes until a pod is bound to one of them, and then it is there alone; deletion stops it."""
        self.controller("c1")
        demo, large = self.env.push("demo1"), self.env.push("demo5")
        path = self.prewarm("remote", demo, target="Remote")
        self.wait_phase(path, "Ready")
        process.wait_until(lambda: len(self.api.get(CACHES)["items"]) == 2, "the agents' objects")
        here, there = self.agents
        self.make("Pod", "elsewhere", demo, "default", node=there.node)
        self.make("Pod", "unbound", demo)
        begin = time.monotonic()
        self.make("Pod", "bound", demo, node=here.node)
        process.wait_until(lambda: time.sleep(0.05) or here.metric("prewarm_pods_total", outcome="ok") == 1, f"{here.node} to fill", 20)
        say(f"a node had filled {time.monotonic() - begin:.1f} s after a pod was bound to it")
        self.assertEqual((here.layers(), there.layers()), (1, 0))
        self.assertEqual((here.metric("registry_read_bytes_total"), there.metric("prewarm_pods_total")), (0, 0))
        self.assertEqual([it["status"].get("warmups", []) for it in self.api.get(CACHES)["items"]], [[], []])
        it = self.api.get(path)
        self.assertEqual((it["status"]["phase"], it["status"]["nodes"]["desired"]), ("Ready", 0))
        # It takes this one some 50 seconds.
        slow = self.agent("n09", self.toml_with("slow.toml", prewarm={"bytes_per_second": 3_000_000}))
        path = self.prewarm("large", large, target="Remote")
        self.wait_phase(path, "Ready")
        self.make("Pod", "large", large, node=slow.node)
        process.wait_until(lambda: time.sleep(0.1) or "warming begins" in (slow.directory / "log").read_text(), "the slow node to begin", 20)
        self.api.do("DELETE", path)
        process.wait_until(lambda: time.sleep(0.1) or "warming is stopped" in (slow.directory / "log").read_text(), "the slow node to stop", 5)
        self.assertEqual(slow.metric("prewarm_pods_total"), 0)


class PrewarmUndiscovered(PrewarmCase):
    def test_it_is_said_that_nobody_looks_at_workloads(self):
        """The controller without --discover, by the rights that the chart then gives; and what the definition refuses."""
        self.controller("c1")
        path = self.prewarm("all", workloads={})
        it = self.wait_phase(path, "Failed")
        for name in ("Seeded", "Distributed", "Ready"):
            self.assertEqual(self.condition(it, name)["reason"], "DiscoveryOff")
        self.assertIn("prewarm.discovery.enabled", self.condition(it, "Ready")["message"])
        self.assertIn(("Warning", "DiscoveryOff"), [(kind, why) for kind, why, _ in self.events("all")])
        for spec, words in (
            ({}, "say what is to be warmed: images, or workloads"),
            ({"workloads": {}, "ttlSecondsAfterFinished": 1}, "what follows workloads has no end"),
            ({"workloads": {}, "activeDeadlineSeconds": 1}, "what follows workloads has no end"),
            ({"workloads": {"selector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}}, "In and NotIn have values"),
            ({"workloads": {"selector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}}}, "In and NotIn have values"),
            ({"workloads": {"selector": {"matchExpressions": [{"key": "a", "operator": "Like", "values": ["b"]}]}}}, "supported values"),
        ):
            status, answer = self.api.request("POST", PREWARMS, {"apiVersion": "clip-csi.dev/v1alpha1", "kind": "ImagePrewarm", "metadata": {"name": "bad"}, "spec": spec})
            self.assertEqual(status, 422, answer)
            self.assertIn(words, answer["message"])
