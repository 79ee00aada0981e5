"""The cluster's cases about rights: whose credentials a pod's volume is read with, and what a pod without any is told."""

import json
import shutil
import time

import images
from cluster.case import ClusterCase, docker_config
from cluster.cluster import ADDRESS, NODES, PRIVATE_REGISTRY, REGISTRY, condition
from cluster.pods import pod
from cluster.release import secret
from harness import driver, process, testregistry
from harness.process import say

N1, N2 = NODES[:2]
OURS, THEIRS = "rights-ours", "rights-theirs"
AUDIENCE = "registry.example"
# A registry that only a hosts.toml knows how to reach.
MIRRORED = "mirrored.example"
# The keys of layers' content in the remote content cache.
CHUNKS = "clip:*:o:*"


class Rights(ClusterCase):
    """With the ways to credentials that an operator has to allow, and a registry that knows users."""

    def setUp(self):
        super().setUp()
        self.release = self.env.release()
        plane = self.cluster.plane.machine
        layouts = {f"e2e/{name}": images.get(name).layout.directory for name in ("small", "demo1")}
        self.registry = testregistry.TestRegistry(self.work, layouts, where=plane, port=int(PRIVATE_REGISTRY.rpartition(":")[2]))
        self.addCleanup(self.registry.stop)
        self.reference = f"{PRIVATE_REGISTRY}/e2e/small:{images.TAG}"
        for namespace in (OURS, THEIRS):
            # They stay as long as the cluster: the rights that the chart grants are in them.
            self.cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
            accounts = f"api/v1/namespaces/{namespace}/serviceaccounts"
            self.cluster.wait(accounts, "default", lambda it: it is not None, "the ServiceAccount that pods need")
        self.upgrade()

    def upgrade(self) -> None:
        """The values that these cases are about; no other case has them."""
        if getattr(self.release, "has_rights", False) and self.release.installed and self.release.changed:
            return
        # All users may read them, as they may what is on a node.
        directory = self.cluster.work / "rights"
        shutil.rmtree(directory, ignore_errors=True)
        plugins, hosts = directory / "plugins", directory / "certs.d"
        plugins.mkdir(parents=True)
        shutil.copy(driver.csictl().with_name("credentialprovider"), plugins)
        provider = {"name": "credentialprovider", "matchImages": [PRIVATE_REGISTRY], "defaultCacheDuration": "1m", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                    "tokenAttributes": {"serviceAccountTokenAudience": AUDIENCE, "cacheType": "ServiceAccount", "requireServiceAccount": True}}
        config = directory / "providers.yaml"
        config.write_text(json.dumps({"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": [provider]}))
        (hosts / MIRRORED).mkdir(parents=True)
        (hosts / MIRRORED / "hosts.toml").write_text(f'server = "http://{REGISTRY}"\n[host."http://{ADDRESS}:5999"]\n')
        for it in (directory, *directory.rglob("*")):
            it.chmod(0o755 if it.is_dir() or it.parent == plugins else 0o644)
        over = {
            "csiDriver": {"tokenRequests": [{"audience": AUDIENCE}], "requiresRepublish": True},
            "registries": {"hostsDir": str(hosts), "credentialProviders": {"configFile": str(config), "binDir": str(plugins)},
                           "serviceAccountPullSecrets": {"enabled": True, "namespaces": [OURS, THEIRS]}},
        }
        begin = time.monotonic()
        if self.release.installed:
            self.release.upgrade(over)
        else:
            self.release.install(over)
        self.release.has_rights = True
        say(f"the driver had its new values after {time.monotonic() - begin:.1f} s")

    def lets_in(self, *users: str, **settings) -> None:
        self.registry.set(users={f"{user}:hunter2": ["e2e/small", "e2e/demo1"] for user in users}, **settings)

    def secret_of(self, user: str, namespace: str) -> dict:
        it = secret("pull", namespace, **{".dockerconfigjson": docker_config(PRIVATE_REGISTRY, user, "hunter2")})
        return {**it, "type": "kubernetes.io/dockerconfigjson"}

    def start(self, name: str, namespace: str, **settings) -> None:
        it = pod(name, **{"node": N1, "image": self.reference, **settings})
        it["metadata"]["namespace"] = namespace
        self.create(it)

    def becomes_ready(self, name: str, namespace: str) -> None:
        def ready():
            time.sleep(0.3)
            return condition(self.cluster.get(f"api/v1/namespaces/{namespace}/pods/{name}"), "Ready")
        try:
            process.wait_until(ready, f"pod {name} to be ready", 90)
        except process.Failed as error:
            self.fail(f"{error}\n{self.kubectl('describe', 'pod', name, '--namespace', namespace).stdout}{self.release.logs(N1)}")

    def starts(self, name: str, namespace: str) -> None:
        """The pod becomes ready and reads its volume."""
        self.becomes_ready(name, namespace)
        read = self.kubectl("exec", name, "--namespace", namespace, "--", "cat", "/mnt/hello").stdout
        self.assertEqual(read, "hello\n")

    def checksum(self, name: str, namespace: str) -> str:
        """That of all the files that the pod's volume has."""
        read = "cd /mnt && find . -type f | sort | tr '\\n' '\\0' | xargs -0 cat | sha256sum"
        return self.kubectl("exec", name, "--namespace", namespace, "--", "sh", "-c", read).stdout

    def is_refused(self, name: str, namespace: str, *words: str) -> None:
        """The pod does not start, and its events say why."""
        def told():
            time.sleep(0.3)
            events = self.cluster.get(f"api/v1/namespaces/{namespace}/events", fieldSelector=f"involvedObject.name={name},type=Warning")["items"]
            return next((it["message"] for it in events if all(word in it["message"] for word in words)), None)
        try:
            message = process.wait_until(told, f"an event of pod {name} with {words}", 60)
        except process.Failed as error:
            self.fail(f"{error}\n{self.kubectl('describe', 'pod', name, '--namespace', namespace).stdout}")
        say(f"event of pod {name}: {message}")
        self.assertNotIn("hunter2", message)
        self.assertFalse(condition(self.cluster.get(f"api/v1/namespaces/{namespace}/pods/{name}"), "Ready"))

    def test_namespaces(self):
        """One namespace may pull the image, another may not: its pod is refused, though all of it is on the node and mounted."""
        self.lets_in("ours")
        self.create(self.secret_of("ours", OURS), self.secret_of("theirs", THEIRS))
        self.start("allowed", OURS, secret="pull")
        self.starts("allowed", OURS)
        self.start("refused", THEIRS, secret="pull")
        self.is_refused("refused", THEIRS, "wants credentials", 'user "theirs" (nodePublishSecretRef)')

    def test_pull_secrets(self):
        """A pod without a secret of its own is read with the imagePullSecrets of its service account."""
        self.lets_in("account")
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "app", "namespace": OURS}, "imagePullSecrets": [{"name": "pull"}]}
        self.create(self.secret_of("account", OURS), account)
        self.start("with-account", OURS, serviceAccountName="app")
        self.starts("with-account", OURS)
        self.start("without", OURS)
        self.is_refused("without", OURS, f'user "{OURS}-default" (credential provider "credentialprovider")')

    def test_provider(self):
        """A plugin is given the token of the pod's service account, and no pod has what another's account may."""
        self.lets_in(f"{OURS}-cloud")
        accounts = [{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": OURS}} for name in ("cloud", "other")]
        self.create(*accounts)
        self.start("cloud", OURS, serviceAccountName="cloud")
        self.starts("cloud", OURS)
        self.start("other", OURS, serviceAccountName="other")
        self.is_refused("other", OURS, f'user "{OURS}-other" (credential provider "credentialprovider")')

    def test_mirror(self):
        """A registry by the hosts.toml of the node, whose mirror is down: the registry itself gives the image."""
        self.cluster.push("small")
        self.start("mirrored", OURS, image=f"{MIRRORED}/e2e/small:{images.TAG}")
        self.starts("mirrored", OURS)
        self.assertIn("mirror failed, passing it over", self.release.logs(N1, 200))

    def start_unread(self, name: str) -> str:
        """A pod that is ready, of whose image nothing is on its node or in the remote but the index; the checksum of what it is to read."""
        self.create(self.secret_of("friend", OURS))
        self.release.empty_all()
        demo = {"image": f"{PRIVATE_REGISTRY}/e2e/demo1:{images.TAG}", "secret": "pull"}
        uploads = lambda: driver.metric(self.release.metrics(N2), "remote_uploads_total", outcome="ok")
        before = uploads()
        self.start("filled", OURS, node=N2, **demo)
        self.becomes_ready("filled", OURS)
        right = self.checksum("filled", OURS)
        process.wait_until(lambda: time.sleep(0.3) or uploads() > before, "the upload of the layer", 60)
        # The index stays, so that the next node mounts at once; all content has to come from the registry.
        self.cluster.redis.command("EVAL", "for _, key in ipairs(redis.call('KEYS', ARGV[1])) do redis.call('DEL', key) end", "0", CHUNKS)
        self.start(name, OURS, attributes={"prefetch": "none"}, **demo)
        self.becomes_ready(name, OURS)
        return right

    def assert_read_from_the_registry(self, name: str, right: str) -> None:
        """The pod reads all there, and hears nothing of it."""
        self.registry.reset()
        self.assertEqual(self.checksum(name, OURS), right)
        sent = self.registry.total().bytes_sent
        say(f"{sent / 1e6:.1f} MB came from the registry")
        self.assertGreater(sent, 5_000_000)
        warnings = self.cluster.get(f"api/v1/namespaces/{OURS}/events", fieldSelector=f"involvedObject.name={name},type=Warning")["items"]
        self.assertEqual([it["message"] for it in warnings], [])

    def test_expired_token(self):
        """Tokens live for a second, and nothing is read before the pod's first one has ended: reading asks for another."""
        self.lets_in("friend", token_seconds=1)
        right = self.start_unread("reads")
        time.sleep(1.5)
        self.assert_read_from_the_registry("reads", right)

    def test_repeated_publish(self):
        """Kubelet publishes again and again, because the CSIDriver asks for it: the mount stays as it is, and what is missing is read with the Secret of today."""
        self.lets_in("friend", token_seconds=1)
        right = self.start_unread("again")
        publishes = lambda: driver.metric(self.release.metrics(N1), "csi_requests_total", rpc="NodePublishVolume", code="OK")
        mount = lambda: self.kubectl("exec", "again", "--namespace", OURS, "--", "grep", " /mnt ", "/proc/self/mountinfo").stdout
        self.lets_in("successor", token_seconds=1)
        self.cluster.apply(self.secret_of("successor", OURS))
        before, was = publishes(), mount()

        def published() -> bool:
            # Kubelet looks at a pod that has changed at once, and at others once a minute.
            self.kubectl("annotate", "pod", "again", "--namespace", OURS, "--overwrite", f"looked-at={time.monotonic()}")
            time.sleep(1)
            return publishes() >= before + 2

        process.wait_until(published, "two more publishes", 90)
        self.assertEqual(mount(), was)
        self.assert_read_from_the_registry("again", right)
