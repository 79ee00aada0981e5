"""A control group that bounds memory, of version 1 or 2, and what presses against its bound."""

import pathlib
import subprocess
import sys

from cluster import cgroups

from . import process

# Fills its group with a file in memory: that cannot be reclaimed, and makes none of the processes bigger, so that
# the kernel kills the one that `oom_score_adj` names. Slowly, because the bound is to be met once.
HOG = """
import os, time
file = os.memfd_create("hog")
while True:
    os.write(file, bytes(256 << 10))
    time.sleep(0.002)
"""
FIRST_TO_DIE = 1000


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

    @property
    def prefix(self) -> list[str]:
        return ["sh", "-c", 'echo $$ >"$0"/cgroup.procs && exec "$@"', str(self.path)]

    def oom_kills(self) -> int:
        for line in (self.path / ("memory.events" if self.v2 else "memory.oom_control")).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        raise process.Failed(f"{self.path} counts no OOM kills")

    def peak_bytes(self) -> int:
        """The most that the group ever held, its page cache included."""
        return int((self.path / ("memory.peak" if self.v2 else "memory.max_usage_in_bytes")).read_text())

    def press(self, victim: int) -> None:
        """Takes memory in the group until the kernel has killed the victim, then gives it back."""
        pathlib.Path(f"/proc/{victim}/oom_score_adj").write_text(str(FIRST_TO_DIE))
        begin = self.oom_kills()
        hog = subprocess.Popen([*self.prefix, "setpriv", "--pdeathsig", "KILL", sys.executable, "-c", HOG], stdin=subprocess.DEVNULL)

        def done() -> bool:
            return self.oom_kills() > begin and process.dead(victim)

        try:
            process.wait_until(lambda: done() or hog.poll() is not None, f"process {victim} to be OOM-killed")
            if not done():
                raise process.Failed(f"what presses on {self.path} ended with {hog.returncode}, and process {victim} lives")
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
