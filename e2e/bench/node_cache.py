"""Looks into a node's cache on disk, and takes a layer's data out of it (docs/INDEX_FORMAT.md, "The cache directory")."""

import os
import pathlib
import shutil
import struct

CHUNK_BYTES = 1_044_480
# Words of `state` before the bitmap: magic, bytes of the layer, boot and flags.
HEADER = struct.Struct("<8sQQQ")
MAGIC = b"CLIPSTA2"
FLUSHED = 1


def layer_dir(cache_dir: pathlib.Path, diff_id: str) -> pathlib.Path:
    return cache_dir / "layers" / diff_id.removeprefix("sha256:")


def present(cache_dir: pathlib.Path, diff_id: str) -> tuple[int, int]:
    """How many chunks of a layer are on disk, and how many it has; (0, 0) if nothing is known of it."""
    try:
        state = (layer_dir(cache_dir, diff_id) / "state").read_bytes()
    except FileNotFoundError:
        return 0, 0
    magic, layer_bytes, _, _ = HEADER.unpack_from(state)
    assert magic == MAGIC, f"a state file of another version: {magic}"
    n_chunks = -(-layer_bytes // CHUNK_BYTES)
    bitmap = state[HEADER.size:][:-(-n_chunks // 64) * 8]
    return sum(it.bit_count() for it in bitmap), n_chunks


def is_complete(cache_dir: pathlib.Path, diff_id: str) -> bool:
    have, of = present(cache_dir, diff_id)
    return 0 < have == of


def without_data(cache_dir: pathlib.Path, to: pathlib.Path) -> None:
    """Copies a cache that no process uses: indexes and access maps stay, of the data nothing does.

    So is a node on which an image's index is known and whose layers are cold.
    """
    for top, _, names in os.walk(cache_dir):
        below = to / pathlib.Path(top).relative_to(cache_dir)
        below.mkdir(parents=True)
        for name in names:
            source = pathlib.Path(top, name)
            if name == "data":
                with open(below / name, "wb") as out:
                    out.truncate(source.stat().st_size)
            elif name == "state":
                state = source.read_bytes()
                magic, layer_bytes, boot, _ = HEADER.unpack_from(state)
                (below / name).write_bytes(HEADER.pack(magic, layer_bytes, boot, FLUSHED) + bytes(len(state) - HEADER.size))
            else:
                shutil.copy2(source, below / name)


def index_bytes(cache_dir: pathlib.Path) -> dict[str, int]:
    """Bytes that the indexes take: of layers, of images, and the access maps."""
    total = lambda pattern: sum(path.stat().st_size for path in cache_dir.glob(pattern))
    return {"layers": total("layers/*/index"), "images": total("images/*.clip"), "access maps": total("layers/*/access")}
