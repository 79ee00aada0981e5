#!/usr/bin/env python3
"""The end-to-end tests: the program, a real registry, a real Redis, real images, a real Kubernetes.

usage: run.py [-k PATTERN]... [--cases NAME,NAME...] [--without-kubernetes] [--list] [--failfast] [--keep]

Needs root and a built program (`make e2e` builds it); takes down all that it puts up. Ends with a table
of the cases and their times; the last line counts: "N passed, N failed, N skipped". Seeds are printed,
CLIP_E2E_SEED sets them. A case is named by its method, its class or its module, without `test_` and `e2e_`; the first
word of a module's name is enough: prewarm is also prewarm_agents.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

from harness import environment, paths, process

# Run at the same time, each in a process with a registry and a directory of its own. General and cheap is first.
LANES = {
    "node": ["test_tree", "test_images", "test_readers", "test_testregistry", "test_bench", "test_sim", "e2e_tree", "e2e_sharing", "e2e_csi", "e2e_attributes", "e2e_mirrors", "e2e_credentials", "e2e_bad_input",
             "e2e_roles", "e2e_memory"],
    # What needs the S3 server comes last: that may still be built.
    "tiers": ["e2e_prefetch", "e2e_index", "e2e_toc", "e2e_remote", "e2e_warm"],
    "cache": ["e2e_cache", "e2e_kernel", "e2e_crash"],
    "restarts": ["e2e_restart"],
    "kills": ["e2e_kill"],
    # Helm alone; an API server without a cluster.
    "chart": ["test_chart"],
    "agents": ["e2e_prewarm_agents"],
    # Each of these two has a cluster of its own, and mostly waits.
    "cluster": ["e2e_cluster", "e2e_rights", "e2e_claims", "e2e_prewarm"],
    "operations": ["e2e_rollout", "e2e_operations"],
}
# Those that need what is built of Kubernetes, which takes minutes.
KUBERNETES = {"chart", "agents", "cluster", "operations"}
# The others make way for the lanes that take longest, and for what these wait for.
LONGEST = {"cluster", "operations", "kills"}
MAKES_WAY = 7


@dataclasses.dataclass
class Row:
    """A test that has ended, and how: ok, FAIL, skip or cut."""

    what: str
    seconds: float
    part: str
    case: str


class Result(unittest.TextTestResult):
    """Prints one line a test, with its time, and keeps it for the table."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.table: list[Row] = []
        Result.last = self

    def startTest(self, test):
        super().startTest(test)
        self.begin = time.monotonic()

    def stopTest(self, test):
        super().stopTest(test)
        bad = {id(it) for it in self.unexpectedSuccesses} | {id(it) for it, _ in [*self.failures, *self.errors]} | {id(getattr(it, "test_case", it)) for it, _ in [*self.failures, *self.errors]}
        skipped = {id(it): why for it, why in self.skipped}
        # Nothing has been said of a test in whose middle the run is ended.
        cut = sys.exc_info()[0] is KeyboardInterrupt
        what = "cut" if cut else "FAIL" if id(test) in bad else "skip" if id(test) in skipped else "ok"
        why = f" ({skipped[id(test)]})" if id(test) in skipped else ""
        seconds = time.monotonic() - self.begin
        print(f"{what:<4}  {seconds:6.1f} s  {test.id()}{why}", flush=True)
        self.table.append(Row(what, seconds, *names(test)))


def print_table(table: list[Row]) -> None:
    print(f"\n{'case':<72} {'part':<14} {'time':>8}  result")
    for row in table:
        print(f"{row.case:<72} {row.part:<14} {row.seconds:6.1f} s  {row.what}")
    print()


def names(test: unittest.TestCase) -> tuple[str, str]:
    """The short names of a test's module and of the test: e2e_cluster.Install.test_inline is cluster and inline."""
    module, _, method = test.id().partition(".")[0], *test.id().rpartition(".")[1:]
    return module.removeprefix("e2e_").removeprefix("test_").replace("_", "-"), method.removeprefix("test_").replace("_", "-")


def chosen_by(test: unittest.TestCase) -> set[str]:
    """What --cases may call it. Its class as well, and its module's first word, because what belongs together may be in two modules."""
    module, method = names(test)
    return {module, module.partition("-")[0], method, type(test).__name__.lower()}


def tests_of(suite):
    for it in suite:
        if isinstance(it, unittest.TestSuite):
            yield from tests_of(it)
        else:
            yield it


