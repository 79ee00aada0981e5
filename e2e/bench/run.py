#!/usr/bin/env python3
"""The benchmarks: the program against what it could be at best, in ratios of one run.

usage: run.py [NAME,NAME...] [--keep]

  inflate      a cold layer on disk, against the inflater alone, gzip, and skopeo with umoci
  first-touch  4 KiB in the middle of a layer that is not on this node
  fuse         reads and looks through FUSE, against the same tree on the same disk
  nodes        1, 4 and 16 nodes that start at once
  python       `import numpy, pandas` on a cold node, against the same tree on the same disk
  index        how fast indexes are made, and how big they are
  memory       the most that each role of a node holds, whatever is read
  prewarm      1,000 nodes and 5,000 layers: what the Kubernetes API and the controller bear

Cases are run in turns, and compared by their medians. docs/BENCHMARKS.md explains each line. Every bound
is printed as "held" or "missed", what cannot run as "SKIP" with the reason; the last line counts them.
Exits with 1 if a bound is missed. Needs root, and an idle machine.
"""

import argparse
import os
import pathlib
import sys
import time
import traceback

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import images
from bench import first_touch, fuse, index, inflate, measure, memory, nodes, prewarm, python
from harness import paths, process
from harness.process import say

PARTS = {"inflate": inflate, "first-touch": first_touch, "fuse": fuse, "nodes": nodes, "python": python, "index": index, "memory": memory, "prewarm": prewarm}


def play(name: str, work: pathlib.Path, verdicts: measure.Verdicts) -> None:
    begin = time.monotonic()
    say(f"{name}: {PARTS[name].__doc__.splitlines()[0]}")
    directory = work / name
    directory.mkdir()
    try:
        PARTS[name].run(directory, verdicts)
    except process.Failed as error:
        verdicts.bound(False, f"{name}: ended early: {error}")
    except Exception:  # The other parts are to be measured all the same
        traceback.print_exc()
        verdicts.bound(False, f"{name}: ended early")
    finally:
        process.unmount_below(directory)
    say(f"{name}: {time.monotonic() - begin:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="?", default="", help="these parts only, separated by commas")
    parser.add_argument("--keep", action="store_true", help="leave logs and caches for a look")
    args = parser.parse_args()
    names = [it.strip() for it in args.names.split(",") if it.strip()] or list(PARTS)
    unknown = [it for it in names if it not in PARTS]
    if unknown:
        sys.exit(f"run.py: no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if os.geteuid() != 0:
        sys.exit("run.py: run as root: mounting needs it")
    if not paths.binary().exists():
        sys.exit(f"run.py: no {paths.binary()}: run `make bench`, which builds it, or name one in CLIP_CSI_BIN")
    # What takes long to make is kept in the cache, and ready before the first clock starts.
    for name in names:
        for image in PARTS[name].IMAGES:
            images.get(image)
    if {"inflate", "first-touch"} & set(names):
        inflate.inflater()
    verdicts = measure.Verdicts()
    with process.workspace("bench", keep=args.keep) as work:
        for name in names:
            play(name, work, verdicts)
    print(verdicts.last_line())
    sys.exit(1 if verdicts.counts["missed"] else 0)


if __name__ == "__main__":
    main()
