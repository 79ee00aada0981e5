"""What each role may do and what it needs: rights, sockets, and the order in which they start."""

import json
import os
import pathlib
import re
import subprocess
import time

from harness import process, seccomp, trio
from harness.environment import Case

STRANGER = 12345
# The distribution's, which every user may run; the one that runs this may be in root's home.
PYTHON = "/usr/bin/python3"
# Families that reach something outside this machine, or its configuration.
FAMILIES = {"AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16, "AF_PACKET": 17, "AF_VSOCK": 40}
AF_UNIX, SOCK_STREAM = 1, 1
SOCKETS = ("agent.sock", "serve.sock", "node.sock")
# What a connection that is not answered may take to be closed.
ANSWER_SECONDS = 3

CONNECT = """
import socket, sys
it = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
it.settimeout(float(sys.argv[2]))
try:
    it.connect(sys.argv[1])
    it.send(b'"Status"')
    print("said:", it.recv(1 << 17)[:100])
except socket.timeout:
    print("silence")
except OSError as error:
    print(type(error).__name__)
"""

# Listens where a role would, and writes down what it is told.
PLANT = """
import os, socket, sys, threading
it = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
it.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
it.listen(64)
print("ready", flush=True)
while True:
    peer, _ = it.accept()
    print("connected", flush=True)
    peer.settimeout(1)
    try:
        data, fds, _, _ = socket.recv_fds(peer, 1 << 17, 8)
        if data or fds:
            print("told:", len(fds), data[:200], flush=True)
    except OSError:
        pass
    peer.close()
"""


def status(pid: int, task: int | None = None) -> dict[str, str]:
    text = pathlib.Path(f"/proc/{pid}/task/{task or pid}/status").read_text()
    return dict(re.findall(r"^(\w+):[ \t]*(.*)$", text, re.M))


def inet_sockets(pid: int) -> list[str]:
    """Sockets of a process that are not the machine's own (Unix): which protocol's table has them."""
    inodes = {it.removeprefix("socket:[").removesuffix("]") for it in process.open_files(pid) if it.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6", "udplite", "raw", "raw6", "icmp", "packet", "netlink"):
        file = pathlib.Path(f"/proc/{pid}/net/{table}")
        if file.exists():
            found += [table for line in file.read_text().splitlines()[1:] if inodes & set(line.split())]
    return found


class Privileges(Case):
    def setUp(self):
        super().setUp()
        self.node = self.trio()
        self.node.must_publish("v", self.env.push("demo1"))
        self.assert_tree("demo1", self.node.target("v"))

    def serve_pids(self) -> list[int]:
        return [self.node.servers["serve"].pid, self.node.pid("serve")]

    def test_agent_and_serve_have_no_rights(self):
        """In every thread of every process: a user of their own, no capability, no way to get one."""
        for pid in (self.node.pid("agent"), *self.serve_pids()):
            for task in os.listdir(f"/proc/{pid}/task"):
                it = status(pid, int(task))
                self.assertEqual(set(it["Uid"].split() + it["Gid"].split()), {str(process.UNPRIVILEGED)}, it["Name"])
                self.assertEqual(it["Groups"], "")
                for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                    self.assertEqual(int(it[key], 16), 0, (it["Name"], key))
                self.assertEqual(it["NoNewPrivs"], "1")
        self.assertEqual(status(self.node.pid("node"))["Uid"].split()[0], "0", "the one that mounts")

    def test_serve_and_node_have_no_network(self):
        """No socket of a network is open, and none can be made: their own seccomp filters refuse it, in every thread."""
        for pid in (*self.serve_pids(), self.node.pid("node")):
            with self.subTest(command=pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()):
                self.assertEqual(inet_sockets(pid), [])
                for task in os.listdir(f"/proc/{pid}/task"):
                    self.assertEqual(status(pid, int(task))["Seccomp"], "2")
                filters = seccomp.filters(pid)
                for family, number in FAMILIES.items():
                    self.assertIn(seccomp.verdict(filters, "socket", number, SOCK_STREAM)[0], ("errno", "kill process"), family)
                # Another way to make a socket.
                self.assertIn(seccomp.verdict(filters, "io_uring_setup", 8)[0], ("errno", "kill process"))
                # By the numbers of another architecture the same call passes as another one.
                for arch in seccomp.OTHER_ARCHES:
                    self.assertIn(seccomp.verdict(filters, "socket", FAMILIES["AF_INET"], arch=arch)[0], ("errno", "kill process"), hex(arch))
                self.assertEqual(seccomp.verdict(filters, "socket", AF_UNIX, SOCK_STREAM)[0], "allow")
        # The agent has what these have not, so the check can fail.
        self.assertIn("tcp", inet_sockets(self.node.pid("agent")))

    def test_agent_has_nothing_of_fuse(self):
        self.assertEqual(self.node.fuse_fds("agent"), 0)
        self.assertEqual([self.node.fuse_fds(it) > 0 for it in ("serve", "node")], [True, True])

    def test_cache_belongs_to_the_agent_and_serve_need_not_write_it(self):
        owners = {(it.stat().st_uid, it.stat().st_gid) for it in [self.node.cache_dir, *self.node.cache_dir.rglob("*")]}
        self.assertEqual(owners, {(process.UNPRIVILEGED, process.UNPRIVILEGED)})
        self.assertEqual(self.node.run_dir.stat().st_mode & 0o777, 0o700)


class Own(Case):
    def test_makes_directories_and_gives_all_in_them(self):
        there, link = self.work / "there", self.work / "outside"
        (there / "a" / "b").mkdir(parents=True)
        (there / "a" / "file").write_text("x")
        link.write_text("not ours")
        (there / "a" / "link").symlink_to(link)
        node = self.trio(start=())
        process.run(*trio.OWN, node.binary, "own", "--uid", "65532", "--gid", "65533", there, self.work / "new" / "er")
        for path in (there, there / "a", there / "a" / "b", there / "a" / "file", self.work / "new" / "er"):
            self.assertEqual((path.stat().st_uid, path.stat().st_gid), (65532, 65533), path)
        self.assertEqual(there.stat().st_mode & 0o777, 0o700)
        self.assertEqual((self.work / "new" / "er").stat().st_mode & 0o777, 0o700)
        # A link is not followed: whoever had the directory before could have made it.
        self.assertEqual(link.stat().st_uid, 0)


class Sockets(Case):
    def as_user(self, uid: int, code: str, *arguments) -> subprocess.Popen:
        it = subprocess.Popen([*process.as_user(uid), "setpriv", "--pdeathsig", "KILL", PYTHON, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        self.addCleanup(it.stdout.close)
        self.addCleanup(it.wait)
        self.addCleanup(it.kill)
        return it

    def connect(self, node: trio.Trio, name: str, uid: int) -> str:
        return self.as_user(uid, CONNECT, node.run_dir / name, ANSWER_SECONDS).communicate()[0].strip()

    def test_another_user_is_not_answered(self):
        node = self.trio()
        for name in SOCKETS:
            self.assertEqual((node.run_dir / name).stat().st_mode & 0o777, 0o600, name)
            self.assertEqual(self.connect(node, name, STRANGER), "PermissionError", name)
        # Nor where the directory's and the sockets' modes would let it.
        node.run_dir.chmod(0o755)
        for name in SOCKETS:
            (node.run_dir / name).chmod(0o777)
            self.assertIn(self.connect(node, name, STRANGER), ("said: b''", "ConnectionResetError", "BrokenPipeError"), name)
        # Its own user is: what is refused above is the user and not the question.
        for name in ("serve.sock", "node.sock"):
            self.assertIn("clip_csi", self.connect(node, name, process.UNPRIVILEGED), name)
        self.assertEqual(process.run(*process.as_user(STRANGER), node.binary, "status", "--run-dir", node.run_dir, "serve", check=False).returncode == 0, False)
        self.assertEqual(process.run(*process.as_user(process.UNPRIVILEGED), node.binary, "status", "--run-dir", node.run_dir, "serve", check=False).returncode, 0)
        # All of that has hurt nobody.
        node.must_publish("v", self.env.push("small"))
        self.assert_tree("small", node.target("v"))

    def plant(self, node: trio.Trio, name: str) -> subprocess.Popen:
        """Another user's socket where a role listens: somebody has left the directory open."""
        (node.run_dir / name).unlink(missing_ok=True)
        node.run_dir.chmod(0o777)
        planted = self.as_user(STRANGER, PLANT, node.run_dir / name)
        self.assertEqual(planted.stdout.readline(), "ready\n")
        node.run_dir.chmod(0o700)
        return planted

    def told(self, planted: subprocess.Popen) -> list[str]:
        planted.kill()
        return planted.communicate()[0].splitlines()

    def test_a_planted_socket_gets_nothing(self):
        """No volume's secret, no FUSE connection; and who belongs there takes its place."""
        node = self.trio(config=self.config(node={"publish_wait_seconds": 1, "idle_source_seconds": 0}))
        node.must_publish("v", self.env.push("demo1"))
        secret = ".dockerconfigjson=" + json.dumps({"auths": {self.registry.host: {"username": "u", "password": "p"}}})
        for role in ("agent", "serve"):
            with self.subTest(role):
                node.kill(role)
                planted = self.plant(node, f"{role}.sock")
                reply = node.publish("x", self.env.push("small"), "--secret", secret)
                self.assertIn(reply.code, ("UNAVAILABLE", "ABORTED"), reply)
                told = self.told(planted)
                self.assertIn("connected", told, "nobody tried: the test shows nothing")
                self.assertEqual([it for it in told if it.startswith("told")], [])
                node.start(role)
                process.wait_until(lambda: node.publish("x", self.env.push("small")).ok, "the publish")
                self.assert_tree("small", node.target("x"))
                self.assert_tree("demo1", node.target("v"))
                node.must_unpublish("x")

    def test_a_run_directory_that_others_can_change_is_not_used(self):
        """Whoever may write there could put a socket in the place of a role's. It waits, or ends, and says why."""
        for owner, mode in ((STRANGER, 0o700), (process.UNPRIVILEGED, 0o777)):
            node = self.trio(f"owner-{owner}", start=())
            os.chown(node.run_dir, owner, owner)
            node.run_dir.chmod(mode)
            for role in ("agent", "serve"):
                with self.subTest(role, owner=owner, mode=oct(mode)):
                    server = node.launch(role)
                    process.wait_until(lambda: str(node.run_dir) in node.log_of(role).read_text(), f"{role} to say something of its directory", 5)
                    # Long enough for one that would listen.
                    time.sleep(0.3)
                    self.assertFalse((node.run_dir / f"{role}.sock").exists(), f"{role} listens there")
                    trio.kill_whole(server)


class Start(Case):
    def test_in_any_order(self):
        """Each waits for the others; until all are there a publish says what is missing, and works then."""
        reference = self.env.push("small")
        for order in (("node", "agent", "serve"), ("serve", "node", "agent"), ("agent", "serve", "node")):
            with self.subTest(order):
                node = self.trio("-".join(it[0] for it in order), self.config(node={"publish_wait_seconds": 1}), start=())
                for role in order:
                    node.start(role)
                    if "node" in node.servers and role != order[-1]:
                        reply = node.publish("v", reference)
                        self.assertIn(reply.code, ("UNAVAILABLE", "ABORTED"), reply)
                        missing = "agent" if "agent" not in node.servers else "serve"
                        self.assertIn(f"clip-csi {missing}", reply.message)
                process.wait_until(lambda: node.publish("v", reference).ok, "the publish", 10)
                self.assert_tree("small", node.target("v"))
                node.must_unpublish("v")
                self.assertEqual(node.stop(), [0, 0, 0])
                self.assertEqual(node.processes(), {})

    def test_metrics_of_all_roles_on_one_page(self):
        node = self.trio()
        node.must_publish("v", self.env.push("small"))
        self.assert_tree("small", node.target("v"))
        for role in trio.ROLES:
            self.assertGreater(node.metric("process_resident_memory_bytes", role=role), 1e6, role)
            self.assertGreater(node.metric("process_start_time_seconds", role=role), 1e9, role)
        self.assertEqual([node.metric(it) for it in ("mounts", "volumes", "serve_up")], [1, 1, 1])
        self.assertGreater(node.metric("fuse_requests_total"), 0)
        self.assertEqual(len(node.metrics()), len(set(node.metrics())))
        # One that is away takes its part of the page with it and nothing else.
        node.kill("serve")
        self.assertEqual(node.metric("process_resident_memory_bytes", role="serve"), 0)
        process.wait_until(lambda: node.metric("serve_up") == 0, "serve to be missed")
        self.assertGreater(node.metric("process_resident_memory_bytes", role="agent"), 1e6)
