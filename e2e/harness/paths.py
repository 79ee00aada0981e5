"""Where things are: the clone, the cache outside it, scratch directories. Mirrors e2e/paths.sh."""

import os
import pathlib

E2E = pathlib.Path(__file__).resolve().parent.parent
REPO = E2E.parent


def cache() -> pathlib.Path:
    """What is expensive to make and the same for every run: images, tools."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(os.environ.get("CLIP_E2E_CACHE") or os.path.join(base, "clip-csi-e2e"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def scratch() -> pathlib.Path:
    """Where runs have their scratch directories: in the cache, unless other users are kept out of it, as they are of root's home."""
    inside = cache().resolve() / "work"
    open_to_all = all(it.stat().st_mode & 0o001 for it in inside.parents)
    return inside if open_to_all else pathlib.Path("/var/tmp/clip-csi-e2e")


def binary() -> pathlib.Path:
    """The program under test: CLIP_CSI_BIN, or what `cargo build --release` makes."""
    target = os.environ.get("CARGO_TARGET_DIR") or REPO / "target"
    return pathlib.Path(os.environ.get("CLIP_CSI_BIN") or pathlib.Path(target) / "release" / "clip-csi")


def programs() -> list[pathlib.Path]:
    """The program under test, and those beside it that it becomes."""
    return [binary(), *(binary().with_name(name) for name in ("clip-csi-node", "clip-csi-serve"))]


def install(place: pathlib.Path) -> pathlib.Path:
    """Copies the programs into the directory `place`, where every user may run them: a clone may lie where only its owner goes.

    Written in pieces of 32 KiB, as containerd unpacks an image: from Linux 6.18 on, a page of code that runs maps all of the piece of page cache that it
    is in, which is as large as what was written at once, and with pieces of 256 KiB an agent has 4 MB more resident.
    """
    place.mkdir()
    for program in programs():
        with open(program, "rb") as source, open(place / program.name, "wb", buffering=0) as copy:
            while piece := source.read(32 << 10):
                copy.write(piece)
        (place / program.name).chmod(0o755)
    return place / binary().name
