#!/usr/bin/env python3
"""Runs Kubernetes' own end-to-end tests of CSI drivers (test/e2e/storage/external) on the cluster; the last line counts.

usage: storage_suite.py [-v] [PATTERN]

The suite is told of the driver what is so: volumes come inline, read-only as images are, or with a layer to write; nothing that is
written outlives its pod. It leaves out what the driver does not say it can, and gives the reason: those are printed, with their number.
Not part of `make ci`: building the suite alone takes minutes.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys

from cluster import containers
from cluster.cluster import REGISTRY
from cluster.pods import DRIVER
from harness import environment, paths, process

# What the suite's pods run, by the name that it gives it: the shell of our own pods does.
BUSYBOX = "e2e-test-images/busybox:1.37.0-1"
# The suite's tests take the driver's, and so have its capabilities: none that writes to a claim's volume and finds it again.
CAPABILITIES = {"exec": True, "multipods": True, "singleNodeVolume": False, "persistence": False, "block": False, "fsGroup": False, "RWX": False}


def definition(image: str, **volume) -> dict:
    return {
        "DriverInfo": {"Name": DRIVER, "SupportedFsType": {"": {}}, "Capabilities": CAPABILITIES},
        "InlineVolumes": [{"Attributes": {"image": image, **volume.pop("attributes", {})}, **volume}],
    }


def run(shared: environment.Environment, name: str, definition: dict, pattern: str, verbose: bool) -> collections.Counter:
    """Runs the suite with one definition; counts of what passed, failed and skipped itself."""
    tools = pathlib.Path(subprocess.run([paths.E2E / "tools.sh", "storage"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    cluster = shared.cluster()
    driver, images, report = (shared.work / f"{name}.{kind}" for kind in ("driver.json", "images.json", "report.json"))
    driver.write_text(json.dumps(definition))
    images.write_text(json.dumps({"promoterE2eRegistry": f"{REGISTRY}/e2e-test-images"}))
    with cluster.plane.machine.network():
        done = subprocess.run(
            [tools / "storage.test", f"-kubeconfig={cluster.plane.kubeconfig}", f"-storage.testdriver={driver}", "-provider=skeleton", f"-kubectl-path={cluster.tools / 'kubectl'}",
             f"-ginkgo.focus=External.Storage.*{pattern}", r"-ginkgo.skip=\[Disruptive\]", "-ginkgo.no-color", f"-ginkgo.json-report={report}", "-ginkgo.timeout=20m"],
            env={**os.environ, "NO_PROXY": "*", "KUBE_TEST_REPO_LIST": str(images)}, stdout=None if verbose else subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if not report.exists():
        sys.exit(f"storage_suite.py: the suite gave no report:\n{(done.stdout or '')[-4000:]}")
    [suite] = json.loads(report.read_text())
    counts, reasons = collections.Counter(), collections.Counter()
    print(f"\n{name}:")
    for spec in suite["SpecReports"]:
        title = " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])
        # What the pattern leaves out has no failure; set-up and tear-down count when they fail.
        reason = re.sub(r"\s+", " ", spec.get("Failure", {}).get("Message", ""))
        if spec["LeafNodeType"] != "It" and spec["State"] == "passed" or spec["State"] == "skipped" and not reason:
            continue
        counts[spec["State"]] += 1
        if spec["State"] == "skipped":
            reasons[reason] += 1
        else:
            print(f"  {spec['State']:8} {spec['RunTime'] / 1e9:6.1f} s  {title}")
        if spec["State"] not in ("passed", "skipped"):
            print(f"           {reason[:1000]}")
    for reason, count in reasons.most_common():
        print(f"  skipped {count:4}: {reason}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="only tests whose name has it")
    parser.add_argument("-v", action="store_true", help="show what the suite prints")
    arguments = parser.parse_args()
    total = collections.Counter()
    with process.workspace("storage") as work, environment.Environment(work) as shared:
        environment.shared = shared
        cluster, release = shared.cluster(), shared.release()
        release.install({"node": {"maxWritableBytes": 64 << 20}})
        image = cluster.push("small")
        with cluster.plane.machine.network():
            containers.push(REGISTRY, work, {BUSYBOX: containers.shell})
        for name, volume in (("read-only", {"Shared": True, "ReadOnly": True}), ("with a layer to write", {"Shared": False, "ReadOnly": False, "attributes": {"writable": "true"}})):
            total += run(shared, name, definition(image, **volume), arguments.pattern, arguments.v)
        left = shared.take_down_cluster()
    if left:
        print(f"FAIL  left behind: {left}")
    ran = total["passed"] + total["failed"] + total["panicked"] + total["timedout"]
    print(f"Kubernetes' external storage suite: {ran} ran, {total['passed']} passed, {ran - total['passed']} failed, {total['skipped']} skipped")
    return 0 if total["passed"] and ran == total["passed"] and not left else 1


if __name__ == "__main__":
    sys.exit(main())
