"""A Kubernetes API without a cluster: etcd and the API server on the loopback, with tokens as pods and nodes have them."""

import http.client
import json
import pathlib
import ssl
import time

from cluster import containers
from cluster.pki import Pki

from . import kube_objects, process

AUDIENCE = "https://kubernetes.default.svc"


class ApiServer:
    def __init__(self, work: pathlib.Path):
        self.tools = containers.tools()
        self.port = process.free_port()
        self.work = work / "api"
        self.work.mkdir()
        self.applied: list[dict] = []
        self.pki = Pki(self.work / "pki", f"https://127.0.0.1:{self.port}", ["DNS:localhost", "IP:127.0.0.1"])
        self.kubeconfig = self.pki.kubeconfig("admin", "/O=system:masters/CN=admin")
        self.tls = ssl.create_default_context(cafile=str(self.pki.file("ca.crt")))
        self.tls.load_cert_chain(self.pki.file("admin.crt"), self.pki.file("admin.key"))
        etcd, peer = (f"http://127.0.0.1:{process.free_port()}" for _ in range(2))
        file = self.pki.file
        self.etcd = process.Server(["etcd", "--data-dir", self.work / "etcd", "--unsafe-no-fsync", "--listen-client-urls", etcd, "--advertise-client-urls", etcd,
                                    "--listen-peer-urls", peer, "--log-level", "error"], stdout=self.work / "etcd.log")
        self.server = process.Server(
            [self.tools / "kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={self.port}", "--bind-address=127.0.0.1", "--service-cluster-ip-range=10.96.0.0/16",
             "--endpoint-reconciler-type=none", f"--client-ca-file={file('ca.crt')}", f"--tls-cert-file={file('apiserver.crt')}", f"--tls-private-key-file={file('apiserver.key')}",
             f"--service-account-issuer={AUDIENCE}", f"--service-account-key-file={file('sa.pub')}", f"--service-account-signing-key-file={file('sa.key')}",
             "--authorization-mode=Node,RBAC", "--disable-admission-plugins=ServiceAccount", "--v=1"], stdout=self.work / "api.log")
        self.server.wait_ready(self.ready, "kube-apiserver", 120)

    def ready(self) -> bool:
        try:
            return self.request("GET", "/readyz")[0] == 200
        except OSError:
            time.sleep(0.1)
            return False

    def request(self, method: str, path: str, body=None, kind="application/json", token: str | None = None) -> tuple[int, dict | str]:
        """A request as the administrator, or as whoever has the token; status and body."""
        tls = self.tls if token is None else ssl.create_default_context(cafile=str(self.pki.file("ca.crt")))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=tls)
        headers = {"Content-Type": kind, "Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, json.loads(text) if text.startswith("{") else text

    def do(self, method: str, path: str, body=None, kind="application/json") -> dict:
        status, answer = self.request(method, path, body, kind)
        if not 200 <= status < 300:
            raise process.Failed(f"{method} {path}: {status} {answer}")
        return answer

    def get(self, path: str) -> dict:
        return self.do("GET", path)

    def kubectl(self, *words, stdin: str | None = None) -> str:
        return process.run(self.tools / "kubectl", "--kubeconfig", self.kubeconfig, *words, stdin=stdin).stdout

    def apply(self, *objects: dict) -> None:
        for it in objects:
            self.do("PATCH", f"/{'/'.join(kube_objects.place(it))}?{kube_objects.APPLIED}", it, kube_objects.APPLY)
        self.applied += objects

    def clear(self, *collections: str) -> None:
        """Removes what was applied, but for namespaces and definitions, and all that is in these collections: for the next one who uses it."""
        objects = ["/".join(kube_objects.place(it)) for it in self.applied if it["kind"] not in ("Namespace", "CustomResourceDefinition")]
        self.applied = []
        for path in [*objects, *collections]:
            # Said, because what Jobs leave is an orphan otherwise, and waits for a controller that does not run.
            status, answer = self.request("DELETE", f"/{path}", {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0, "propagationPolicy": "Background"})
            if status not in (200, 404):
                raise process.Failed(f"DELETE {path}: {status} {answer}")
        left = {path: names for path in collections if (names := [it["metadata"]["name"] for it in self.get(f"/{path}")["items"]])}
        if left:
            raise process.Failed(f"they stay: {left}")

    def node(self, name: str, ready=True, **labels: str) -> None:
        """A node, as kubelet would have it registered."""
        self.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
        status = {"status": {"conditions": [{"type": "Ready", "status": "True" if ready else "Unknown", "reason": "e2e", "message": ""}]}}
        # What a new node is tainted with until the node lifecycle controller, which does not run here, has looked at it.
        self.do("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": None}}, "application/merge-patch+json")
        self.do("PATCH", f"/api/v1/nodes/{name}/status", status, "application/strategic-merge-patch+json")

    def token(self, namespace: str, account: str, node: str | None = None) -> str:
        """A token of a service account; with `node`, as kubelet gets it for a pod there: it names the node."""
        spec: dict = {"audiences": [AUDIENCE], "expirationSeconds": 7200}
        if node:
            uid = self.get(f"/api/v1/nodes/{node}")["metadata"]["uid"]
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        return self.do("POST", path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec})["status"]["token"]

    def kubeconfig_of(self, name: str, token: str) -> pathlib.Path:
        path = self.work / f"{name}.kubeconfig"
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "e2e", "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "e2e"}}],
            "clusters": [{"name": "e2e", "cluster": {"server": self.pki.server, "certificate-authority": str(self.pki.file("ca.crt"))}}],
            "users": [{"name": "e2e", "user": {"token": token}}]}))
        return path

    def wait(self, path: str, condition, what: str, seconds: float = 60) -> dict:
        """The object once `condition` holds for it."""
        last: dict = {}

        def look():
            nonlocal last
            time.sleep(0.1)
            status, last = self.request("GET", path)
            return last if condition(last if status == 200 else None) else None
        try:
            return process.wait_until(look, what, seconds) or {}
        except process.Failed as error:
            raise process.Failed(f"{error}; last seen: {json.dumps(last, indent=1)}") from error

    def stop(self) -> None:
        self.server.kill()
        self.etcd.kill()
