"""Writes tar streams header by header, so that odd and broken ones can be made on purpose."""

import os
import pathlib
import re
import struct
import subprocess
import tempfile

BLOCK = 512
# Every entry's time unless it says otherwise: 2024-01-02 03:04:05 UTC.
TIME = 1704164645

FILE, HARDLINK, SYMLINK, CHAR, BLOCKDEV, DIR, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    """GNU's binary numbers: a first bit of 1, then two's complement."""
    raw = value.to_bytes(width, "big", signed=True)
    return bytes([raw[0] | 0x80]) + raw[1:]


def number(value: int, width: int) -> bytes:
    """Octal where it fits, as GNU tar does, else base-256."""
    if 0 <= value < 8 ** (width - 1):
        return octal(value, width)
    return base256(value, width)


def header(name: bytes, kind: bytes, *, size=0, mode=0o644, uid=0, gid=0, mtime=TIME, linkname=b"", rdev=(0, 0),
           magic=b"ustar\x0000", prefix=b"", numbers=number) -> bytes:
    """One 512-byte header. Names longer than their field are cut: who wants more adds a long name."""
    block = bytearray(BLOCK)

    def put(at: int, width: int, value: bytes) -> None:
        block[at:at + width] = value[:width].ljust(width, b"\0")

    put(0, 100, name)
    put(100, 8, octal(mode, 8))
    put(108, 8, numbers(uid, 8))
    put(116, 8, numbers(gid, 8))
    put(124, 12, numbers(size, 12))
    put(136, 12, numbers(mtime, 12))
    put(156, 1, kind)
    put(157, 100, linkname)
    put(257, 8, magic)
    if magic.startswith(b"ustar\0"):
        put(329, 8, octal(rdev[0], 8))
        put(337, 8, octal(rdev[1], 8))
        put(345, 155, prefix)
    block[148:156] = b" " * 8
    put(148, 8, b"%06o\0 " % sum(block))
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax_records(records: dict[str, bytes]) -> bytes:
    """The body of a PAX header: "LENGTH KEY=VALUE\\n", the length counting itself."""
    out = b""
    for key, value in records.items():
        rest = b" " + key.encode() + b"=" + value + b"\n"
        length = len(rest)
        while len(b"%d" % length) + len(rest) != length:
            length = len(b"%d" % length) + len(rest)
        out += b"%d" % length + rest
    return out


def as_bytes(name) -> bytes:
    return name if isinstance(name, bytes) else name.encode()


def pax_time(nanoseconds: int) -> bytes:
    """A PAX time. A negative one counts its fraction away from zero: -1.5 is 1.5 s before 1970."""
    sign, value = (b"-", -nanoseconds) if nanoseconds < 0 else (b"", nanoseconds)
    seconds, rest = divmod(value, 10**9)
    return sign + (b"%d.%09d" % (seconds, rest) if rest else b"%d" % seconds)


# Access and change times and the process id would make each run's layer another one.
PAX_OPTIONS = {True: ["--pax-option=delete=atime,delete=ctime,exthdr.name=%d/PaxHeaders/%f"], False: []}


def without_pid(stream: bytes) -> bytes:
    """Takes GNU tar's process id out of the names GNUSparseFile.PID, which no option changes."""
    out = bytearray(stream)
    for match in re.finditer(rb"GNUSparseFile\.(\d+)", stream):
        start, end = match.span(1)
        block = match.start() // BLOCK * BLOCK
        out[start:end] = b"0" * (end - start)
        if stream[block + 257:block + 262] != b"ustar":
            continue
        # Always one length, and the rest of the name moved up.
        name = bytes(out[block:block + 100]).rstrip(b"\0").replace(b"0" * (end - start) + b"/", b"0/", 1)
        out[block:block + 100] = name.ljust(100, b"\0")
        out[block + 148:block + 156] = b" " * 8
        out[block + 148:block + 156] = b"%06o\0 " % sum(out[block:block + BLOCK])
    return bytes(out)


