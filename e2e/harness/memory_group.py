"""A control group that bounds memory, of version 1 or 2, and what presses against its bound."""

import pathlib
import subprocess
import sys

from cluster import cgroups

from . import process

# Allocates so many MiB in its group, and keeps them until it is ended.
HOG = """
import sys, time
held = []
while True:
    if len(held) < int(sys.argv[1]):
        held.append(bytearray(b"x" * (1 << 20)))
    time.sleep(0.001)
"""


class MemoryGroup:
    """Made for one test; `prefix` starts a server in it."""

    def __init__(self, name: str, limit_bytes: int):
        self.name = cgroups.name_of(name)
        self.v2 = cgroups.unified()
        self.path = (cgroups.TOP if self.v2 else cgroups.TOP / "memory") / self.name
        self.path.mkdir()
        try:
            (self.path / ("memory.max" if self.v2 else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        except OSError:
            self.remove()
            raise
        self.limit_bytes = limit_bytes

    @property
    def prefix(self) -> list[str]:
        return ["sh", "-c", 'echo $$ >"$0"/cgroup.procs && exec "$@"', str(self.path)]

    def oom_kills(self) -> int:
        for line in (self.path / ("memory.events" if self.v2 else "memory.oom_control")).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        raise process.Failed(f"{self.path} counts no OOM kills")

    def press(self, until, what: str) -> None:
        """Takes memory in the group until the condition holds, then gives it back."""
        hog = subprocess.Popen([*self.prefix, "setpriv", "--pdeathsig", "KILL", sys.executable, "-c", HOG, str(2 * self.limit_bytes >> 20)], stdin=subprocess.DEVNULL)
        try:
            process.wait_until(lambda: until() or hog.poll() is not None, what)
            if not until():
                raise process.Failed(f"what presses ended itself, with {hog.returncode}, before: {what}")
        finally:
            hog.kill()
            hog.wait()

    def remove(self) -> None:
        cgroups.remove(self.name)


def why_not() -> str | None:
    """Why no such group can be made here, or None if one can."""
    try:
        MemoryGroup("try", 64 << 20).remove()
    except OSError as error:
        return f"no memory control group can be made: {error}"
    return None
