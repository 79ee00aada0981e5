"""Control groups of the nodes: made where kubelet needs them, and removed with all below.

Their names carry the process that made them, so that a later run can tell what a killed one left.
"""

import contextlib
import os
import pathlib
import re
import signal
import time

from harness import process

TOP = pathlib.Path("/sys/fs/cgroup")
PREFIX = "clip-e2e"
# Kubelet uses these of version 1, and containerd's runc follows it.
V1 = ["cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd"]


def unified() -> bool:
    """Version 2 alone; a hybrid of both counts as version 1."""
    return (TOP / "cgroup.controllers").exists()


def name_of(node: str) -> str:
    return f"{PREFIX}.{os.getpid()}.{node}"


def make(name: str) -> None:
    if unified():
        (TOP / name).mkdir()
        control = TOP / "cgroup.subtree_control"
        have = (TOP / "cgroup.controllers").read_text().split()
        try:
            control.write_text(" ".join(f"+{it}" for it in have))
        except OSError as error:
            raise process.Failed(f"{control}: {error}: the nodes need a control group below the root that they may part; in a container, move its processes out of the root group first") from error
        return
    for controller in V1:
        if not (TOP / controller).is_dir():
            continue
        group = TOP / controller / name
        group.mkdir()
        if controller == "cpuset":
            # A new group has none, and a process with none can't run.
            for file in ("cpuset.cpus", "cpuset.mems"):
                (group / file).write_text((TOP / controller / file).read_text())


def groups(prefix: str) -> list[pathlib.Path]:
    """Groups at the top of any hierarchy whose name begins so."""
    return [path for top in (TOP, *(it for it in TOP.iterdir() if it.is_dir())) for path in top.glob(f"{prefix}*") if path.is_dir()]


def remove(prefix: str) -> None:
    """With all below, processes included; what withstands stays, and `groups` finds it."""
    for group in groups(prefix):
        for directory, _, _ in os.walk(group, topdown=False):
            for _ in range(100):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
                    break
                with contextlib.suppress(OSError):
                    for pid in pathlib.Path(directory, "cgroup.procs").read_text().split():
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.02)


def remove_of_dead_runs() -> None:
    for group in groups(PREFIX + "."):
        owner = re.match(rf"{PREFIX}\.(\d+)\.", group.name)
        if owner and not pathlib.Path("/proc", owner[1]).exists():
            remove(group.name)
