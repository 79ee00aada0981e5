"""How long it takes until N nodes are warm, and what flows meanwhile: bytes as a fluid, shared fairly.

Nodes that take from one store share what it can send, max-min fair: nobody gets more than they can take,
and what one cannot take the others get. Nodes of the same speed are counted and not simulated one by one, so that
10,000 of them cost no more than 10. Rates change only when nodes begin or end; in between, bytes flow evenly.

The model knows no latency, no retransmission and no cache of the store's own: what it says is what a real
cluster cannot beat, with the rates that it is given.
"""

import dataclasses
import math
import random

# Bytes of a chunk of a decompressed layer (docs/REMOTE_FORMAT.md): one request to the remote.
CHUNK_BYTES = 1_044_480
GBIT = 1e9 / 8
# Classes of speed into which nodes are sorted.
N_CLASSES = 16
# Shares and times are sums of floats.
TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Image:
    """What an image weighs."""

    # Blobs in the registry.
    blob_bytes: float
    # Layers, decompressed: what a node writes.
    layer_bytes: float
    # Values in the remote, as chunks are encoded there.
    remote_bytes: float

    @property
    def n_chunks(self) -> int:
        return math.ceil(self.layer_bytes / CHUNK_BYTES)


@dataclasses.dataclass(frozen=True)
class Node:
    """What one node can do, in bytes per second."""

    nic: float = 10 * GBIT
    # Decompressed bytes, from the remote to the disk and verified.
    fill: float = 300e6
    # Decompressed bytes, from the registry to the disk.
    decompress: float = 150e6
    # Decompressed bytes, from the disk to the remote.
    upload: float = 250e6
    # The slowest node is that much slower than the fastest.
    spread: float = 0.3


@dataclasses.dataclass(frozen=True)
class Stores:
    """What registry and remote can send together, in bytes per second."""

    registry: float = 10 * GBIT
    remote: float = 25 * GBIT


@dataclasses.dataclass(frozen=True)
class Plan:
    """How nodes are warmed."""

    # Decompressed bytes per second of each node; 0: any number.
    pace: float = 0
    # Nodes that are filled at the same time; 0: all.
    at_once: int = 0


@dataclasses.dataclass
class Flow:
    """What happened."""

    seconds: float = 0.0
    sent_bytes: float = 0.0
    received_bytes: float = 0.0
    peak: float = 0.0
    # When each class of nodes was done, and how many they are.
    done: list[tuple[float, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Group:
    """Nodes that began together and are equally fast."""

    count: int
    cap: float
    left_bytes: float


def shares(capacity: float, groups: list[Group]) -> list[float]:
    """What each node of each group gets of a capacity: max-min fair (Bertsekas and Gallager, Data Networks, 6.5.2)."""
    rates = [0.0] * len(groups)
    left, waiting = capacity, sum(it.count for it in groups)
    for at in sorted(range(len(groups)), key=lambda it: groups[it].cap):
        group = groups[at]
        rates[at] = min(group.cap, left / waiting)
        left -= rates[at] * group.count
        waiting -= group.count
    return rates


def flow(bytes_each: float, caps: list[tuple[float, int]], capacity: float, at_once: int = 0) -> Flow:
    """Has nodes, given as (what one can take per second, how many), each receive `bytes_each` out of one store."""
    waiting = sorted(caps)
    result, active = Flow(), []
    limit = at_once or sum(count for _, count in caps)
    while waiting or active:
        # Who waits begins as soon as there is a place.
        places = limit - sum(it.count for it in active)
        while waiting and places > 0:
            cap, count = waiting.pop()
            begins = min(count, places)
            active.append(Group(begins, cap, bytes_each))
            places -= begins
            if begins < count:
                waiting.append((cap, count - begins))
        rates = shares(capacity, active)
        seconds = min(group.left_bytes / rate for group, rate in zip(active, rates))
        total = sum(rate * group.count for group, rate in zip(active, rates))
        result.seconds += seconds
        result.sent_bytes += total * seconds
        result.peak = max(result.peak, total)
        for group, rate in zip(active, rates):
            group.left_bytes -= rate * seconds
        for group in active:
            if group.left_bytes <= bytes_each * TOLERANCE:
                result.done.append((result.seconds, group.count))
                result.received_bytes += bytes_each * group.count
        active = [it for it in active if it.left_bytes > bytes_each * TOLERANCE]
    return result


def classes(n_nodes: int, spread: float, seed: int) -> list[tuple[float, int]]:
    """How many nodes are how fast, as shares of the fastest: evenly spread, the rest at random."""
    n_classes = min(n_nodes, N_CLASSES)
    counts = [n_nodes // n_classes] * n_classes
    for at in random.Random(seed).sample(range(n_classes), n_nodes % n_classes):
        counts[at] += 1
    speeds = [1 - spread * it / max(n_classes - 1, 1) for it in range(n_classes)]
    return list(zip(speeds, counts))


@dataclasses.dataclass
class Outcome:
    """What a way to warm N nodes costs."""

    seed_seconds: float
    fill: Flow
    registry_bytes: float
    remote_bytes: float
    # What no way could do faster with these stores, nodes and pace.
    limit_seconds: float

    @property
    def seconds(self) -> float:
        return self.seed_seconds + self.fill.seconds

    def median_seconds(self) -> float:
        """When half of the nodes were warm."""
        half, so_far = sum(count for _, count in self.fill.done) / 2, 0
        for seconds, count in sorted(self.fill.done):
            so_far += count
            if half <= so_far:
                return self.seed_seconds + seconds
        raise ValueError("no node was warmed")


def seed_seconds(image: Image, node: Node, stores: Stores) -> float:
    """One process: what it fetches, decompresses and uploads goes on side by side, layer after layer."""
    return max(image.blob_bytes / min(node.nic, stores.registry), image.layer_bytes / node.decompress,
               image.layer_bytes / node.upload, image.remote_bytes / min(node.nic, stores.remote))


def warmed(n_nodes: int, image: Image, node: Node = Node(), stores: Stores = Stores(), plan: Plan = Plan(), seed: int = 1) -> Outcome:
    """The remote is seeded, then the nodes take the image from there."""
    encoding = image.remote_bytes / image.layer_bytes
    fill = min(node.fill, plan.pace or math.inf) * encoding
    caps = [(min(node.nic, fill * speed), count) for speed, count in classes(n_nodes, node.spread, seed)]
    result = flow(image.remote_bytes, caps, stores.remote, plan.at_once)
    first = seed_seconds(image, node, stores)
    limit = max(n_nodes * image.remote_bytes / stores.remote, image.remote_bytes / max(cap for cap, _ in caps))
    return Outcome(first, result, image.blob_bytes, result.sent_bytes, first + limit)


def pulled(n_nodes: int, image: Image, node: Node = Node(), stores: Stores = Stores(), seed: int = 1) -> Outcome:
    """Each node pulls the image from the registry by itself: what is compared with."""
    encoding = image.blob_bytes / image.layer_bytes
    caps = [(min(node.nic, node.decompress * encoding * speed), count) for speed, count in classes(n_nodes, node.spread, seed)]
    result = flow(image.blob_bytes, caps, stores.registry)
    limit = max(n_nodes * image.blob_bytes / stores.registry, image.blob_bytes / max(cap for cap, _ in caps))
    return Outcome(0, result, result.sent_bytes, 0, limit)
