"""The kernel's own file system over the layers as they are on disk: EROFS, whose metadata is made here, and whose data are the tars.

For comparison alone: what reads of a mount could cost if no program served it. Without extended attributes, opaque directories and holes, which
the benchmarks' trees have not. The format is in the kernel's fs/erofs/erofs_fs.h; each layer is a device of its own, because a
tar's content lies at multiples of 512 bytes, which is the block size then.
"""

import contextlib
import ctypes
import os
import pathlib
import posixpath
import stat
import struct
import tarfile

from harness import process

BLOCK_BYTES, BLOCK_BITS = 512, 9
SUPER_OFFSET, MAGIC = 1024, 0xE0F5E1E2
# Files in chunks, and more than one device.
INCOMPATIBLE = 0x4 | 0x8
SLOT_BYTES, NID_BYTES, INODE_BYTES = 128, 32, 64
PLAIN, CHUNKED = 0, 4
CHUNK_INDEXES = 0x20
MS_RDONLY, MS_NODEV = 1, 4
FILE_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFLNK: 7}


def cannot() -> str:
    """Why there is no such mount here; empty if there is."""
    if "erofs" not in pathlib.Path("/proc/filesystems").read_text().split():
        return "this kernel has no EROFS"
    return ""


class Node:
    """A file of the tree."""

    def __init__(self, mode: int, entry: tarfile.TarInfo | None = None, device: int = 0):
        self.mode, self.entry, self.device = mode, entry, device
        self.children: dict[str, Node] = {}
        self.n_links, self.offset = 0, 0
        # Where its content is; of a device, its number as the kernel packs it.
        self.block = 0

    @property
    def nid(self) -> int:
        return self.offset // NID_BYTES

    @property
    def size(self) -> int:
        return self.entry.size if stat.S_ISREG(self.mode) else 0


def merged(layers: list[pathlib.Path]) -> Node:
    """The tree that the layers make, from the lowest on."""
    root = Node(stat.S_IFDIR | 0o755)
    for device, layer in enumerate(layers, 1):
        with tarfile.open(layer, "r:") as tar:
            for entry in tar:
                add(root, entry, device)
    return root


def find(root: Node, path: str) -> Node:
    node = root
    for part in path.split("/"):
        node = node.children[part] if part else node
    return node


def add(root: Node, entry: tarfile.TarInfo, device: int) -> None:
    path = posixpath.normpath(entry.name.lstrip("/"))
    if path == ".":
        root.entry, root.mode = entry, stat.S_IFDIR | entry.mode
        return
    parent, name = find(root, posixpath.dirname(path)), posixpath.basename(path)
    if name.startswith(".wh."):
        parent.children.pop(name.removeprefix(".wh."), None)
    elif entry.islnk():
        parent.children[name] = find(root, posixpath.normpath(entry.linkname.lstrip("/")))
    elif entry.isdir():
        node = Node(stat.S_IFDIR | entry.mode, entry)
        if name in parent.children:
            node.children = parent.children[name].children
        parent.children[name] = node
    elif entry.issym():
        parent.children[name] = Node(stat.S_IFLNK | 0o777, entry)
    elif entry.isreg():
        parent.children[name] = Node(stat.S_IFREG | entry.mode, entry, device)
    else:
        kind = stat.S_IFCHR if entry.ischr() else stat.S_IFBLK if entry.isblk() else stat.S_IFIFO
        node = parent.children[name] = Node(kind | entry.mode, entry)
        if kind != stat.S_IFIFO:
            node.block = entry.devminor & 0xff | entry.devmajor << 8 | (entry.devminor & ~0xff) << 12


