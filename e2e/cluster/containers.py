"""The images that the cluster's own pods are made of: pause, a shell, the CSI sidecars.

Each is a layer of a few files and is made anew for a run: that takes a second.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import tempfile

from harness import oci, paths, process
from harness.rawtar import Tar

TAG = "latest"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]

# What kubelet's first process of a pod does: nothing, and reap.
PAUSE = r"""
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int number) { (void)number; _exit(0); }
static void reap(int number) { (void)number; while (waitpid(-1, 0, WNOHANG) > 0); }
int main(void) {
    signal(SIGINT, end);
    signal(SIGTERM, end);
    signal(SIGCHLD, reap);
    for (;;) pause();
}
"""


@functools.cache
def tools(what: str = "kubernetes") -> pathlib.Path:
    """Kubernetes' programs, or another set of `tools.sh`, built if the cache has none."""
    # A cold build takes minutes: what it says is shown.
    return pathlib.Path(subprocess.run([paths.E2E / "tools.sh", what], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def pause(directory: pathlib.Path) -> tuple[Tar, dict]:
    (directory / "pause.c").write_text(PAUSE)
    process.run("cc", "-Os", "-static", "-s", "-o", directory / "pause", directory / "pause.c")
    layer = Tar()
    layer.file("pause", (directory / "pause").read_bytes(), mode=0o755)
    return layer, {"Entrypoint": ["/pause"], "User": "65535:65535"}


def shell(_directory: pathlib.Path) -> tuple[Tar, dict]:
    """A static busybox: what the pods of the tests run. It has a user that is not root."""
    busybox = pathlib.Path(shutil.which("busybox") or "/bin/busybox")
    layer = Tar()
    for name in ("bin", "etc", "tmp", "mnt"):
        layer.dir(name, mode=0o1777 if name == "tmp" else 0o755)
    layer.file("bin/busybox", busybox.read_bytes(), mode=0o755)
    for name in process.run(busybox, "--list").stdout.split():
        if name != "busybox":
            layer.hardlink(f"bin/{name}", "bin/busybox", mode=0o755)
    layer.file("etc/passwd", "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    layer.file("etc/group", "root:x:0:\nnobody:x:65534:\n")
    return layer, {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}


def sidecar(program: str):
    def build(_directory: pathlib.Path) -> tuple[Tar, dict]:
        layer = Tar()
        layer.file(program, (tools() / program).read_bytes(), mode=0o755)
        return layer, {"Entrypoint": [f"/{program}"]}
    return build


# Repository and tag, as the chart's values name them, and who makes it.
IMAGES = {
    "pause:1": pause,
    "shell:1": shell,
    "sig-storage/csi-node-driver-registrar:v2.17.0": sidecar("csi-node-driver-registrar"),
    "sig-storage/livenessprobe:v2.19.0": sidecar("livenessprobe"),
    "sig-storage/csi-provisioner:v6.3.0": sidecar("csi-provisioner"),
}


def push(host: str, work: pathlib.Path, images: dict = IMAGES) -> None:
    """Makes all and pushes them. Called on the network that the registry is on."""
    for name, build in images.items():
        repository, _, tag = name.rpartition(":")
        with tempfile.TemporaryDirectory(dir=work) as directory:
            layout = oci.Layout(pathlib.Path(directory) / "layout")
            layer, config = build(pathlib.Path(directory))
            data = layer.bytes()
            layout.add_image(TAG, [(layout.add(oci.gzipped(data, 1), oci.LAYER_GZIP), oci.digest_of(data))], architecture=ARCHITECTURE, config={"config": config})
            oci.push(layout, TAG, host, repository, tag)
