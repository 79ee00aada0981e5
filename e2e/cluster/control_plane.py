"""The machine `cp`: etcd, API server, controllers and scheduler; also the switch that the nodes hang on."""

import http.client
import json
import pathlib
import ssl

from harness import process

from .machine import Machine
from .pki import Pki

ADDRESS = "10.210.0.1"
# The Service `kubernetes`: on the loopback of this machine, which is the nodes' router. So no kube-proxy is needed.
SERVICE_ADDRESS = "10.96.0.1"
SERVICE_RANGE = "10.96.0.0/16"
# What the Service forwards to, and what is asked directly.
PORT = 443


class ControlPlane:
    def __init__(self, work: pathlib.Path, tools: pathlib.Path):
        self.work, self.tools = work, tools
        self.machine = Machine("cp", ADDRESS, work)
        ip = lambda *words: self.machine.run("ip", *words)
        ip("link", "add", "br0", "type", "bridge")
        ip("addr", "add", f"{ADDRESS}/24", "dev", "br0")
        ip("link", "set", "br0", "up")
        ip("addr", "add", f"{SERVICE_ADDRESS}/32", "dev", "lo")
        self.machine.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        self.pki = Pki(work / "pki", f"https://{ADDRESS}:{PORT}",
                       ["DNS:kubernetes.default.svc", "DNS:localhost", "IP:127.0.0.1", f"IP:{ADDRESS}", f"IP:{SERVICE_ADDRESS}"])
        self.kubeconfig = self.pki.kubeconfig("admin", "/O=system:masters/CN=admin")
        self.tls = ssl.create_default_context(cafile=str(self.pki.file("ca.crt")))
        self.tls.load_cert_chain(self.pki.file("admin.crt"), self.pki.file("admin.key"))
        self.servers: dict[str, process.Server] = {}

    def start(self) -> None:
        """Starts etcd and the API server; `wait` waits for them."""
        etcd = "http://127.0.0.1:2379"
        file = self.pki.file
        self._start("etcd", "etcd", "--data-dir", self.work / "etcd", "--unsafe-no-fsync", "--listen-client-urls", etcd, "--advertise-client-urls", etcd,
                    "--listen-peer-urls", "http://127.0.0.1:2380", "--log-level", "warn")
        self._start("kube-apiserver", self.tools / "kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={PORT}", "--bind-address=0.0.0.0",
                    f"--advertise-address={ADDRESS}", f"--service-cluster-ip-range={SERVICE_RANGE}", "--endpoint-reconciler-type=none",
                    f"--client-ca-file={file('ca.crt')}", f"--tls-cert-file={file('apiserver.crt')}", f"--tls-private-key-file={file('apiserver.key')}",
                    "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={file('sa.pub')}",
                    f"--service-account-signing-key-file={file('sa.key')}", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
                    "--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP", "--v=1")

    def wait(self) -> None:
        """Until the API server is ready; then starts what needs it."""
        self.servers["kube-apiserver"].wait_ready(self.ready, "kube-apiserver", 120)
        manager = self.pki.kubeconfig("kcm", "/CN=system:kube-controller-manager")
        scheduler = self.pki.kubeconfig("scheduler", "/CN=system:kube-scheduler")
        self._start("kube-controller-manager", self.tools / "kube-controller-manager", f"--kubeconfig={manager}", f"--authentication-kubeconfig={manager}",
                    f"--authorization-kubeconfig={manager}", f"--service-account-private-key-file={self.pki.file('sa.key')}",
                    f"--root-ca-file={self.pki.file('ca.crt')}", "--use-service-account-credentials=true", "--leader-elect=false",
                    "--node-monitor-grace-period=40s", f"--flex-volume-plugin-dir={self.work / 'volume-plugins'}", "--v=1")
        self._start("kube-scheduler", self.tools / "kube-scheduler", f"--kubeconfig={scheduler}", f"--authentication-kubeconfig={scheduler}",
                    f"--authorization-kubeconfig={scheduler}", "--leader-elect=false", "--v=1")

    def _start(self, name: str, *command) -> None:
        self.servers[name] = self.machine.start(name, *command)

    def request(self, method: str, path: str, body=None, timeout: float = 30, content_type="application/json") -> http.client.HTTPResponse:
        """A request to the API server as the cluster's administrator; its answer, still to be read."""
        # With a context: without one it makes one that it has no use for, which costs fifty times the request.
        connection = http.client.HTTPSConnection(ADDRESS, PORT, timeout=timeout, context=self.tls)
        connection.sock = self.tls.wrap_socket(self.machine.connect(PORT, timeout=timeout), server_hostname=ADDRESS)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": content_type, "Accept": "application/json"})
        return connection.getresponse()

    def ready(self) -> bool:
        try:
            return self.request("GET", "/readyz", timeout=5).status == 200
        except OSError:
            return False

    def stop(self) -> None:
        self.machine.stop()
