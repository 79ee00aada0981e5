"""What a cluster could leave on the host, looked for after it was taken down."""

import os
import pathlib

from . import cgroups
from .machine import processes_in
from .machine_init import SYSCTLS

# Kubernetes and containerd use these on a host that is a node. This host is none.
PLACES = ["/var/lib/kubelet", "/var/lib/clip-csi", "/var/lib/containerd", "/var/lib/cni", "/var/log/pods", "/var/log/containers",
          "/run/containerd", "/run/netns", "/etc/cni/net.d", "/opt/containerd", "/usr/libexec/kubernetes"]


class Host:
    """What a cluster must not change, as it is now."""

    def __init__(self):
        self.places = {place: sorted(os.listdir(place)) if os.path.isdir(place) else None for place in PLACES}
        self.sysctls = {name: pathlib.Path("/proc/sys", name).read_text() for name in SYSCTLS if pathlib.Path("/proc/sys", name).exists()}
        self.links = sorted(os.listdir("/sys/class/net"))


def of(work: pathlib.Path, namespaces: set[str], before: Host) -> list[str]:
    found = [f"process {pid}: {pathlib.Path(f'/proc/{pid}/comm').read_text().strip()}" for pid in processes_in(namespaces)]
    found += [f"control group {path}" for path in cgroups.groups(cgroups.name_of(""))]
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        found += [f"mount {line.split(' ')[4]}" for line in file if str(work) in line or any(it in line for it in namespaces)]
    now = Host()
    for kind in ("places", "sysctls", "links"):
        was, is_now = getattr(before, kind), getattr(now, kind)
        if was != is_now:
            found.append(f"{kind} of the host changed from {was} to {is_now}")
    return found
