"""The cluster's cases about restarts: upgrades and deleted pods under readers, and what each role of the driver may do."""

import contextlib
import errno
import json
import os
import pathlib
import re
import signal
import socket
import time
import unittest

import e2e_kernel
import images
from cluster import project_image
from cluster.case import EVENTS, DriverCase
from cluster.cluster import NODES, condition
from cluster.pods import pod
from cluster.reader_pods import ReaderPods
from cluster.release import CONTAINERS, FUSE, NAME, NAMESPACE, NEXT_TAG, NODE, RUN_DIR
from harness import process, reading, seccomp
from harness.process import say

N1, N2 = NODES
# How often each thing happens under readers; an upgrade takes as long as the four pods of two nodes take to start.
ROLLOUTS = int(os.environ.get("CLIP_E2E_ROLLOUTS", "2"))
IMAGE = "demo1"
# Readers have begun to read after this long, and read for as long in between.
CALM_SECONDS = 2
UNPRIVILEGED = 65532
ROLES = {"node": NODE, "agent": NODE, "serve": FUSE}


class UnderReaders(DriverCase):
    """Pods that read, and what they see while something happens."""

    def begin(self, without=()) -> None:
        self.readers = ReaderPods(self, IMAGE, NODES, self.seed, without)
        # Times on the clock of time.monotonic(): while something is replaced, and in between.
        self.windows: dict[str, list[tuple[float, float]]] = {}
        self.calm: list[tuple[float, float]] = []
        self.rest()

    def rest(self) -> None:
        begin = time.monotonic()
        time.sleep(CALM_SECONDS)
        self.calm.append((begin, time.monotonic()))

    @contextlib.contextmanager
    def window(self, what: str):
        begin = time.monotonic()
        yield
        self.windows.setdefault(what, []).append((begin, time.monotonic()))
        self.rest()

    def verdict(self) -> None:
        """Prints what the readers saw, and fails if one saw anything wrong, or nothing; looks whether the driver has given up anything."""
        seen = self.readers.stop()
        print(f"\nread errors: {len(seen.errors)}; {sum(seen.operations.values())} operations of {len(seen.operations)} reader pods on {len(NODES)} nodes, "
              f"{seen.n_bytes / 1e6:.0f} MB compared; seed {self.seed}")
        for what, windows in self.windows.items():
            lengths = [end - begin for begin, end in windows]
            print(f"  {what}, {len(windows)} times in {sum(lengths) / len(lengths):.1f} s each: pause p50/p99/max {reading.spread(seen.pauses(windows))}")
        print(f"  nothing, {len(self.calm)} times: longest operation p50/p99/max {reading.spread(seen.pauses(self.calm))}")
        memory = {role: max(self.metric(node, "process_resident_memory_bytes", role=role) for node in NODES) for role in ROLES}
        print("  resident: " + ", ".join(f"{role} {size / 1e6:.1f} MB" for role, size in memory.items()), flush=True)
        self.assertEqual(seen.errors, [])
        for kind, count in seen.operations.items():
            self.assertGreater(count, 10 * len(self.windows), f"the reader {kind} has hardly read anything")
        for node in NODES:
            self.assertEqual(self.metric(node, "mounts_aborted_total"), 0)
            self.assertEqual(self.metric(node, "dead_volumes"), 0)