class Tar:
    """A layer in the making. Long names and links, xattrs and exact times become PAX records by themselves."""

    def __init__(self):
        self.chunks: list[bytes] = []
        # Set to leave out the two zero blocks at the end, as umoci's `insert` does.
        self.without_end = False

    def raw(self, data: bytes) -> None:
        self.chunks.append(data)

    def pax(self, records: dict[str, bytes], kind=b"x") -> None:
        body = pax_records(records)
        self.raw(header(b"PaxHeaders/entry", kind, size=len(body)) + padded(body))

    def gnu_long(self, text: bytes, kind: bytes) -> None:
        self.raw(header(b"././@LongLink", kind, size=len(text) + 1, magic=b"ustar  \0", mode=0, mtime=0) + padded(text + b"\0"))

    def entry(self, name, kind: bytes, data=b"", *, linkname=b"", time_ns: int | None = None, xattrs=None, pax=None, gnu=False, **fields) -> None:
        name, linkname = as_bytes(name), as_bytes(linkname)
        records = dict(pax or {})
        if time_ns is not None:
            records["mtime"] = pax_time(time_ns)
            fields["mtime"] = max(time_ns // 10**9, 0)
        for key, value in (xattrs or {}).items():
            records[f"SCHILY.xattr.{key}"] = value
        if gnu:
            fields["magic"] = b"ustar  \0"
            if len(linkname) > 100:
                self.gnu_long(linkname, b"K")
            if len(name) > 100:
                self.gnu_long(name, b"L")
        else:
            if len(name) > 100 and "prefix" not in fields:
                records["path"] = name
            if len(linkname) > 100:
                records["linkpath"] = linkname
        if records:
            self.pax(records)
        self.raw(header(name, kind, size=len(data), linkname=linkname, **fields) + padded(data))

    def file(self, name, data=b"", **fields):
        self.entry(name, FILE, as_bytes(data), **fields)

    def dir(self, name, mode=0o755, **fields):
        name = as_bytes(name)
        self.entry(name if name.endswith(b"/") else name + b"/", DIR, mode=mode, **fields)

    def symlink(self, name, target, **fields):
        self.entry(name, SYMLINK, linkname=target, mode=0o777, **fields)

    def hardlink(self, name, target, **fields):
        self.entry(name, HARDLINK, linkname=target, **fields)

    def char(self, name, rdev, **fields):
        self.entry(name, CHAR, rdev=rdev, **fields)

    def block(self, name, rdev, **fields):
        self.entry(name, BLOCKDEV, rdev=rdev, **fields)

    def fifo(self, name, **fields):
        self.entry(name, FIFO, **fields)

    def whiteout(self, path):
        """Hides `path` of the layers below."""
        parent, _, name = as_bytes(path).rpartition(b"/")
        self.file((parent + b"/" if parent else b"") + b".wh." + name, mode=0)

    def opaque(self, directory):
        """Hides all that the layers below have in `directory`."""
        directory = as_bytes(directory)
        self.file((directory + b"/" if directory else b"") + b".wh..wh..opq", mode=0)

    def gnu_tar(self, build, *options):
        """What the real GNU tar makes of the directory that `build` fills; its end blocks cut off."""
        with tempfile.TemporaryDirectory(prefix="clip-e2e-tar.") as directory:
            build(pathlib.Path(directory))
            stream = subprocess.run(
                ["tar", "-C", directory, "-b1", "--sort=name", "--owner=0", "--group=0", "--numeric-owner",
                 f"--mtime=@{TIME}", *PAX_OPTIONS[any("pax" in it for it in options)], *options, "-cf", "-", *sorted(os.listdir(directory))],
                check=True, capture_output=True,
            ).stdout
        assert stream[-2 * BLOCK:] == bytes(2 * BLOCK)
        self.raw(without_pid(stream[:-2 * BLOCK]))

    def bytes(self) -> bytes:
        return b"".join(self.chunks) + (b"" if self.without_end else bytes(2 * BLOCK))


def capability(permitted: int) -> bytes:
    """security.capability, version 2, effective."""
    return struct.pack("<IIIII", 0x02000001, permitted & 0xFFFFFFFF, 0, permitted >> 32, 0)
