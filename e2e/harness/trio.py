"""Runs the program under test as the chart does: agent, serve and node, three processes of one node."""

import contextlib
import os
import pathlib
import signal
import subprocess
import urllib.request

from . import driver, process

# In the order of the chart's pods; any other does as well.
ROLES = ("agent", "serve", "node")
# For `own`, which prepares the directories, as the chart gives them to its init container.
OWN = ["setpriv", "--bounding-set", "-all,+chown,+dac_override,+fowner", "--inh-caps", "-all", "--no-new-privs"]
PROBE_SECONDS = 5


class Trio(driver.Driver):
    """`clip-csi agent` and `serve` as a user without rights, `clip-csi node` as root, with one run directory."""

    def __init__(self, directory: pathlib.Path, config: pathlib.Path, binary: pathlib.Path, *, cache_dir: pathlib.Path | None = None,
                 options=None, env=None, start=ROLES):
        """`binary` is where every user may run it. `options` and `env` are by role: {"agent": ["--log-format", "json"]}; `start` are the roles to begin with."""
        super().__init__(directory, config, cache_dir=cache_dir)
        # Others may go through, which `mkdtemp` forbids.
        for it in (directory.parent, directory):
            it.chmod(0o711)
        self.run_dir = directory / "run"
        assert len(str(self.run_dir / "agent.sock.new")) < 108, f"too long for a socket: {self.run_dir}"
        self.binary, self.options, self.env = binary, options or {}, env or {}
        self.servers: dict[str, process.Server] = {}
        self.launched: list[process.Server] = []
        self.prepare()
        if start:
            self.start(*start)

    # --- starting and ending ---

    def prepare(self) -> None:
        """The init container's part."""
        process.run(*OWN, self.binary, "own", "--uid", str(process.UNPRIVILEGED), "--gid", str(process.UNPRIVILEGED), self.run_dir, self.cache_dir)

    def command(self, role: str) -> list:
        common = ["--run-dir", self.run_dir, "--config", self.config]
        return [self.binary, role, *common, *{
            "agent": ["--cache-dir", self.cache_dir, "--metrics-addr", f"127.0.0.1:{self.metrics_port}"],
            "serve": ["--cache-dir", self.cache_dir],
            "node": ["--endpoint", f"unix://{self.socket}", "--node-id", self.directory.name, "--state-dir", self.state_dir],
        }[role], *self.options.get(role, [])]

    def launch(self, role: str, *, env=None, prefix=()) -> process.Server:
        """One more process of a role, not waited for, and not the one that `kill` and `stop` mean."""
        prefix = [*prefix, *([] if role == "node" else process.as_user(process.UNPRIVILEGED))]
        self.launched.append(process.Server(self.command(role), stdout=self.log_of(role), env={**self.env.get(role, {}), **(env or {})}, prefix=prefix))
        return self.launched[-1]

    def start(self, *roles: str, env=None, prefix=(), wait=True) -> None:
        """Also the restart after a kill: everything is where it was. All roles when none is named."""
        for role in roles or ROLES:
            assert role not in self.servers or not self.servers[role].alive(), f"{role} runs"
            self.servers[role] = self.launch(role, env=env, prefix=prefix)
        for role in (roles or ROLES) if wait else ():
            self.servers[role].wait_ready(lambda role=role: self.answers(role), f"clip-csi {role}")

    def answers(self, role: str) -> bool:
        if role == "node":
            return self.socket.exists() and self.csi("probe").ok
        if role == "serve":
            return process.run(self.binary, "status", "--run-dir", self.run_dir, "serve", check=False, timeout=PROBE_SECONDS).returncode == 0
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/healthz", timeout=PROBE_SECONDS).status == 200
        except OSError:
            return False

    def kill(self, *roles: str) -> None:
        """kill -9 of whole roles, all when none is named: serve dies with the child that serves, as a container does."""
        for server in [self.servers[role] for role in roles or ROLES]:
            kill_whole(server)
        for server in [self.servers[role] for role in roles or ROLES]:
            server.process.wait()

    def end(self) -> None:
        """Kills all that was ever launched, and detaches what is mounted: whatever waits for an answer gets an error."""
        for server in self.launched:
            kill_whole(server)
        for server in self.launched:
            server.process.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.unmount_below(self.directory)

    def restart(self, *roles: str, **settings) -> None:
        self.kill(*roles)
        self.start(*roles, **settings)

    def stop(self, *roles: str) -> list[int]:
        """SIGTERM, and the exit statuses. All roles when none is named."""
        return [self.servers[role].stop() for role in roles or ROLES if role in self.servers]

    # --- serve: a parent, and the child that serves ---

    def serving(self) -> int | None:
        """The process that serves, or None while there is none."""
        children = process.children_of(self.servers["serve"].pid)
        return children[0] if children else None

    def kill_child(self) -> None:
        """kill -9 of what serves; its parent starts another one."""
        child = process.wait_until(self.serving, "a process that serves")
        os.kill(child, signal.SIGKILL)

    def hand_over(self, **settings) -> process.Server:
        """Starts another serve, which takes the mounts over as in an upgrade; the former one, which has nothing to do any more."""
        former, child = self.servers["serve"], self.serving()
        self.servers["serve"] = self.launch("serve", **settings)
        self.servers["serve"].wait_ready(lambda: not process.children_of(former.pid) and self.serving() not in (None, child) and self.answers("serve"),
                                         "another serve to have taken over")
        return former

    # --- what is there ---

    def pid(self, role: str) -> int:
        """The process that does a role's work."""
        return process.wait_until(self.serving, "a process that serves") if role == "serve" else self.servers[role].pid

    def memory(self, role: str) -> dict[str, int]:
        return driver.memory_of(self.pid(role))

    def log_of(self, role: str) -> pathlib.Path:
        return self.directory / f"log.{role}"

    def tail(self, lines: int = 15) -> str:
        return "\n".join(f"{role}:\n{driver.last_lines(self.log_of(role), lines)}" for role in ROLES)

    def processes(self) -> dict[int, str]:
        """All that run the program on this node, by pid: also those that nobody should have left."""
        found = {}
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                program = os.readlink(entry / "exe")
                command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            # A name that was taken off a running program has a remark behind it.
            if program.startswith(f"{self.binary.parent}/") and str(self.run_dir) in command:
                found[int(entry.name)] = f"{program}: {command}"
        return found

    def fuse_fds(self, role: str) -> int:
        return process.open_files(self.pid(role)).count("/dev/fuse")

    def left_behind(self) -> list[str]:
        """Also processes that no role accounts for, and what the roles keep open of volumes that are gone."""
        found = super().left_behind()
        known = {it.pid for it in self.servers.values()} | {self.serving()}
        found += [f"process {pid}: {command}" for pid, command in self.processes().items() if pid not in known]
        for role in ROLES:
            if self.servers[role].alive():
                for path in process.open_files(self.pid(role)):
                    # Not the cache's own files, such as its lock: those of layers and images.
                    if path == "/dev/fuse" or any(path.startswith(f"{self.cache_dir}/{below}/") for below in ("layers", "images")):
                        found.append(f"{role} has {path} open")
        return found


def kill_whole(server: process.Server) -> None:
    """With its children: it leads a session of its own, so they are in its group."""
    # Once it was waited for, the number may be another's.
    if server.process.returncode is None:
        os.killpg(server.pid, signal.SIGKILL)


def answers(directory, seconds: float = 20) -> bool:
    """Whether whoever serves a mount answers. In a process that may be left hanging: not even kill -9 ends a wait for an answer."""
    asked = subprocess.Popen(["stat", "--file-system", directory], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return asked.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        asked.kill()
        return False
