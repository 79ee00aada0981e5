#!/usr/bin/env python3
"""Runs all of csi-sanity against a driver's socket, on real mounts of a real image; the last line counts.

usage: sanity.py SOCKET IMAGE [--controller SOCKET]

Nothing is filtered. A spec that skips itself, because it is about something that the driver does not say it has,
is counted as skipped, and must be one of those below: fails if another one skips itself, if one of those runs, or
if any spec fails.
"""

import argparse
import collections
import json
import pathlib
import subprocess
import sys
import tempfile

from harness import driver

# What an image volume cannot have, by the reason that csi-sanity gives; and why it has not.
NOT_FOR_IMAGES = {
    "ListVolumes not supported": "nobody keeps a list: a volume is its attributes, and Kubernetes has the PersistentVolumes",
    "GetCapacity not supported": "volumes take no room that could be given away",
    "Snapshot not supported": "an image is a snapshot already, with a digest for its name",
    "CreateSnapshot not supported": "as above",
    "DeleteSnapshot not supported": "as above",
    "ListSnapshots not supported": "as above",
    "GetSnapshot not supported": "as above",
    "GroupControllerService not supported": "snapshots of groups: as above",
    "Volume Cloning not supported": "a copy of an image volume is another volume with the same attributes",
    "ControllerExpandVolume not supported": "an image has the size that it has",
    "NodeExpandVolume not supported": "as above",
    "ControllerModifyVolume not supported": "an image does not change",
    "Modify volume not supported": "as above",
    "Modify Volume not supported": "as above",
    "ControllerPublishVolume not supported": "images are reachable from every node: there is nothing to attach",
    "ControllerUnpublishVolume not supported": "as above",
    "Controller Publish, UnpublishVolume not supported": "as above",
    "NodeStageVolume not supported": "the driver shares one mount of an image between volumes by itself",
    "NodeUnstageVolume not supported": "as above",
}
# What csi-sanity itself has switched off.
PENDING = "pagination should detect volumes added between pages"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("socket", type=pathlib.Path)
    parser.add_argument("image")
    parser.add_argument("--controller", type=pathlib.Path, help="the socket of another process that serves the Controller service")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        specs, output = run(arguments, pathlib.Path(work))
    faults = []
    states = collections.Counter(it["State"] for it in specs)
    reasons = collections.Counter()
    for spec in specs:
        name = " ".join([*spec["ContainerHierarchyTexts"], spec["LeafNodeText"]])
        match spec["State"]:
            case "passed":
                continue
            case "skipped":
                reason = spec["Failure"]["Message"]
                reasons[reason] += 1
                if reason not in NOT_FOR_IMAGES:
                    faults.append(f"skipped itself: {name}: {reason}")
            case "pending" if PENDING in name:
                continue
            case _:
                faults.append(f"{spec['State']}: {name}: {spec.get('Failure', {}).get('Message', '')}")
    faults += [f"no spec said that {it}: it ran, so leave it out of the list" for it in NOT_FOR_IMAGES if it not in reasons]
    for reason, count in sorted(reasons.items()):
        print(f"  skipped {count:2}: {reason}: {NOT_FOR_IMAGES.get(reason, '?')}")
    if faults:
        print(output[-8000:])
        print("\n".join(faults))
    print(f"csi-sanity: {states['passed']} passed, {states['failed'] + states['panicked']} failed, {states['skipped']} skipped themselves")
    return 1 if faults else 0


def run(arguments: argparse.Namespace, work: pathlib.Path) -> tuple[list[dict], str]:
    """The specs that ran or skipped themselves, and what was printed."""
    parameters, report = work / "parameters.yaml", work / "report.json"
    parameters.write_text(f"image: {json.dumps(arguments.image)}\n")
    controller = ["--csi.controllerendpoint", f"unix://{arguments.controller}"] if arguments.controller else []
    done = subprocess.run(
        [driver.csictl().with_name("csi-sanity"), "--csi.endpoint", f"unix://{arguments.socket}", *controller,
         "--csi.mountdir", work / "mount", "--csi.stagingdir", work / "staging", "--csi.testvolumeparameters", parameters,
         "--ginkgo.json-report", report, "--ginkgo.no-color"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500, check=False)
    if not report.exists():
        sys.exit(f"csi-sanity gave no report:\n{done.stdout[-4000:]}")
    [suite] = json.loads(report.read_text())
    # Set-up and tear-down are no specs, as long as they succeed.
    specs = [it for it in suite["SpecReports"] if it["LeafNodeType"] == "It" or it["State"] != "passed"]
    if done.returncode != 0 and all(it["State"] in ("passed", "skipped", "pending") for it in specs):
        sys.exit(f"csi-sanity failed without a failed spec:\n{done.stdout[-4000:]}")
    return specs, done.stdout


if __name__ == "__main__":
    sys.exit(main())
