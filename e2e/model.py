#!/usr/bin/env python3
"""Merges layers by the text of the OCI image specification: a second opinion on the truth.

`umoci unpack` is the truth for the driver. This model says where umoci itself does something else
than the specification (layer.md, "Applying Changesets"): what differs between the two is either
listed in e2e/README.md or a fault of the test environment. It is naive on purpose: whole files in
memory, one dictionary per directory, whiteouts of a layer before its other entries.
"""

import hashlib
import io
import re
import tarfile

from tree import escape

MAX_SYMLINKS = 40
TYPES = {tarfile.REGTYPE: "file", tarfile.AREGTYPE: "file", tarfile.CONTTYPE: "file", tarfile.GNUTYPE_SPARSE: "file",
         tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "link", tarfile.CHRTYPE: "char", tarfile.BLKTYPE: "block", tarfile.FIFOTYPE: "fifo"}


class Node:
    def __init__(self, kind: str, fields: dict | None = None):
        self.kind, self.fields, self.children = kind, fields or {}, {}
        # No layer has an entry for it: it is there because something is below it.
        self.synthesised = fields is None


def raw(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def time_ns(text: str) -> int:
    sign, whole, fraction = re.fullmatch(r"(-?)(\d*)\.?(\d*)", text).groups()
    value = int(whole or 0) * 10**9 + int(fraction[:9].ljust(9, "0") or 0)
    return -value if sign else value


class Merged:
    def __init__(self, layers: list[bytes]):
        self.root = Node("dir")
        for layer in layers:
            self.apply(layer)

    def parts(self, path: bytes) -> list[bytes]:
        """The names of a path, cleaned as a text: ".." cannot climb over the root."""
        out = []
        for part in path.split(b"/"):
            if part == b"..":
                del out[-1:]
            elif part not in (b"", b"."):
                out.append(part)
        return out

    def directory(self, parts: list[bytes], create: bool, root: Node | None = None) -> Node | None:
        """The directory at `parts`, symlinks followed inside the tree."""
        root = root or self.root
        stack, todo, hops = [root], list(parts), 0
        while todo:
            part = todo.pop(0)
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            node = stack[-1].children.get(part)
            if node is not None and node.kind == "link":
                hops += 1
                if hops > MAX_SYMLINKS:
                    return None
                target = node.fields["target"]
                if target.startswith(b"/"):
                    del stack[1:]
                todo = target.split(b"/") + todo
                continue
            if node is None or node.kind != "dir":
                if not create:
                    return None
                node = stack[-1].children[part] = Node("dir")
            stack.append(node)
        return stack[-1]

    def apply(self, layer: bytes) -> None:
        entries = []
        # Zero blocks, because tarfile takes a layer without them for cut short.
        layer = layer + bytes(-len(layer) % 512) + bytes(1024)
        with tarfile.open(fileobj=io.BytesIO(layer), encoding="utf-8", errors="surrogateescape") as tar:
            for info in tar:
                name = raw(info.name)
                data = tar.extractfile(info).read() if info.isreg() else b""
                entries.append((self.parts(name), info, data))
        below = self.snapshot(self.root)
        own_dirs = [parts for parts, info, _ in entries if info.isdir()]
        for parts, _, _ in entries:
            if parts and parts[-1] == b".wh..wh..opq":
                directory = self.directory(parts[:-1], create=False)
                if directory:
                    directory.children.clear()
            elif parts and parts[-1].startswith(b".wh."):
                directory = self.directory(parts[:-1], create=False)
                # Where this layer puts a directory in place of a symlink, the marker is about the directory.
                replaced = parts[:-1] in own_dirs and self.is_link(parts[:-1])
                if directory and not replaced:
                    directory.children.pop(parts[-1][4:], None)
        for parts, info, data in entries:
            if not (parts and parts[-1].startswith(b".wh.")):
                self.put(parts, info, data, below)

    def is_link(self, parts: list[bytes]) -> bool:
        directory = self.directory(parts[:-1], create=False) if parts else None
        node = directory and directory.children.get(parts[-1])
        return bool(node) and node.kind == "link"

    def snapshot(self, node: Node) -> Node:
        if node.kind != "dir":
            return node
        copy = Node("dir", node.fields)
        copy.children = {name: self.snapshot(child) for name, child in node.children.items()}
        return copy

    def put(self, parts, info: tarfile.TarInfo, data: bytes, below: Node) -> None:
        xattrs = {key.removeprefix("SCHILY.xattr."): raw(value) for key, value in info.pax_headers.items()
                  # What umoci drops, and a driver should: it is about the machine that wrote it.
                  if not key.startswith(("SCHILY.xattr.trusted.overlay.", "SCHILY.xattr.security.selinux"))
                  # An empty value takes a PAX record back (POSIX, pax, "extended header").
                  and key.startswith("SCHILY.xattr.") and value}
        fields = {
            "mode": info.mode & 0o7777, "uid": info.uid, "gid": info.gid, "data": data, "target": raw(info.linkname),
            "rdev": (info.devmajor, info.devminor), "xattrs": xattrs,
            "mtime": time_ns(info.pax_headers["mtime"]) if "mtime" in info.pax_headers else int(info.mtime) * 10**9,
        }
        if not parts:
            self.root.fields, self.root.synthesised = fields, False
            return
        directory = self.directory(parts[:-1], create=True)
        name = parts[-1]
        if info.islnk():
            target = self.parts(raw(info.linkname))
            node = None
            # A layer may link to a name that it hides: the layers below still have it.
            for root in (self.root, below):
                found = self.directory(target[:-1], create=False, root=root)
                node = node or (found and found.children.get(target[-1]))
            # Its own header's mode, owner and time do not count, as with GNU tar.
            directory.children[name] = node
            return
        kind = TYPES[info.type]
        old = directory.children.get(name)
        if kind == "dir" and old is not None and old.kind == "dir":
            old.fields, old.synthesised = fields, False
        else:
            directory.children[name] = Node(kind, fields)

    def manifest(self) -> tuple[dict[str, dict[str, str]], list[str]]:
        """What tree.py would print of the tree, and the directories that no layer has an entry for."""
        found: dict[bytes, Node] = {}

        def visit(path: bytes, node: Node) -> None:
            found[path] = node
            for name, child in node.children.items():
                visit(name if path == b"." else path + b"/" + name, child)

        visit(b".", self.root)
        names: dict[int, list[bytes]] = {}
        for path, node in sorted(found.items()):
            names.setdefault(id(node), []).append(path)
        out, synthesised = {}, []
        for path, node in found.items():
            it = node.fields or {"mode": 0o755, "uid": 0, "gid": 0, "mtime": 0, "xattrs": {}}
            if node.synthesised:
                synthesised.append(escape(path))
            line = {"type": node.kind, "mode": f"{0o777 if node.kind == 'link' else it['mode']:04o}", "uid": str(it["uid"]), "gid": str(it["gid"]),
                    "mtime": f"{it['mtime'] // 10**9}.{it['mtime'] % 10**9:09d}"}
            if node.kind != "dir":
                line["nlink"] = str(len(names[id(node)]))
                if len(names[id(node)]) > 1:
                    line["group"] = escape(names[id(node)][0])
            if node.kind == "file":
                line["size"], line["sha256"] = str(len(it["data"])), hashlib.sha256(it["data"]).hexdigest()
            if node.kind == "link":
                line["size"], line["target"] = str(len(it["target"])), escape(it["target"])
            if node.kind in ("char", "block"):
                line["rdev"] = "%d:%d" % it["rdev"]
            if it["xattrs"]:
                line["xattrs"] = ",".join(f"{escape(raw(k))}={v.hex()}" for k, v in sorted(it["xattrs"].items(), key=lambda pair: raw(pair[0])))
            out[escape(path)] = line
        return out, sorted(synthesised)
