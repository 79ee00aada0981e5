"""A machine of the cluster: network, mounts and processes of its own, which all end together.

Nothing of it has a name on the host: no `ip netns`, no bind mount. The namespaces live as long as the machine's
first process, which dies with the process that made the machine, even by `kill -9`; the kernel then ends all
other processes in it, and their mounts and networks with them.
"""

import contextlib
import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

from harness import process

CLONE_NEWNET = 0x40000000
LISTEN = "0A"
# Nobody outside serves a machine, and no proxy of the host's reaches one.
NO_PROXY = {"NO_PROXY": "*", "no_proxy": "*"}
libc = ctypes.CDLL(None, use_errno=True)


def enter_network(fd: int) -> None:
    if libc.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class MachineServer(process.Server):
    """A server in a machine. What was started is `nsenter`, which waits for its only child, the server."""

    @property
    def pid(self) -> int:
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(process.wait_until(lambda: children.read_text().split() or not self.alive(), "nsenter to start its command")[0])

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, TypeError):
            os.kill(self.pid, number)

    def stop(self, seconds: float = 10) -> int:
        if self.alive():
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


class Machine:
    """Also a place where services run: see `process.Here`."""

    def __init__(self, name: str, address: str, work: pathlib.Path, directories: dict[str, pathlib.Path] | None = None):
        """`directories` are the machine's own, by the path that it sees them at."""
        if threading.current_thread() is not threading.main_thread():
            raise AssertionError("a machine would end with the thread that made it")
        self.name, self.address = name, address
        self.log = work / "log"
        self.log.mkdir(parents=True, exist_ok=True)
        pairs = [f"{source}:{target}" for target, source in (directories or {}).items()]
        self.init = process.Server(
            ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
             "--propagation", "private", sys.executable, pathlib.Path(__file__).with_name("machine_init.py"), *pairs],
            stdout=self.log / f"{name}.init",
        )
        self.init.wait_ready(lambda: (self.log / f"{name}.init").read_text() == "ready\n", f"machine {name}")
        children = pathlib.Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children")
        self.pid = int(children.read_text())
        self.namespaces = {os.readlink(f"/proc/{self.pid}/ns/{kind}") for kind in ("mnt", "net", "pid")}

    def inside(self, *command) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--wd=/", "--", *map(os.fspath, command)]

    def server(self, command, stdout: pathlib.Path, stderr: pathlib.Path | None = None, env=None) -> MachineServer:
        return MachineServer(self.inside(*command), stdout, stderr, {**NO_PROXY, **(env or {})})

    def start(self, name: str, *command, env=None) -> MachineServer:
        """A server whose log is named after it."""
        return self.server(command, self.log / f"{self.name}.{name}", env=env)

    def run(self, *command, env=None, **options) -> subprocess.CompletedProcess:
        return process.run(*self.inside(*command), env={**NO_PROXY, **(env or {})}, **options)

    @contextlib.contextmanager
    def network(self):
        """Inside, sockets that this thread makes and commands that it runs are on the machine's network."""
        with open("/proc/thread-self/ns/net") as ours, open(f"/proc/{self.pid}/ns/net") as theirs:
            enter_network(theirs.fileno())
            try:
                yield
            finally:
                enter_network(ours.fileno())

    def connect(self, port: int, *, address: str | None = None, timeout: float = 10) -> socket.socket:
        with self.network():
            return socket.create_connection((address or self.address, port), timeout)

    def listens(self, port: int) -> bool:
        for table in ("tcp", "tcp6"):
            for line in pathlib.Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTEN and words[1].endswith(f":{port:04X}"):
                    return True
        return False

    def processes(self) -> dict[int, str]:
        """The machine's processes but its first, as pid of the host and command line."""
        found = {}
        for pid in processes_in(self.namespaces & {os.readlink(f"/proc/{self.pid}/ns/pid")}):
            with contextlib.suppress(OSError):
                if pid != self.pid:
                    found[pid] = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return found

    def mounts(self) -> list[str]:
        """Mount points as the machine sees them."""
        with open(f"/proc/{self.pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            return [process.unescape_mountinfo(line.split(" ")[4]) for line in file]

    def stop(self) -> None:
        """At once and without a word: whoever cares has ended its pods before."""
        self.init.kill()
        try:
            process.wait_until(self._ended, f"the processes of machine {self.name} to end")
        except process.Failed as error:
            raise process.Failed(f"{error}: {describe(processes_in(self.namespaces))}") from error

    def _ended(self) -> bool:
        return are_ended(self.namespaces)


def are_ended(namespaces: set[str]) -> bool:
    """Kills who is in one of these namespaces; whether nobody was, twice.

    The kernel has killed all that were there when a machine's first process ended. A container that was just being made can slip through, because it begins
    a process namespace of its own, and is in none of these for a moment.
    """
    for _ in range(2):
        pids = processes_in(namespaces)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if pids:
            return False
        time.sleep(0.2)
    return True


def processes_in(namespaces: set[str]) -> list[int]:
    """Processes of the host in one of these namespaces ("net:[4026532]")."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        for kind in ("mnt", "net", "pid"):
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns" / kind) in namespaces:
                    found.append(int(entry.name))
                    break
    return found


def describe(pids: list[int]) -> list[str]:
    """For a message: what they are, and what the kernel has them wait for."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            place = pathlib.Path("/proc", str(pid))
            status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines() if ":\t" in line)
            found.append(f"{pid} {status['Name']}, parent {status['PPid']}, {status['State']}, in {(place / 'wchan').read_text()}")
    return found


def link(a: Machine, a_name: str, b: Machine, b_name: str) -> None:
    """A cable between two machines. It never exists on the host."""
    process.run("ip", "link", "add", a_name, "netns", str(a.pid), "type", "veth", "peer", "name", b_name, "netns", str(b.pid))