def all_nodes(root: Node) -> list[Node]:
    """Each once, the root first."""
    found, seen = [root], {id(root)}
    for node in found:
        for child in node.children.values():
            child.n_links += 1
            if id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def directory(node: Node, parent: Node) -> bytes:
    """Its content: blocks of entries in the order of their names, each followed by these names."""
    names = sorted([(b".", node), (b"..", parent), *((os.fsencode(name), child) for name, child in node.children.items())], key=lambda it: it[0])
    blocks, some, used = [], [], 0
    for name, child in [*names, (b"", None)]:
        if child is None or BLOCK_BYTES < used + 12 + len(name):
            at, entries, texts = 12 * len(some), [], []
            for text, it in some:
                entries.append(struct.pack("<QHBx", it.nid, at, FILE_TYPES[stat.S_IFMT(it.mode)]))
                texts.append(text)
                at += len(text)
            blocks.append(b"".join([*entries, *texts]).ljust(BLOCK_BYTES, b"\0"))
            some, used = [], 0
        some.append((name, child))
        used += 12 + len(name)
    return b"".join(blocks)


def inode(node: Node, number: int, size: int) -> bytes:
    entry, chunked = node.entry, stat.S_ISREG(node.mode) and 0 < size
    chunk_bits = max(0, (size - 1).bit_length() - BLOCK_BITS) if chunked else 0
    where = struct.pack("<HH", chunk_bits | CHUNK_INDEXES, 0) if chunked else struct.pack("<I", node.block)
    n_links = 2 + sum(stat.S_ISDIR(it.mode) for it in node.children.values()) if stat.S_ISDIR(node.mode) else node.n_links
    head = struct.pack("<HHHHQ", 1 | (CHUNKED if chunked else PLAIN) << 1, 0, node.mode, 0, size) + where
    head += struct.pack("<IIIQII16x", number, entry.uid if entry else 0, entry.gid if entry else 0, int(entry.mtime) if entry else 0, 0, n_links)
    # All of a file lies in one piece: one chunk, as large as that.
    return head + (struct.pack("<HHI", 0, node.device, entry.offset_data // BLOCK_BYTES) if chunked else b"")


def write(image: pathlib.Path, layers: list[pathlib.Path]) -> None:
    """Makes the metadata of the tree that these decompressed layers are."""
    root = merged(layers)
    nodes = all_nodes(root)
    at = SUPER_OFFSET + SLOT_BYTES * (1 + len(layers))
    for node in nodes:
        node.offset = at
        at += INODE_BYTES + (32 if node.size else 0)
    parents = {id(child): node for node in nodes if stat.S_ISDIR(node.mode) for child in node.children.values() if stat.S_ISDIR(child.mode)}
    content, block = {}, -(-at // BLOCK_BYTES)
    for node in nodes:
        if stat.S_ISDIR(node.mode) or stat.S_ISLNK(node.mode):
            data = directory(node, parents.get(id(node), node)) if stat.S_ISDIR(node.mode) else os.fsencode(node.entry.linkname)
            node.block, content[id(node)] = block, data
            block += -(-len(data) // BLOCK_BYTES)
    out = bytearray(block * BLOCK_BYTES)
    struct.pack_into("<IIIBBHQQIIII32xIHHHBBIQB23x", out, SUPER_OFFSET, MAGIC, 0, 0, BLOCK_BITS, 0, root.nid, len(nodes), 0, 0, block, 0, 0,
                     INCOMPATIBLE, 0, len(layers), SUPER_OFFSET // SLOT_BYTES + 1, 0, 0, 0, 0, 0)
    for number, layer in enumerate(layers, 1):
        struct.pack_into("<64xII", out, SUPER_OFFSET + SLOT_BYTES * number, -(-layer.stat().st_size // BLOCK_BYTES), 0)
    for number, node in enumerate(nodes, 1):
        data = content.get(id(node))
        made = inode(node, number, node.size if data is None else len(data))
        out[node.offset:node.offset + len(made)] = made
        if data is not None:
            out[node.block * BLOCK_BYTES:node.block * BLOCK_BYTES + len(data)] = data
    image.write_bytes(out)


@contextlib.contextmanager
def mounted(work: pathlib.Path, layers: list[pathlib.Path]):
    """The layers' tree, mounted. Not by mount(8), which would put a loop device between."""
    image, place = work / "erofs.img", work / "erofs"
    write(image, layers)
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    options = ",".join(f"device={it}" for it in layers).encode()
    if libc.mount(os.fsencode(image), os.fsencode(place), b"erofs", MS_RDONLY | MS_NODEV, options) != 0:
        raise process.Failed(f"mounting EROFS: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        process.run("umount", place)
