#!/usr/bin/env python3
"""Compares two trees, each a directory or a manifest of tree.py; prints every difference.

Exits with 0 if the trees are equal, with 1 if they differ, with 2 if one cannot be read. What may
differ is said on the command line and nowhere else; e2e/README.md has the reasons:
  --ignore-mtime-of-dirs FILE   the directories listed in FILE (one escaped path per line)
"""

import argparse
import os
import sys

import tree as trees

# Lines printed at most: a tree that is wrong everywhere need not fill the log.
MAX_PRINTED = 40


def load(name: str) -> dict[str, dict[str, str]]:
    if os.path.isdir(name):
        return trees.manifest(name)
    with open(name, encoding="ascii") as file:
        return trees.parse(file.read())


def differences(truth, seen, dirs_without_mtime=frozenset()) -> list[str]:
    """One line per difference; `truth` is the tree that is right."""
    lines = []
    for path in sorted(truth.keys() | seen.keys()):
        if path not in seen:
            lines.append(f"missing: {path} ({truth[path]['type']})")
            continue
        if path not in truth:
            lines.append(f"too much: {path} ({seen[path]['type']})")
            continue
        if truth[path] == seen[path]:
            continue
        for key in trees.KEYS:
            if key == "mtime" and path in dirs_without_mtime and truth[path]["type"] == "dir":
                continue
            want, have = truth[path].get(key), seen[path].get(key)
            if want != have:
                lines.append(f"differs: {path}: {key} is {have}, should be {want}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares two trees or manifests.")
    parser.add_argument("truth")
    parser.add_argument("seen")
    parser.add_argument("--ignore-mtime-of-dirs", metavar="FILE", action="append", default=[])
    args = parser.parse_args()
    try:
        dirs = set()
        for name in args.ignore_mtime_of_dirs:
            with open(name, encoding="ascii") as file:
                dirs.update(line for line in file.read().splitlines() if line)
        found = differences(load(args.truth), load(args.seen), dirs)
    except (OSError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
    for line in found[:MAX_PRINTED]:
        print(line)
    if len(found) > MAX_PRINTED:
        print(f"… and {len(found) - MAX_PRINTED} more")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
