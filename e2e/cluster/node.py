"""A node: a machine with a containerd and a kubelet of its own, and a network for its pods."""

import json
import os
import pathlib
import subprocess

from harness import process

from . import cgroups
from .control_plane import ADDRESS, ControlPlane
from .machine import Machine, link

CNI_DIRS = ["/usr/lib/cni", "/opt/cni/bin"]
SOCKET = "/run/containerd/containerd.sock"


def containerd_config(pause: str, snapshotter: str) -> str:
    cni = next((it for it in CNI_DIRS if os.path.exists(f"{it}/bridge")), None)
    if cni is None:
        raise process.Failed(f"no CNI plugins in {' or '.join(CNI_DIRS)}: install containernetworking-plugins (e2e/install.sh test)")
    return f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd-opt"
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  # Lowering it takes a capability that root in a container has not.
  restrict_oom_score_adj = true
  sandbox_image = "{pause}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
    conf_dir = "/var/lib/e2e/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/var/lib/e2e/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""


def kubelet_config(cgroup: str) -> dict:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "failSwapOn": False,
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        # The API server needs no certificate to fetch logs and to exec.
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "makeIPTablesUtilChains": False,
        "localStorageCapacityIsolation": False,
        # The host's disk and memory are others' as well.
        "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "maxOpenFiles": 20000,
        "oomScoreAdj": 0,
        # Nobody answers there, and says so at once.
        "clusterDNS": [ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": "/var/lib/e2e/resolv.conf",
        "serializeImagePulls": False,
        "registryPullQPS": 0,
        "eventRecordQPS": 0,
        "kubeAPIQPS": 100,
        "kubeAPIBurst": 200,
        "nodeStatusUpdateFrequency": "4s",
        "volumePluginDir": "/var/lib/e2e/volume-plugins",
    }


class Node:
    def __init__(self, number: int, plane: ControlPlane, work: pathlib.Path, pause: str, registries: list[str]):
        self.name, self.plane, self.work = f"n{number}", plane, work / f"n{number}"
        self.address, self.pods = f"10.210.0.1{number}", f"10.211.{number}.0/24"
        own = {name: self.work / name for name in ("kubelet", "clip-csi", "containerd", "e2e")}
        for path in own.values():
            path.mkdir(parents=True)
        self.machine = Machine(self.name, self.address, work, {f"/var/lib/{name}": path for name, path in own.items()})
        self.cgroup = cgroups.name_of(self.name)
        cgroups.make(self.cgroup)

        self.cable = f"to-{self.name}"
        link(plane.machine, self.cable, self.machine, "eth0")
        plane.machine.run("ip", "link", "set", self.cable, "master", "br0", "up")
        for words in (["addr", "add", f"{self.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"], ["route", "add", "default", "via", ADDRESS]):
            self.machine.run("ip", *words)
        self.machine.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        plane.machine.run("ip", "route", "add", self.pods, "via", self.address)

        config = own["e2e"]
        (config / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        (config / "cni").mkdir()
        (config / "cni/10-e2e.conflist").write_text(json.dumps({"cniVersion": "0.4.0", "name": "e2e", "plugins": [{
            "type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": self.pods}]], "dataDir": "/run/cni-ipam", "routes": [{"dst": "0.0.0.0/0"}]},
        }]}))
        for host in registries:
            (config / "certs.d" / host).mkdir(parents=True)
            (config / "certs.d" / host / "hosts.toml").write_text(f'server = "http://{host}"\n[host."http://{host}"]\n  capabilities = ["pull", "resolve"]\n')
        # An overlay on an overlay is refused, as where the host is a container itself.
        on_overlay = process.run("stat", "--file-system", "--format", "%T", own["containerd"]).stdout.strip() == "overlayfs"
        (config / "containerd.toml").write_text(containerd_config(pause, "native" if on_overlay else "overlayfs"))
        (config / "kubelet.json").write_text(json.dumps(kubelet_config(self.cgroup)))
        self.kubeconfig = plane.pki.kubeconfig(self.name, f"/O=system:nodes/CN=system:node:{self.name}")
        self.start_containerd()

    def start_containerd(self) -> None:
        self.containerd = self.machine.start("containerd", "containerd", "-c", "/var/lib/e2e/containerd.toml")

    def start_kubelet(self) -> None:
        self.containerd.wait_ready(lambda: self.ctr("version", check=False).returncode == 0, f"containerd of {self.name}")
        self.kubelet = self.machine.start("kubelet", self.plane.tools / "kubelet", "--config=/var/lib/e2e/kubelet.json", f"--kubeconfig={self.kubeconfig}",
                                          "--cert-dir=/var/lib/e2e/kubelet-pki", f"--hostname-override={self.name}", f"--node-ip={self.address}", "--v=2")

    def ctr(self, *words, **options) -> subprocess.CompletedProcess:
        return self.machine.run("ctr", "--address", SOCKET, "--namespace", "k8s.io", *words, **options)

    def path(self, path: str) -> pathlib.Path:
        """A path of the node below /var/lib, as the host reaches it; what is mounted on it is the node's alone."""
        return self.work / pathlib.PurePosixPath(path).relative_to("/var/lib")

    def mount_cache(self, n_bytes: int) -> None:
        """A disk of its own for the driver's cache; another size if there is one."""
        path = "/var/lib/clip-csi/cache"
        self.machine.run("mkdir", "-p", path)
        is_there = self.machine.run("mountpoint", "--quiet", path, check=False).returncode == 0
        self.machine.run("mount", "-o", f"{'remount,' if is_there else ''}size={n_bytes}", "-t", "tmpfs", "cache", path)

    def stop(self) -> None:
        self.machine.stop()
        cgroups.remove(self.cgroup)

    def leave(self) -> None:
        """Stops it, and takes its way out of the control plane's network, so that it may join again."""
        self.plane.machine.run("ip", "link", "delete", self.cable)
        self.plane.machine.run("ip", "route", "delete", self.pods)
        self.stop()
