#!/usr/bin/env python3
"""Prints what it takes to warm 10 to 10,000 nodes, beside what is possible with the same wires and disks.

usage: sim/run.py [--image GB] [--fill MB/s] [--decompress MB/s] [--upload MB/s] [--nic Gbit/s] [--registry Gbit/s] [--remote Gbit/s] [--pace MB/s] [--at-once N]

The rates of one node are those that `e2e_warm.py` and `make bench` measure; give your own.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from sim import model

COUNTS = (10, 100, 1_000, 10_000)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.0f} h"


def amount(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size < 1e12 else f"{size / 1e12:.1f} TB"


def table(image: model.Image, node: model.Node, stores: model.Stores, plan: model.Plan) -> list[list[str]]:
    rows = [["nodes", "way", "from registry", "from remote", "chunks/s", "wire of the store", "half warm", "all warm", "limit", "of limit"]]
    for n_nodes in COUNTS:
        ways = {"each pulls": model.pulled(n_nodes, image, node, stores), "warmed": model.warmed(n_nodes, image, node, stores, plan)}
        for way, it in ways.items():
            capacity = stores.remote if it.remote_bytes else stores.registry
            per_second = it.fill.peak / image.remote_bytes * image.n_chunks if it.remote_bytes else 0
            rows.append([f"{n_nodes:,}", way, amount(it.registry_bytes), amount(it.remote_bytes), f"{per_second:,.0f}", f"{it.fill.peak / capacity:.0%}",
                         duration(it.median_seconds()), duration(it.seconds), duration(it.limit_seconds), f"{it.seconds / it.limit_seconds:.2f}"])
    return rows


def printed(rows: list[list[str]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    node, stores = model.Node(), model.Stores()
    parser.add_argument("--image", type=float, default=10, help="GB, decompressed")
    parser.add_argument("--compressed", type=float, default=0.45, help="bytes of blobs for each decompressed byte")
    parser.add_argument("--encoded", type=float, default=0.6, help="bytes in the remote for each decompressed byte")
    for name in ("fill", "decompress", "upload"):
        parser.add_argument(f"--{name}", type=float, default=getattr(node, name) / 1e6, help="MB/s, decompressed, of one node")
    parser.add_argument("--nic", type=float, default=node.nic / model.GBIT, help="Gbit/s of one node")
    for name in ("registry", "remote"):
        parser.add_argument(f"--{name}", type=float, default=getattr(stores, name) / model.GBIT, help="Gbit/s that it can send in all")
    parser.add_argument("--pace", type=float, default=0, help="MB/s, decompressed, that one node may take; 0: any number")
    parser.add_argument("--at-once", type=int, default=0, help="nodes that are filled at the same time; 0: all")
    args = parser.parse_args(words)
    layer_bytes = args.image * 1e9
    image = model.Image(layer_bytes * args.compressed, layer_bytes, layer_bytes * args.encoded)
    node = model.Node(nic=args.nic * model.GBIT, fill=args.fill * 1e6, decompress=args.decompress * 1e6, upload=args.upload * 1e6)
    stores = model.Stores(args.registry * model.GBIT, args.remote * model.GBIT)
    plan = model.Plan(pace=args.pace * 1e6, at_once=args.at_once)
    print(f"image of {args.image:g} GB ({amount(image.blob_bytes)} in the registry, {amount(image.remote_bytes)} in the remote); "
          f"a node takes {args.fill:g} MB/s from the remote, {args.decompress:g} MB/s from the registry; registry {args.registry:g} Gbit/s, remote {args.remote:g} Gbit/s")
    print(printed(table(image, node, stores, plan)))


if __name__ == "__main__":
    main(sys.argv[1:])
