"""Pods that read a mounted image without end (readers.py), and their report."""

import itertools
import json
import pathlib
import shutil

import readers
from harness import paths, process, reading

from .case import DriverCase
from .pods import pod

# Where the pods have readers.py and its plan, on the node and in the pod.
PLACE = "/var/lib/e2e/readers"
# The readers' own image has the Python that they run; kubelet pulls it, and the driver has no part in it.
RUNNER = "debian-python"
# Which readers each node gets: all kinds, and not so many at once that two cores do nothing else.
SHARES = (("sequential", "mmap", "held"), ("direct", "random", "walk", "exec"))


class ReaderPods:
    """One pod per kind of reading, spread over the nodes."""

    def __init__(self, case: DriverCase, image: str, nodes: list[str], seed: int, without=()):
        """`without` are kinds that the file system has not."""
        self.case, self.names = case, {}
        assert sorted(itertools.chain(*SHARES)) == sorted(readers.KINDS)
        for node in nodes:
            place = case.cluster.nodes[node].path(PLACE)
            self._lay_out(place, image)
            case.addCleanup(shutil.rmtree, place, ignore_errors=True)
        runner, reference = case.cluster.push(RUNNER), case.cluster.push(image)
        pods = []
        for node, kinds in zip(nodes, SHARES):
            for kind in (it for it in kinds if it not in without):
                name = f"reads-{kind}"
                self.names[kind] = name
                pods.append(self._pod(name, node, kind, runner, reference, seed + len(pods)))
        case.create(*pods)
        for kind, name in self.names.items():
            case.wait_ready(name)
            process.wait_until(lambda name=name: self._log(name).startswith("ready\n"), f"reader {kind} to begin", 60)

    @staticmethod
    def _lay_out(place: pathlib.Path, image: str) -> None:
        place.mkdir(parents=True)
        plan = reading.plan(place, image)
        # As the pods see it.
        plan.rename(place / "plan")
        (place / "plan").write_text((place / "plan").read_text().replace(str(place), PLACE))
        for name in ("readers.py", "tree.py"):
            shutil.copy(paths.E2E / name, place / name)

    @staticmethod
    def _pod(name: str, node: str, kind: str, runner: str, image: str, seed: int) -> dict:
        command = ["python3", "-B", f"{PLACE}/readers.py", kind, "/mnt", f"{PLACE}/plan", str(seed)]
        it = pod(name, node=node, image=image, command=command, container={"image": runner})
        it["spec"]["containers"][0]["volumeMounts"].append({"name": "readers", "mountPath": PLACE, "readOnly": True})
        it["spec"]["volumes"].append({"name": "readers", "hostPath": {"path": PLACE, "type": "Directory"}})
        return it

    def _log(self, name: str) -> str:
        return self.case.cluster.logs(name)

    def stop(self) -> reading.Report:
        """Ends the readers. One that has died, or hangs, is an error of the report."""
        report = reading.Report({}, 0, [], [])
        for name in self.names.values():
            self.case.kubectl("exec", name, "--", "sh", "-c", "kill -TERM 1", check=False)
        for kind, name in self.names.items():
            done = lambda it: it["status"].get("phase") in ("Succeeded", "Failed")
            status = self.case.wait_pod(name, done, "done", reading.END_SECONDS)["status"]
            log = self._log(name)
            if status["phase"] == "Succeeded":
                report.take(kind, json.loads(log.removeprefix("ready\n")))
            else:
                report.errors.append(f"{kind}: {status['containerStatuses'][0]['state']}: {log[-500:]}")
        return report
