"""Samples taken in turns, what is said of them, and bounds that are held or missed."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import resource
import statistics
import time

from harness import paths, process
from harness.table import print_table

ROUNDS = 5


@dataclasses.dataclass
class Sample:
    """One run of one case. What of CPU and bytes is meant, the part's table says."""

    seconds: float
    cpu_seconds: float = 0.0
    bytes: int = 0
    operations: int = 0


@dataclasses.dataclass
class Samples:
    """All runs of one case."""

    all: list[Sample] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [it.seconds for it in self.all]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p90(self) -> float:
        return p90(self.seconds)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(it.cpu_seconds for it in self.all)

    @property
    def bytes(self) -> float:
        return statistics.median(it.bytes for it in self.all)


def p90(values: list[float]) -> float:
    """The least value that nine tenths do not exceed; of five it is the greatest."""
    return sorted(values)[math.ceil(0.9 * len(values)) - 1]


def interleaved(cases: dict, rounds: int = ROUNDS, prepare=lambda: None, fewer: dict | None = None) -> dict[object, Samples]:
    """Runs each case once a round, because the machine is not the same from one minute to the next.

    `cases` are functions of the round's number that return a Sample; `prepare` is called before each.
    Those in `fewer` run in as many first rounds only: they have no bound, and take long.
    """
    out = {name: Samples() for name in cases}
    for number in range(rounds):
        for name, case in cases.items():
            if number < (fewer or {}).get(name, rounds):
                prepare()
                out[name].all.append(case(number))
    return out


def settle() -> None:
    """Lets what was written before reach the disk, so that nobody pays for another one's writes."""
    os.sync()


def timed(action) -> Sample:
    """Runs it, and counts the CPU time of the child processes that ended meanwhile."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    action()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def cpu_of(pid: int) -> float:
    """CPU seconds that a process has used so far, in the kernel's ticks of 10 ms."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@functools.cache
def program(name: str) -> pathlib.Path:
    """A program of benches/, built in the profile of what ships."""
    lines = process.run("cargo", "build", "--profile", "dist", "--locked", "--bench", name, "--message-format", "json", cwd=paths.REPO, timeout=1200).stdout
    made = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    return next(pathlib.Path(it["executable"]) for it in made if it.get("executable") and it["target"]["name"] == name)


class Verdicts:
    """What became of each bound. Printed as it comes; counted at the end."""

    def __init__(self):
        self.counts = {"held": 0, "missed": 0, "SKIP": 0}

    def bound(self, held: bool, text: str) -> None:
        self._say("held" if held else "missed", text)

    def at_most(self, what: str, value: float, limit: float, unit: str = "") -> None:
        self.bound(value <= limit, f"{what}: {value:.3g}{unit} (<= {limit:g}{unit})")

    def at_least(self, what: str, value: float, limit: float, unit: str = "") -> None:
        self.bound(value >= limit, f"{what}: {value:.2f}{unit} (>= {limit:g}{unit})")

    def exactly(self, what: str, value: int, wanted: int) -> None:
        self.bound(value == wanted, f"{what}: {value} ({wanted})")

    def skip(self, what: str, why: str) -> None:
        """A case that cannot run on this machine, or with this program."""
        self._say("SKIP", f"{what}: {why}")

    def _say(self, state: str, text: str) -> None:
        self.counts[state] += 1
        print(f"{state:<6}  {text}", flush=True)

    def last_line(self) -> str:
        skipped = f", {self.counts['SKIP']} skipped" if self.counts["SKIP"] else ""
        return f"bounds: {self.counts['held']} held, {self.counts['missed']} missed{skipped}"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1000:.3g} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def table(first: str, columns: list[str], rows: list[list[str]]) -> None:
    print()
    print_table([[first, *columns], *rows])
    print(flush=True)


def cases_table(first: str, samples: dict, base=None) -> None:
    """Median, p90, CPU seconds and bytes of each case, and its ratio to the one called `base`."""
    rows = []
    for name, it in samples.items():
        ratio = [f"{it.median / samples[base].median:.2f}"] if base is not None else []
        rows.append([str(name), seconds_text(it.median), seconds_text(it.p90), f"{it.cpu_seconds:.2f} s", f"{it.bytes / 1e6:.1f} MB" if it.bytes else "-", *ratio])
    table(first, ["median", "p90", "CPU", "bytes", *(["ratio"] if base is not None else [])], rows)