class Restart(UnderReaders):
    """Whatever of the driver is replaced, pods that read see a pause and no error."""

    def setUp(self):
        super().setUp()
        self.release.empty_all()
        self.begin()

    def assert_pods_come_and_go(self, name: str, node: str, image: str) -> None:
        self.run_pod(name, node=node, image=image)
        self.assertEqual(self.exec(name, "cat", "/mnt/hello"), "hello\n")
        self.cluster.delete_pods(name)

    def test_upgrade(self):
        """`helm upgrade --wait` to another version and back, again and again, under readers; pods that start meanwhile start."""
        small = self.cluster.push("small")
        for number in range(ROLLOUTS):
            tag = NEXT_TAG if number % 2 == 0 else project_image.version()
            meanwhile = [f"meanwhile-{number}-{node}" for node in NODES]
            with self.window("helm upgrade"):
                self.create(*[pod(name, node=node, image=small) for name, node in zip(meanwhile, NODES)])
                self.release.upgrade({"image": {"tag": tag}})
            for component in CONTAINERS:
                for node, it in self.release.pods(component).items():
                    statuses = it["status"]["containerStatuses"]
                    found = [status["image"] for status in statuses if status["name"] in ROLES]
                    self.assertTrue(found and all(image.endswith(f":{tag}") for image in found), f"{component} of {node}: {found}")
                    self.assertEqual([status["restartCount"] for status in statuses], [0] * len(statuses), self.release.logs(node))
            for name in meanwhile:
                self.wait_ready(name)
                self.assertEqual(self.exec(name, "cat", "/mnt/hello"), "hello\n")
            # What the old driver mounted, the new one takes down.
            self.cluster.delete_pods(*meanwhile)
        for node in NODES:
            self.assertGreater(self.metric(node, "serve_takeovers_total"), 0, "the new server took the mounts over")
        self.verdict()

    def test_deleted(self):
        """The pods of both DaemonSets are deleted, one at a time and again and again, under readers."""
        small = self.cluster.push("small")
        for number in range(ROLLOUTS):
            node = NODES[number % 2]
            for component in CONTAINERS:
                with self.window(f"pod of {component} deleted"):
                    self.release.delete_pod(node, component)
            self.assert_pods_come_and_go(f"after-{number}", node, small)
        self.verdict()

    def test_killed(self):
        """The container of each role is killed, once on each node, and kubelet starts it anew, under readers."""
        small = self.cluster.push("small")
        for node in NODES:
            for role, component in ROLES.items():
                before = self.restarts(node, component)
                with self.window(f"container of {role} killed"):
                    os.kill(self.release.processes(node, role)[0], signal.SIGKILL)
                    process.wait_until(lambda: time.sleep(0.2) or self.is_back(node, component, role, before), f"{role} of {node} to be back", 60)
                after = self.restarts(node, component)
                self.assertEqual(after, {**before, role: before[role] + 1}, "none but this one")
            self.assert_pods_come_and_go(f"after-{node}", node, small)
        self.verdict()

    def restarts(self, node: str, component: str) -> dict[str, int]:
        return {it["name"]: it["restartCount"] for it in self.release.pods(component)[node]["status"]["containerStatuses"]}

    def is_back(self, node: str, component: str, role: str, before: dict[str, int]) -> bool:
        return self.restarts(node, component)[role] > before[role] and condition(self.release.pods(component)[node], "Ready")


class NoDriver(UnderReaders):
    """Where the kernel serves an image, its pods need nothing of the driver."""

    VALUES = {"node": {"kernelMounts": "whole-on-any-kernel"}}

    def setUp(self):
        super().setUp()
        if e2e_kernel.erofs_is_missing():
            self.skipTest(e2e_kernel.erofs_is_missing())
        self.release.upgrade(self.VALUES)
        for node in NODES:
            process.wait_until(lambda node=node: self.is_served_by_kernel(node), f"{node} to have all of the image", 120)
        # EROFS of files has no O_DIRECT.
        self.begin(without=("direct",))
        for node in NODES:
            self.assertEqual(self.metric(node, "kernel_mounts"), 1)

    def is_served_by_kernel(self, node: str) -> bool:
        """A node that takes the image from the other one's cache serves it lazily at first."""
        self.run_pod("first", node=node, image=self.cluster.push(IMAGE), attributes={"prefetch": "all"})
        served = self.metric(node, "kernel_mounts") > 0
        self.cluster.delete_pods("first")
        return served

    def test_no_driver(self):
        """Both pods of a node die at once, then the driver is uninstalled and installed again, under readers."""
        with self.window("all killed at once"):
            for role in ROLES:
                for pid in self.release.processes(N1, role):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            for component in CONTAINERS:
                process.wait_until(lambda it=component: time.sleep(0.2) or condition(self.release.pods(it)[N1], "Ready"), "the driver to be back", 60)
        with self.window("helm uninstall"):
            self.release.uninstall()
        with self.window("helm install"):
            self.release.install(self.VALUES)
        for node in NODES:
            self.assertEqual((self.metric(node, "kernel_mounts"), self.metric(node, "mounts")), (1, 1), "it was found again")
        self.verdict()
        self.cluster.delete_pods(*self.readers.names.values())
        for node in NODES:
            process.wait_until(lambda node=node: time.sleep(0.3) or self.metric(node, "mounts") == 0, f"the mount of {node} to go", 30)