def run_here(chosen: list[unittest.TestCase], args: argparse.Namespace) -> list[Row]:
    """Runs the tests one after another in this process."""
    with process.workspace("e2e", keep=args.keep) as work, environment.Environment(work) as shared:
        environment.shared = shared
        runner = unittest.TextTestRunner(stream=sys.stdout, resultclass=Result, verbosity=0, failfast=args.failfast)
        try:
            result = runner.run(unittest.TestSuite(chosen))
        except KeyboardInterrupt as interrupt:
            # What has failed so far is why somebody has had enough.
            Result.last.printErrors()
            print_table(Result.last.table)
            print(f"run.py: ended by {interrupt or 'SIGINT'}", file=sys.stderr)
            result = None
        left = [*shared.take_down_cluster(), *process.mounts_below(work), *environment.children_left()]
    if result is None:
        sys.stdout.flush()
        # Not `sys.exit`, which waits for all threads: one may be reading a mount that nobody serves. What was started and
        # lives ends with this process, which frees it.
        os._exit(1)
    table = result.table
    for test, _ in [*result.failures, *result.errors]:
        # No test, but a class or a module that fails before its first one.
        if not isinstance(test, unittest.TestCase):
            table.append(Row("FAIL", 0, "", str(test)))
    if left:
        print(f"FAIL  left behind: {left}")
        table.append(Row("FAIL", 0, "", "nothing is left behind"))
    return table


def run_lanes(lanes: list[str], words: list[str]) -> list[Row]:
    """Runs the tests of each lane in a process of its own, at the same time. A lane that ends without a word is a failure."""
    with tempfile.TemporaryDirectory() as directory:
        reports = [pathlib.Path(directory, lane) for lane in lanes]
        children = [subprocess.Popen([sys.executable, __file__, *words, "--lane", lane, "--report", report]) for lane, report in zip(lanes, reports)]
        # They are ended by what ends this process, and take down what they put up; ^C reaches them without our doing.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _frame: [it.send_signal(number) for it in children])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for child in children:
            child.wait()
        table = []
        for lane, report in zip(lanes, reports):
            table += [Row(**it) for it in json.loads(report.read_text())] if report.exists() else [Row("cut", 0, lane, "the lane was ended")]
        return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", action="append", metavar="PATTERN", default=[], help="only tests whose name has it, or matches it")
    parser.add_argument("--cases", metavar="NAME,NAME...", default="", help="only these cases, or all of these parts")
    parser.add_argument("--without-kubernetes", action="store_true", help="only what needs neither Kubernetes nor Helm")
    parser.add_argument("--list", action="store_true", help="print the tests' names and end")
    parser.add_argument("--failfast", action="store_true", help="end at the first failure; one test after another, in one process")
    parser.add_argument("--keep", action="store_true", help="leave logs and caches for a look")
    parser.add_argument("--lane", choices=LANES, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    every = {test: lane for lane, modules in LANES.items() for test in tests_of(unittest.defaultTestLoader.loadTestsFromNames(modules))}
    cases = {it.strip() for it in args.cases.split(",") if it.strip()}
    unknown = cases - {name for test in every for name in chosen_by(test)}
    if unknown:
        sys.exit(f"run.py: no case is called {', '.join(sorted(unknown))}; --list prints all")
    chosen = [
        test for test, lane in every.items()
        if (not args.k or any(pattern in test.id() or fnmatch.fnmatch(test.id(), pattern) for pattern in args.k))
        and (not cases or cases & chosen_by(test))
        and args.lane in (None, lane)
        and not (args.without_kubernetes and lane in KUBERNETES)
    ]
    if args.list:
        print("\n".join(test.id() for test in chosen))
        return
    if os.geteuid() != 0:
        sys.exit("run.py: run as root: mounting needs it")
    if not paths.binary().exists():
        sys.exit(f"run.py: no {paths.binary()}: build it with `make build`, or name one in CLIP_CSI_BIN")
    if not chosen:
        sys.exit("run.py: no test has such a name; --list prints all")

    if args.lane and args.lane not in LONGEST:
        os.nice(MAKES_WAY)
    lanes = sorted({every[test] for test in chosen})
    table = run_here(chosen, args) if len(lanes) == 1 or args.failfast else run_lanes(lanes, sys.argv[1:])
    if args.report:
        args.report.write_text(json.dumps([dataclasses.asdict(it) for it in table]))
        return
    print_table(table)
    counts = {what: sum(it.what == what for it in table) for what in ("ok", "FAIL", "skip", "cut")}
    print(f"{counts['ok']} passed, {counts['FAIL'] + counts['cut']} failed, {counts['skip']} skipped")
    sys.exit(0 if counts["ok"] and not counts["FAIL"] + counts["cut"] else 1)


if __name__ == "__main__":
    main()
