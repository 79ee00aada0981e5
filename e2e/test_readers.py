"""Tests of the readers: on an unpacked image they find nothing, and each kind finds what it is for."""

import os
import pathlib
import signal
import tempfile
import time
import unittest

import readers
from harness import environment, process, reading

IMAGE = "demo1"
SECONDS = 1.0


class Readers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # In the run's scratch directory, if it is part of a run.
        directory = tempfile.TemporaryDirectory(prefix="readers.", dir=environment.shared and environment.shared.work)
        cls.work = pathlib.Path(directory.name)
        cls.addClassCleanup(directory.cleanup)
        cls.plan = reading.plan(cls.work, IMAGE)

    def setUp(self):
        self.top = self.work / self.id()
        for tar in sorted(self.work.glob(f"{IMAGE}.*.tar")):
            self.top.mkdir(exist_ok=True)
            process.run("tar", "-C", self.top, "--xattrs", "-xpf", tar)
        # As the image has it: no layer has an entry for the root.
        os.utime(self.top, (0, 0))

    def read(self, kinds=readers.KINDS) -> reading.Report:
        started = reading.Readers(self.top, self.plan, 1, kinds=kinds)
        time.sleep(SECONDS)
        return started.stop()

    def kinds_with_errors(self, kinds=readers.KINDS) -> set[str]:
        return {it.partition(":")[0] for it in self.read(kinds).errors}

    def test_nothing_is_found_where_nothing_is_wrong(self):
        report = self.read()
        self.assertEqual(report.errors, [])
        self.assertEqual(set(report.operations), set(readers.KINDS))
        for kind, count in report.operations.items():
            self.assertGreater(count, 10, kind)

    def test_a_wrong_byte(self):
        for path in self.top.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size:
                info = path.stat()
                data = path.read_bytes()
                path.write_bytes(bytes(byte ^ 1 for byte in data))
                os.utime(path, ns=(info.st_mtime_ns, info.st_mtime_ns))
        # A program that is damaged does not run.
        self.assertEqual(self.kinds_with_errors(), {"sequential", "random", "direct", "mmap", "held", "exec"})

    def test_a_wrong_mode(self):
        for path in list(self.top.rglob("*"))[::50]:
            if path.is_dir():
                path.chmod(0o700)
        self.assertEqual(self.kinds_with_errors(("walk",)), {"walk"})

    def test_a_missing_name(self):
        for path in [it for it in self.top.rglob("*") if it.is_file()][::20]:
            path.unlink()
        self.assertEqual(self.kinds_with_errors(("walk",)), {"walk"})

    def test_a_mapped_file_that_ends(self):
        """SIGBUS is what an error is to who reads by page faults."""
        for path in self.top.rglob("*"):
            if path.is_file() and not path.is_symlink():
                os.truncate(path, 1)
        report = self.read(("mmap",))
        self.assertTrue(report.errors and report.errors[0].startswith("mmap"), report.errors)

    def test_a_reader_that_hangs(self):
        started = reading.Readers(self.top, self.plan, 1, kinds=("random",))
        os.kill(started.started["random"].pid, signal.SIGSTOP)
        reading.END_SECONDS, before = 1, reading.END_SECONDS
        try:
            self.assertEqual(started.stop().errors, ["random: hangs"])
        finally:
            reading.END_SECONDS = before
            started.started["random"].wait()

    def test_pauses(self):
        report = reading.Report({}, 0, [], [(0.0, 1.0), (2.0, 5.0), (6.0, 6.5)])
        self.assertEqual(report.pauses([(0.5, 0.6), (1.1, 1.9), (3.0, 7.0)]), [1.0, 0.0, 3.0])
        self.assertEqual(report.outside([(0.5, 0.6), (3.0, 4.0)]), [0.5])
        self.assertEqual(reading.spread([0.001 * number for number in range(1, 101)]), "51.0/100.0/100.0 ms")


if __name__ == "__main__":
    unittest.main()