class Lost(DriverCase):
    """What a mount does not survive: readers get errors, the operator is told, and new pods work."""

    def setUp(self):
        super().setUp()
        self.reference = self.cluster.push(IMAGE)
        self.first, self.second = sorted(images.get(IMAGE).note()["files"][0])[:2]

    def begin(self) -> None:
        self.run_pod("lost", node=N1, image=self.reference)
        self.assert_reads("lost", self.first)

    def assert_reads(self, name: str, file: str) -> None:
        self.assertEqual(self.exec(name, "sha256sum", f"/mnt/{file}").split(" ")[0], images.get(IMAGE).note()["files"][0][file])

    def assert_lost(self, reason: str) -> None:
        """The pod's reads fail, an event of the node says so; without the pod all is as before."""
        process.wait_until(lambda: time.sleep(0.3) or self.metric(N1, "dead_volumes") == 1, "the dead volume to be counted", 60)
        self.assertRegex(self.exec("lost", "cat", f"/mnt/{self.second}", check=False), "Transport endpoint is not connected|Software caused connection abort")
        events = lambda: [it["message"] for it in self.cluster.get(EVENTS, fieldSelector=f"involvedObject.name={N1},reason={reason}")["items"]]
        process.wait_until(lambda: time.sleep(0.3) or events(), f"an event {reason} of {N1}", 30)
        say(f"event of node {N1}: {events()[-1]}")

    def assert_mended(self) -> None:
        self.cluster.delete_pods("lost")
        process.wait_until(lambda: time.sleep(0.3) or self.metric(N1, "dead_volumes") == 0, "the dead volume to go", 30)
        self.run_pod("anew", node=N1, image=self.reference)
        self.assert_reads("anew", self.second)

    def test_both_gone(self):
        """Node service and server die at the same moment."""
        self.begin()
        for pid in [*self.release.processes(N1, "node"), *self.release.processes(N1, "serve")]:
            # The one that serves may have died with its parent by then.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.assert_lost("DeadVolumes")
        self.assert_mended()

    def test_given_up(self):
        """There is no server for longer than node.serverDeadlineSeconds."""
        self.release.upgrade({"node": {"serverDeadlineSeconds": 3}})
        self.begin()
        self.select_nodes("none")
        process.wait_until(lambda: time.sleep(0.3) or self.metric(N1, "mounts_aborted_total") > 0, "the mounts to be given up", 60)
        self.assert_lost("MountsGivenUp")
        self.select_nodes(None)
        process.wait_until(lambda: time.sleep(0.3) or N1 in self.release.pods(FUSE) and condition(self.release.pods(FUSE)[N1], "Ready"), "a server", 60)
        self.assert_mended()

    def select_nodes(self, value: str | None) -> None:
        """Has the DaemonSet fuse want nodes with a label that none has, or no longer."""
        patch = {"spec": {"template": {"spec": {"nodeSelector": {"e2e": value}}}}}
        self.kubectl("patch", "daemonset", f"{NAME}-{FUSE}", "--namespace", NAMESPACE, "--type=merge", f"--patch={json.dumps(patch)}")


