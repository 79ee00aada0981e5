"""Runs commands and servers, waits for them without fixed sleeps, and takes down what it started."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

# How long a server or a state may take on a loaded two-core machine.
READY_SECONDS = 30
# Between the first two looks at a condition, and at most; a look may cost more than the wait for what is looked at.
POLL_SECONDS, MAX_POLL_SECONDS = 0.005, 0.1


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


class Failed(Exception):
    """A command or a wait that failed, with what it printed."""


def run(*command, check=True, env=None, timeout=600, cwd=None, stdin: str | None = None) -> subprocess.CompletedProcess:
    """Runs a command to its end; with check, raises Failed with its output unless it exits with 0."""
    words = [os.fspath(word) if not isinstance(word, bytes) else word for word in command]
    full_env = {**os.environ, **env} if env else None
    done = subprocess.run(words, capture_output=True, text=True, errors="backslashreplace", env=full_env, timeout=timeout, cwd=cwd,
                          **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}))
    if check and done.returncode != 0:
        raise Failed(f"{' '.join(map(str, words))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def wait_until(condition, what: str, seconds: float = READY_SECONDS, most_pause: float = MAX_POLL_SECONDS):
    """The first true value of `condition`, asked again and again; Failed when time is up. Whoever measures how long it took says how long a pause may be."""
    deadline, pause = time.monotonic() + seconds, POLL_SECONDS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failed(f"waited {seconds} s in vain for: {what}")
        time.sleep(pause)
        # Who has waited long may learn of it a little later.
        pause = min(pause * 1.2, most_pause)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# As the chart runs what needs no rights: a user of its own, no capability and no way to one.
UNPRIVILEGED = 65532


def as_user(uid: int) -> list[str]:
    """The words before a command that is to run as this user without any privilege."""
    return ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--bounding-set", "-all", "--inh-caps", "-all", "--no-new-privs"]


class Server:
    """A process that runs until it is stopped. Its output goes to files that the caller names."""

    def __init__(self, command, stdout: pathlib.Path, stderr: pathlib.Path | None = None, env=None, prefix=()):
        """`prefix` is a command that becomes the server, such as `as_user`."""
        self.command = [os.fspath(word) for word in command]
        # It ends with this program, even by `kill -9`. To the kernel that means with the thread that started it.
        # After the prefix, because a change of user takes that back.
        tied = ["setpriv", "--pdeathsig", "KILL"] if threading.current_thread() is threading.main_thread() else []
        self.stdout, self.stderr = stdout, stderr or stdout
        with open(stdout, "ab") as out, open(self.stderr, "ab") as err:
            self.process = subprocess.Popen(
                [*prefix, *tied, *self.command], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env={**os.environ, **env} if env else None,
                # Its own group, so that ^C reaches this program first, which then takes it down.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self, ready, what: str, seconds: float = READY_SECONDS) -> None:
        def condition():
            if not self.alive():
                tail = self.stderr.read_text(errors="backslashreplace")[-2000:]
                raise Failed(f"{what} ended with {self.process.returncode} before it was ready:\n{tail}")
            return ready()
        wait_until(condition, f"{what} to be ready", seconds)

    def stop(self, seconds: float = 10) -> int:
        """Asks it to end, kills it when it does not; its exit status."""
        if self.alive():
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """kill -9, and waits until it is gone."""
        if self.alive():
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Here:
    """Where services run by default: this machine, its loopback. The cluster's machines are such places, too."""

    address = "127.0.0.1"
    server = Server
    listens = staticmethod(listens)

    def connect(self, port: int, timeout: float = 10) -> socket.socket:
        return socket.create_connection((self.address, port), timeout)


def unescape_mountinfo(text: str) -> str:
    """Undoes mountinfo's \\040 style of escapes."""
    raw = text.encode()
    for code in (b"\\040", b"\\011", b"\\012"):
        raw = raw.replace(code, bytes([int(code[1:], 8)]))
    return os.fsdecode(raw.replace(b"\\134", b"\\"))


def mounts_below(directory) -> list[str]:
    """Mount points at or below a directory, deepest and newest first. Never touches the mounts."""
    top = os.path.realpath(directory)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [unescape_mountinfo(line.split(" ")[4]) for line in file]
    return [point for point in reversed(points) if point == top or point.startswith(top + "/")]


def unmount_below(directory) -> None:
    """Lazily, because whoever served a mount may be dead."""
    for point in mounts_below(directory):
        subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL, check=False)


def open_files(pid: int) -> list[str]:
    """What a process has open, as /proc names it: '/dev/fuse', 'socket:[1]', a path."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def dead(pid: int) -> bool:
    """Gone, or only to be waited for: until its last thread has ended, that a process was killed shows on its first thread alone."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except OSError:
        return True


def children_of(pid: int) -> list[int]:
    """Children of all its threads; none if it is gone."""
    found = []
    for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


# In a scratch directory: who made it.
OWNER = "owner.pid"


def remove_of_dead_runs(parent: pathlib.Path) -> None:
    """Removes scratch directories of runs that were killed before they could."""
    for owner in parent.glob(f"*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            if not pathlib.Path("/proc", str(int(owner.read_text()))).exists():
                unmount_below(owner.parent)
                if not mounts_below(owner.parent):
                    shutil.rmtree(owner.parent, ignore_errors=True)


@contextlib.contextmanager
def workspace(prefix: str, keep: bool = False):
    """A scratch directory; what is mounted below it is unmounted and it is removed in any case.

    Not in /tmp, which may be a tmpfs: the truth needs device nodes and capabilities, and the
    measurements a disk. Whoever knows a name in it may use that, because parts of the program
    under test run as a user without rights.
    """
    from . import paths

    parent = paths.scratch()
    parent.mkdir(exist_ok=True)
    if parent.stat().st_uid != os.geteuid():
        raise Failed(f"{parent} belongs to another user: remove it")
    remove_of_dead_runs(parent)
    directory = pathlib.Path(tempfile.mkdtemp(prefix=prefix + ".", dir=parent))
    directory.chmod(0o711)
    (directory / OWNER).write_text(str(os.getpid()))

    def on_signal(number, _frame):
        # What ^C raises, because a test that fails by anything else is followed by the next one.
        raise KeyboardInterrupt(signal.Signals(number).name)

    old = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield directory
    finally:
        unmount_below(directory)
        for number, handler in old.items():
            signal.signal(number, handler)
        left = mounts_below(directory)
        if left:
            # Removing through a mount would remove what is mounted.
            say(f"left in place, because it could not be unmounted: {left}")
        elif keep:
            say(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
            if directory.exists():
                # Something wrote to it meanwhile: the next run will find it.
                (directory / OWNER).write_text(str(os.getpid()))