class Privileges(DriverCase):
    """What each role may do on a node, as the kernel has it."""

    def each_process(self, check) -> None:
        """Calls `check` with the role of each process of the driver, its pid on the host, and its place in /proc."""
        for node in NODES:
            for role in ROLES:
                pids = self.release.processes(node, role)
                self.assertEqual(len(pids), 2 if role == "serve" else 1, f"{role} of {node}")
                for pid in pids:
                    with self.subTest(node=node, role=role, pid=pid):
                        check(role, pid, pathlib.Path(f"/proc/{pid}"))

    def test_privileges(self):
        """Agent and server are nobody: no capability, no way to get one, a root that cannot be written; the server cannot write to the cache."""
        def check(role: str, _pid: int, place: pathlib.Path) -> None:
            status = dict(re.findall(r"^(\w+):\s*(.*)$", (place / "status").read_text(), re.M))
            cannot = self.refuses_a_file(place / "root/new")
            self.assertEqual(cannot, errno.EROFS, "the root can be written")
            if role == "node":
                self.assertEqual(status["Uid"].split()[0], "0")
                return
            self.assertEqual(set(status["Uid"].split()) | set(status["Gid"].split()), {str(UNPRIVILEGED)})
            for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                self.assertEqual(int(status[kind], 16), 0, kind)
            self.assertEqual(status["NoNewPrivs"], "1")
            self.assertEqual(status["Seccomp"], "2", "the runtime's filter")
            cache = self.refuses_a_file(place / "root/var/lib/clip-csi/cache/new")
            self.assertEqual(cache, None if role == "agent" else errno.EROFS, "the agent alone writes to the cache")
        self.each_process(check)

    @staticmethod
    def refuses_a_file(path: pathlib.Path) -> int | None:
        """Why root cannot make a file there; None if it can."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError as error:
            return error.errno
        path.unlink()
        return None

    def test_no_network(self):
        """Server and node service have no socket of the network and cannot get one; the agent has."""
        def check(role: str, pid: int, place: pathlib.Path) -> None:
            filters = seccomp.filters(pid)
            verdicts = {family: seccomp.verdict(filters, "socket", family, socket.SOCK_STREAM, 0)[0] for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_PACKET)}
            self.assertEqual(verdicts.pop(socket.AF_UNIX), "allow")
            have = self.inet_sockets(place)
            if role == "agent":
                self.assertEqual(verdicts[socket.AF_INET], "allow")
                self.assertTrue(have, "/metrics is served")
            else:
                self.assertEqual(set(verdicts.values()), {"errno"})
                self.assertEqual(seccomp.verdict(filters, "io_uring_setup", 1)[0], "errno")
                self.assertEqual(have, [])
        self.each_process(check)

    @staticmethod
    def inet_sockets(place: pathlib.Path) -> list[str]:
        """The process's descriptors that are sockets of its network."""
        known = set()
        for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "icmp", "icmp6"):
            with contextlib.suppress(FileNotFoundError):
                known |= {line.split()[9] for line in (place / "net" / table).read_text().splitlines()[1:]}
        found = []
        for descriptor in (place / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(descriptor)
                if target.startswith("socket:[") and target[8:-1] in known:
                    found.append(target)
        return found

    def test_what_is_there(self):
        """Secrets and the token are the agent's alone, the other two do not know of registries; the sockets are where nobody else comes."""
        def check(role: str, _pid: int, place: pathlib.Path) -> None:
            root = place / "root"
            config = (root / "etc/clip-csi/config.toml").read_text()
            self.assertEqual("redis" in config, role == "agent")
            self.assertEqual(self.exists(root / "etc/clip-csi/secrets/remote/hmac-key"), role == "agent")
            self.assertEqual(self.exists(root / "var/run/secrets/kubernetes.io/serviceaccount/token"), role == "agent")
            self.assertEqual(self.exists(root / "dev/fuse"), role == "node")
            run = (root / RUN_DIR.lstrip("/")).stat()
            self.assertEqual((run.st_mode & 0o777, run.st_uid, run.st_gid), (0o700, UNPRIVILEGED, UNPRIVILEGED))
        self.each_process(check)

    @staticmethod
    def exists(path: pathlib.Path) -> bool:
        return os.path.lexists(path)


# In this order, which spares installations.
ORDER = [Privileges, Lost, Restart, NoDriver]


def load_tests(loader, _tests, _pattern):
    return unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in ORDER)
