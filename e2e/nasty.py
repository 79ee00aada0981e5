"""Makes the images of nasty layers: every case of the OCI layer format that we know to go wrong.

Each case has a directory of its own, so that a difference names its case. `nasty` holds what umoci
unpacks, and umoci's tree is the truth. `nasty_extra` holds what umoci 0.4.7 refuses or gets wrong
(e2e/README.md says how and why); the tree it must give is written here beside each case. `nasty_root`
is an opaque root, which would hide all other cases.

Sizes and counts are chosen around what a driver cuts data at: 512 (a tar block), 4096 (a page),
1,044,480 (a chunk of the cache), 1 MiB (a FUSE read).
"""

import hashlib
import pathlib
import struct

from harness.rawtar import CHAR, DIR, FILE, SYMLINK, TIME, Tar, base256, capability, header
from tree import escape

CHUNK = 1_044_480
NET_BIND = capability(1 << 10)
# user::rw-, user:1000:rwx, group::r--, mask::rwx, other::r--
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in [(1, 6, 2**32 - 1), (2, 7, 1000), (4, 4, 2**32 - 1), (16, 7, 2**32 - 1), (32, 4, 2**32 - 1)]
)
NET_RAW_HIGH = capability(1 << 13 | 1 << 38)


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes in which every place is recognisable, so that a shifted or swapped chunk shows."""
    out = bytearray()
    counter = seed << 32
    while len(out) < size:
        out += b"%016x" % counter
        counter += 1
    return bytes(out[:size])


def whiteouts(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("whiteouts")
    l0.file("whiteouts/lower", "hidden later")
    l0.file("whiteouts/keep", "stays")
    l0.dir("whiteouts/dir")
    l0.file("whiteouts/dir/a", "a")
    l0.dir("whiteouts/dir/sub")
    l0.file("whiteouts/dir/sub/b", "b")
    l0.symlink("whiteouts/link", "keep")
    l0.dir("whiteouts/recreated", mode=0o700, uid=1)
    l0.file("whiteouts/recreated/old", "old")
    l0.file("whiteouts/again", "first")
    # Before its siblings, after them, of a directory, of a symlink (not of its target), of nothing.
    l1.whiteout("whiteouts/lower")
    l1.file("whiteouts/new", "new")
    l1.whiteout("whiteouts/dir")
    l1.whiteout("whiteouts/link")
    l1.whiteout("whiteouts/never-was")
    l1.whiteout("whiteouts/no-such-dir/never-was")
    # Hidden and made anew in one layer: what was below must not come back.
    l1.whiteout("whiteouts/recreated")
    l1.dir("whiteouts/recreated", mode=0o711, uid=2)
    l1.file("whiteouts/recreated/new", "new")
    # Gone in one layer, back in the next, as another type.
    l1.whiteout("whiteouts/again")
    l2.dir("whiteouts/again")
    l2.file("whiteouts/again/inside", "second")
    # The marker after what its own layer has under the name: it hides lower layers only.
    l0.file("whiteouts/file-before-marker", "old")
    l1.file("whiteouts/file-before-marker", "new")
    l1.whiteout("whiteouts/file-before-marker")
    l0.dir("whiteouts/dir-before-marker")
    l0.file("whiteouts/dir-before-marker/old", "old")
    l1.dir("whiteouts/dir-before-marker")
    l1.file("whiteouts/dir-before-marker/new", "new")
    l1.whiteout("whiteouts/dir-before-marker")
    # A name that only looks like one.
    l2.file("whiteouts/x.wh.y", "ordinary")
    l2.file("whiteouts/.whatever", "ordinary")


def opaque(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("opaque")
    for name in ("first", "last", "before-dir", "no-dir", "emptied", "kept", "nested"):
        l0.dir(f"opaque/{name}", mode=0o750)
        l0.file(f"opaque/{name}/old", "old")
        l0.dir(f"opaque/{name}/sub")
        l0.file(f"opaque/{name}/sub/old", "old")
    l1.dir("opaque/first", mode=0o751)
    l1.opaque("opaque/first")
    l1.file("opaque/first/new", "new")
    l1.dir("opaque/first/sub", mode=0o700)
    l1.file("opaque/first/sub/new", "new")
    # The marker hides lower layers only, so what stands before it in its own layer stays.
    l1.dir("opaque/last", mode=0o752)
    l1.file("opaque/last/new", "new")
    l1.dir("opaque/last/sub", mode=0o700)
    l1.file("opaque/last/sub/new", "new")
    l1.opaque("opaque/last")
    # umoci insert --opaque writes the marker before the directory itself.
    l1.opaque("opaque/before-dir")
    l1.dir("opaque/before-dir", mode=0o753)
    l1.file("opaque/before-dir/new", "new")
    # No entry for the directory: it keeps what it was.
    l1.opaque("opaque/no-dir")
    l1.file("opaque/no-dir/new", "new")
    l1.opaque("opaque/emptied")
    # The same name again: it must be the new one.
    l1.opaque("opaque/kept")
    l1.file("opaque/kept/old", "not so old")
    l1.opaque("opaque/nested/sub")
    l1.file("opaque/nested/sub/new", "new")
    # A later layer adds to an opaque directory without being opaque.
    l2.file("opaque/first/later", "later")
    l2.file("opaque/emptied/later", "later")


def hardlinks(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("hardlinks")
    l0.file("hardlinks/a", pattern(5000), mode=0o640, uid=7)
    l0.hardlink("hardlinks/b", "hardlinks/a", mode=0o640, uid=7)
    l0.hardlink("hardlinks/c", "hardlinks/b", mode=0o640, uid=7)
    l0.dir("hardlinks/deep")
    l0.hardlink("hardlinks/deep/d", "./hardlinks/a", mode=0o640, uid=7)
    l0.hardlink("hardlinks/absolute", "/hardlinks/a", mode=0o640, uid=7)
    # Across layers: one inode, one count.
    l0.file("hardlinks/base", "in the first layer")
    l1.hardlink("hardlinks/upper", "hardlinks/base")
    l2.hardlink("hardlinks/top", "hardlinks/upper")
    # One of two names hidden later, and one replaced later: the other keeps the content, count 1.
    for name in ("gone", "replaced"):
        l0.file(f"hardlinks/{name}", f"shared by {name}")
        l0.hardlink(f"hardlinks/survivor-of-{name}", f"hardlinks/{name}")
    l1.whiteout("hardlinks/gone")
    l1.file("hardlinks/replaced", "of its own")
    # Linked and the old name hidden in one layer: a rename.
    l0.file("hardlinks/old-name", "renamed")
    l1.hardlink("hardlinks/new-name", "hardlinks/old-name")
    l1.whiteout("hardlinks/old-name")
    # Hard links to what is not a file.
    l0.symlink("hardlinks/symlink", "a")
    l0.hardlink("hardlinks/symlink-too", "hardlinks/symlink", mode=0o777)
    l0.fifo("hardlinks/fifo")
    l0.hardlink("hardlinks/fifo-too", "hardlinks/fifo")
    l0.char("hardlinks/char", (1, 5))
    l0.hardlink("hardlinks/char-too", "hardlinks/char")
    # A file that is replaced by a link, and a link that is replaced by a link to another file.
    l0.file("hardlinks/was-file", "was a file")
    l1.hardlink("hardlinks/was-file", "hardlinks/a", mode=0o640, uid=7)
    l0.hardlink("hardlinks/moves", "hardlinks/a", mode=0o640, uid=7)
    l1.hardlink("hardlinks/moves", "hardlinks/base")
    l0.file("hardlinks/empty", "")
    l0.hardlink("hardlinks/empty-too", "hardlinks/empty")
    # A name and a link target of more than 100 bytes, in PAX and in GNU style.
    for style, gnu in (("pax", False), ("gnu", True)):
        long = f"hardlinks/{style}-" + "t" * 150
        l0.file(long, style, gnu=gnu)
        l0.hardlink(f"hardlinks/{style}-link-" + "l" * 150, long, gnu=gnu)
    # The link's own header says something else than its file's: the file's counts.
    l0.file("hardlinks/differs", "x", mode=0o600, uid=1, time_ns=5 * 10**9 + 5)
    l0.hardlink("hardlinks/differs-too", "hardlinks/differs", mode=0o755, uid=2, time_ns=9 * 10**9)
    # Hidden under an opaque directory, while another name lives outside it.
    l0.dir("hardlinks/opaque")
    l0.file("hardlinks/opaque/inside", "seen from outside")
    l0.hardlink("hardlinks/outside", "hardlinks/opaque/inside")
    l1.opaque("hardlinks/opaque")


def symlinks(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("symlinks")
    l0.symlink("symlinks/dangling", "no/such/thing")
    l0.symlink("symlinks/absolute", "/symlinks/target")
    l0.file("symlinks/target", "target")
    l0.symlink("symlinks/self", "self")
    l0.symlink("symlinks/loop-a", "loop-b")
    l0.symlink("symlinks/loop-b", "loop-a")
    l0.symlink("symlinks/up", "../../../../../../etc")
    l0.symlink("symlinks/dots", "./.././symlinks//target")
    l0.symlink("symlinks/long-pax", "p/" * 200 + "end")
    l0.symlink("symlinks/long-gnu", "g/" * 200 + "end", gnu=True)
    l0.symlink("symlinks/exactly-100", "x" * 100)
    l0.symlink("symlinks/bytes", b"\xff\xfe not UTF-8 \n")
    l0.symlink("symlinks/owned", "target", uid=1000, gid=1001, time_ns=1_600_000_000_123_456_789)


def through_symlinks(l0: Tar, l1: Tar, l2: Tar) -> None:
    """Layers whose parents are symlinks of a lower layer, as after Debian's usr-merge."""
    l0.dir("through")
    l0.dir("through/usr")
    l0.dir("through/usr/lib")
    l0.file("through/usr/lib/old", "old")
    l0.file("through/usr/lib/hidden", "hidden")
    l0.symlink("through/lib", "usr/lib")
    l0.symlink("through/chain", "lib")
    l0.symlink("through/absolute", "/through/usr/lib")
    l0.symlink("through/escape", "../../../../../../../through/usr/lib")
    l1.file("through/lib/foo", "foo")
    l1.file("through/chain/bar", "bar")
    l1.file("through/absolute/baz", "baz")
    l1.file("through/escape/qux", "qux")
    l1.dir("through/lib/newdir")
    l1.file("through/lib/newdir/inside", "inside")
    l1.whiteout("through/lib/hidden")
    l1.hardlink("through/lib/linked", "through/lib/old")
    l1.hardlink("through/linked", "through/chain/old")
    # A directory entry where the lower layer has a symlink to one: it replaces the symlink.
    l0.dir("through/real")
    l0.file("through/real/file", "in real")
    l0.symlink("through/replaced", "real")
    l1.dir("through/replaced", mode=0o711)
    l1.file("through/replaced/file", "in replaced")
    # Its whiteouts are about the new directory then, not about what the symlink led to.
    l1.whiteout("through/replaced/only-in-real")
    l0.file("through/real/only-in-real", "stays")


def types_replaced(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("replaced")
    l0.dir("replaced/dir-to-file")
    l0.file("replaced/dir-to-file/inside", "gone")
    l0.dir("replaced/dir-to-file/deep")
    l0.file("replaced/dir-to-file/deep/inside", "gone")
    l1.file("replaced/dir-to-file", "a file now")
    l0.file("replaced/file-to-dir", "a file once")
    l1.dir("replaced/file-to-dir")
    l1.file("replaced/file-to-dir/inside", "inside")
    l0.dir("replaced/elsewhere")
    l0.file("replaced/elsewhere/precious", "precious")
    l0.symlink("replaced/link-to-dir", "elsewhere")
    l1.dir("replaced/link-to-dir")
    # The file must replace the symlink, not write through it.
    l0.symlink("replaced/link-to-file", "elsewhere/precious")
    l1.file("replaced/link-to-file", "a file now")
    l0.dir("replaced/dir-to-link")
    l0.file("replaced/dir-to-link/inside", "gone")
    l1.symlink("replaced/dir-to-link", "elsewhere")
    l0.file("replaced/file-to-link", "gone")
    l1.symlink("replaced/file-to-link", "elsewhere/precious")
    l0.char("replaced/char-to-file", (1, 3))
    l1.file("replaced/char-to-file", "a file now")
    l0.fifo("replaced/fifo-to-dir")
    l1.dir("replaced/fifo-to-dir")
    # There and back again.
    l0.dir("replaced/back")
    l0.file("replaced/back/old", "old")
    l1.file("replaced/back", "between")
    l2.dir("replaced/back")
    l2.file("replaced/back/new", "new")
    # A directory whose entry comes again: the last one's mode, owner and xattrs, all children.
    l0.dir("replaced/again", mode=0o755, uid=1, xattrs={"user.first": b"1", "user.both": b"1"})
    l0.file("replaced/again/a", "a")
    l1.dir("replaced/again", mode=0o2770, uid=2, xattrs={"user.both": b"2"}, time_ns=TIME * 10**9 + 5)
    l1.file("replaced/again/b", "b")
    l0.file("replaced/xattrs", "with", xattrs={"user.gone": b"x"})
    l1.file("replaced/xattrs", "without")


def devices(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("devices")
    l0.char("devices/null", (1, 3), mode=0o666)
    l0.char("devices/big", (511, 1_000_000), mode=0o600)
    l0.char("devices/zero", (0, 1), mode=0o600)
    l0.block("devices/loop", (7, 255), mode=0o660, gid=6)
    l0.block("devices/wide", (259, 65_535), mode=0o660, gid=6)
    l0.fifo("devices/fifo", mode=0o622, uid=3)
    l0.char("devices/gnu", (4, 64), mode=0o600, gnu=False, time_ns=TIME * 10**9 + 999_999_999)
    l1.block("devices/null", (8, 1))


def modes_and_owners(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("modes", mode=0o1777)
    for mode in (0o4755, 0o2755, 0o1755, 0o6755, 0o7777, 0o0000, 0o0001, 0o4000):
        l0.file(f"modes/{mode:04o}", f"{mode:o}", mode=mode)
        l0.dir(f"modes/dir-{mode:04o}", mode=mode)
    # Old tars carry the file type in the mode, too.
    l0.file("modes/with-type", "x", mode=0o100644)
    # Owner after mode: a chown clears setuid, so whoever applies them must order them well.
    l0.file("modes/setuid-owned", "x", mode=0o6755, uid=33, gid=44)
    l0.dir("modes/setgid-dir", mode=0o2775, uid=33, gid=44)
    l0.file("modes/setgid-dir/inherits-nothing", "x")
    for uid in (65_534, 1_000_000, 2_097_151, 2_097_152, 2**31 - 1, 2**31, 4_294_967_294):
        l0.file(f"modes/uid-{uid}", "base-256 where it must be", uid=uid, gid=uid)
    l0.file("modes/uid-pax", "x", pax={"uid": b"3000000000", "gid": b"3000000001"})
    l0.file("modes/names-do-not-count", "x", uid=12, gid=13, pax={"uname": b"daemon", "gname": b"audio"})
    l0.file("modes/base256-zero", "x", uid=0, numbers=base256)


def times(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("times", time_ns=1_111_111_111_111_111_111)
    for name, time_ns in {
        "nanoseconds": 1_700_000_000_123_456_789,
        "one-nanosecond": 1_700_000_000_000_000_001,
        "epoch": 0,
        "before-1970": -1_000_000_000,
        "before-1970-nanoseconds": -1_500_000_001,
        "just-before-1970": -1,
        "after-2038": 2**31 * 10**9 + 1,
        "after-2106": 2**32 * 10**9 + 5,
        "year-2200": 7_258_118_400 * 10**9,
    }.items():
        l0.file(f"times/{name}", name, time_ns=time_ns)
        l0.dir(f"times/dir-{name}", time_ns=time_ns)
        l0.symlink(f"times/link-{name}", name, time_ns=time_ns)
    for name, text in {"short": b"1.5", "six-digits": b"1700000000.123456", "twelve-digits": b"1700000000.123456789999",
                       "dot-at-end": b"1700000000.", "plain": b"1700000000", "negative": b"-1.25"}.items():
        l0.file(f"times/pax-{name}", "x", pax={"mtime": text})
    l0.file("times/base256-negative", "x", mtime=-12345)
    l0.file("times/base256-late", "x", mtime=2**33 + 7)
    l0.file("times/atime-and-ctime", "x", pax={"atime": b"5", "ctime": b"6", "mtime": b"7.000000008"})
    # A directory's time is its header's, whatever is put into it later, in this layer or above.
    l0.file("times/dir-nanoseconds/late-child", "x")
    l1.file("times/dir-one-nanosecond/upper-child", "x")
    l1.whiteout("times/dir-epoch/nothing")


def xattrs(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("xattrs", xattrs={"user.dir": b"on a directory"})
    l0.file("xattrs/simple", "x", xattrs={"user.simple": b"value"})
    l0.file("xattrs/empty", "x", xattrs={"user.empty": b""})
    l0.file("xattrs/binary", "x", xattrs={"user.binary": bytes(range(256))})
    l0.file("xattrs/newline", "x", xattrs={"user.newline": b"a\nb\n"})
    l0.file("xattrs/several", "x", xattrs={f"user.n{i:02}": b"v" * i for i in range(20)})
    l0.file("xattrs/long", "x", xattrs={"user." + "n" * 250: b"v" * 1500})
    l0.file("xattrs/utf8", "x", xattrs={"user.größe": "größer".encode()})
    l0.file("xattrs/capability", "x", mode=0o755, xattrs={"security.capability": NET_BIND})
    l0.file("xattrs/capability-high", "x", mode=0o755, xattrs={"security.capability": NET_RAW_HIGH})
    # Owner after capability: a chown drops it, so the order matters again.
    l0.file("xattrs/capability-owned", "x", mode=0o755, uid=9, xattrs={"security.capability": NET_BIND})
    l0.hardlink("xattrs/linked", "xattrs/simple")
    l0.file("xattrs/replaced", "x", xattrs={"user.old": b"old", "user.both": b"old"})
    l1.file("xattrs/replaced", "x", xattrs={"user.both": b"new"})
    l0.file("xattrs/trusted", "x", xattrs={"trusted.ours": b"1"})
    l0.symlink("xattrs/trusted-link", "trusted", xattrs={"trusted.ours": b"2"})
    # What only means something to the machine that wrote it: dropped.
    l0.dir("xattrs/overlay", xattrs={"trusted.overlay.opaque": b"y"})
    l0.file("xattrs/selinux", "x", xattrs={"security.selinux": b"system_u:object_r:bin_t:s0\0"})
    # libarchive writes both forms; base64 without padding and a percent-encoded name in its own.
    l0.file("xattrs/libarchive", "x", pax={"LIBARCHIVE.xattr.user.both": b"dmFsdWU", "SCHILY.xattr.user.both": b"value"})


def acls(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("acls")
    l0.file("acls/file", "x", mode=0o674, xattrs={"system.posix_acl_access": ACL})


def names(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("names")
    for length in (98, 99, 100, 101, 154, 155, 156):
        base = "names/" + "n" * (length - len("names/"))
        l0.file(f"{base[:-3]}pax", str(length))
        l0.file(f"{base[:-3]}gnu", str(length), gnu=True)
    # ustar's split of a long name into prefix and name, the name at its full 100 bytes.
    l0.dir("names/prefix")
    l0.dir("names/prefix/" + "p" * 80)
    l0.file(b"f" * 100, "split", prefix=b"names/prefix/" + b"p" * 80)
    l0.file("names/" + "c" * 255, "the longest component")
    deep = "names/deep"
    l0.dir(deep)
    for level in range(40):
        deep += f"/level-{level:02}-" + "d" * 40
        l0.dir(deep, gnu=level % 2 == 0)
    l0.file(deep + "/pax", "a path of 2,000 bytes")
    l0.file(deep + "/gnu", "a path of 2,000 bytes", gnu=True)
    l0.file(b"names/latin-1-\xe9\xe8", "not UTF-8")
    l0.file(b"names/broken-utf8-\xc3", "not UTF-8", pax={"hdrcharset": b"BINARY"})
    l0.file(b"names/pax-\xff\xfe-" + b"b" * 120, "not UTF-8, in a PAX path")
    l0.file(b"names/gnu-\xff\xfe-" + b"b" * 120, "not UTF-8, in a GNU long name", gnu=True)
    l0.file("names/größe-日本語", "UTF-8")
    # The same letter composed and decomposed: two names.
    l0.file("names/é", "composed")
    l0.file("names/e\u0301", "decomposed")
    for name in (" blank ", "tab\there", "new\nline", "back\\slash", "-dash", "...", "star*", "quote'\"", "\x01\x7f", "Case", "case"):
        l0.file(f"names/{name}", repr(name))
    # A long name that PAX and the header tell differently: PAX counts.
    l0.file("names/in-header", "x", pax={"path": b"names/in-pax"})
    # V7 and GNU headers: no magic, a directory by its slash, a type of NUL.
    l0.entry("names/v7", b"\0", b"v7", magic=b"")
    l0.entry("names/v7-dir/", b"\0", magic=b"", mode=0o755)
    l0.file("names/v7-dir/inside", "x")


def paths(l0: Tar, l1: Tar, l2: Tar) -> None:
    """Spellings of a path; none may leave the tree."""
    l0.dir("./paths")
    l0.file("./paths/dot-slash", "x")
    l0.file("paths//double", "x")
    l0.file("paths/./dot", "x")
    l0.file("/paths/absolute", "x")
    l0.file("//paths/absolute-twice", "x")
    l0.dir("paths/sub")
    l0.file("paths/sub/../up", "x")
    l0.file("paths/no-such/../through-nothing", "x")
    l0.file("../../../../paths/escape", "x")
    l0.file("/../../paths/escape-absolute", "x")
    l0.hardlink("paths/link-escape", "../../../../paths/escape")
    # Through a symlink that points out of the tree: it ends inside, at /paths/outside.
    l0.dir("paths/outside")
    l0.symlink("paths/out", "../../../../../../../../paths/outside")
    l0.file("paths/out/kept-inside", "x")
    l1.file("./paths/dot-slash", "from above")
    l1.whiteout("./paths/sub")


def missing_parents(l0: Tar, l1: Tar, l2: Tar) -> None:
    """Files whose directories have no entry. Their time is nobody's: MTIME_OF_NOBODY lists them."""
    l0.dir("parents")
    l0.file("parents/missing/a/b/c/file", "x")
    l1.file("parents/missing/a/upper/file", "x")
    l1.symlink("parents/missing/new/link", "x")
    l2.dir("parents/missing/new/dir", mode=0o700)
    # The entry comes after the children, in this layer and in the next.
    l0.file("parents/late/child", "x")
    l0.dir("parents/late", mode=0o701, uid=4)
    l0.file("parents/later/child", "x")
    l1.dir("parents/later", mode=0o702, uid=5)
    # Below a symlink that leads nowhere, and below a file.
    l0.symlink("parents/dangling", "nowhere/deep")
    l1.file("parents/dangling/file", "x")


def duplicates(l0: Tar, l1: Tar, l2: Tar) -> None:
    """The last entry of a name counts."""
    l0.dir("duplicates")
    l0.file("duplicates/file", "first, and longer", mode=0o600)
    l0.file("duplicates/file", "second", mode=0o640)
    l0.dir("duplicates/dir", mode=0o700)
    l0.file("duplicates/dir/kept", "kept")
    l0.dir("duplicates/dir", mode=0o755, uid=6)
    l0.file("duplicates/file-then-link", "x")
    l0.symlink("duplicates/file-then-link", "file")
    l0.dir("duplicates/dir-then-file")
    l0.file("duplicates/dir-then-file/inside", "gone")
    l0.file("duplicates/dir-then-file", "a file now")
    l0.file("duplicates/linked", "first")
    l0.hardlink("duplicates/link-to-first", "duplicates/linked")
    l0.file("duplicates/linked", "second")


# name -> (size, {offset: data}) of the sparse files.
SPARSE = {
    "hole-at-start": (300_000, {200_704: pattern(4096, 1)}),
    "hole-at-end": (300_001, {0: pattern(4096, 2)}),
    "all-hole": (1_000_000, {}),
    # More pieces than one header and one extension block hold (4 and 21).
    "many": (60 * 65_536 + 7, {i * 65_536: pattern(4096, i) for i in range(60)}),
    "across-chunks": (3 * CHUNK, {CHUNK - 4096: pattern(8192, 3), 2 * CHUNK: pattern(4096, 4)}),
    "plain": (3000, {0: pattern(3000, 5)}),
}


def sparse_files(prefix: str):
    """Fills a directory with sparse files. In place of sparse/NAME it has sparse@NAME, which the
    caller's --transform puts right: the directory has an entry of its own already."""
    def fill(directory: pathlib.Path) -> None:
        for name, (size, pieces) in SPARSE.items():
            with open(directory / f"sparse@{prefix}-{name}", "wb") as file:
                file.truncate(size)
                for at, data in pieces.items():
                    file.seek(at)
                    file.write(data)
    return fill


SPARSE_OPTIONS = ["--sparse", "--transform=s,^sparse@,sparse/,"]


def sparse(l0: Tar, l1: Tar, l2: Tar) -> None:
    """What the real GNU tar writes with --sparse, in each of its formats."""
    l0.dir("sparse")

    for prefix, options in {
        "pax-0.0": ["--format=pax", "--sparse-version=0.0"],
        "pax-0.1": ["--format=pax", "--sparse-version=0.1"],
        "pax-1.0": ["--format=pax", "--sparse-version=1.0"],
    }.items():
        l0.gnu_tar(sparse_files(prefix), *SPARSE_OPTIONS, *options)


def sizes(l0: Tar, l1: Tar, l2: Tar) -> None:
    l0.dir("sizes")
    for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, 65_536, CHUNK - 1, CHUNK, CHUNK + 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2 * CHUNK + 17):
        l0.file(f"sizes/{size}", pattern(size, size))
    l0.file("sizes/base256", pattern(1000, 77), numbers=base256)
    l0.file("sizes/pax-size", pattern(700, 78), pax={"size": b"700"})
    # More names than one readdir reply holds.
    l0.dir("sizes/many")
    for i in range(3000):
        l0.file(f"sizes/many/entry-{i:04}-" + "e" * (i % 40), b"%d" % i if i % 7 == 0 else b"")


def empty_layers() -> list[Tar]:
    """A layer of two zero blocks only, and one of no bytes at all."""
    nothing = Tar()
    nothing.without_end = True
    return [Tar(), nothing]


CASES = [whiteouts, opaque, hardlinks, symlinks, through_symlinks, types_replaced, devices, modes_and_owners, times,
         xattrs, acls, names, paths, missing_parents, duplicates, sparse, sizes]

# Directories of `nasty` whose time in umoci's tree is that of the unpacking (e2e/README.md, "What
# umoci does differently"). Their right times, where a layer has one, are checked by `nasty_extra`.
MTIME_OF_UNPACKING = [
    # No layer has an entry for them.
    *["parents/missing" + below for below in ("", "/a", "/a/b", "/a/b/c", "/a/upper", "/new")],
    "parents/nowhere", "parents/nowhere/deep",
    # A directory without an entry was made in it.
    "parents",
    # A marker that comes after it hides something in it.
    "opaque/last/sub", "whiteouts/dir-before-marker",
]


def nasty(only=None, *, padded=False) -> list[bytes]:
    """The layers of the image `nasty`, lowest first; `only` picks cases by name, `padded` leaves out what ends within a block."""
    l0, l1, l2 = Tar(), Tar(), Tar()
    l0.dir("./", mode=0o755, time_ns=1_234_567_890_987_654_321)
    for case in CASES:
        if only is None or case.__name__ in only:
            case(l0, l1, l2)
    l1.without_end = True
    # Also cut right behind the last byte of data: some writers do not even pad.
    l2.file("no-padding", "the last block is short")
    l2.without_end = True
    last = l2.bytes() if padded else l2.bytes().rstrip(b"\0")
    return [l0.bytes(), l1.bytes(), *[it.bytes() for it in empty_layers()], last]


def nasty_extra() -> tuple[list[bytes], dict[str, dict[str, str]], list[str]]:
    """Layers that umoci refuses or gets wrong; the tree they must give; directories without a time."""
    l0, l1 = Tar(), Tar()
    expected: dict[str, dict[str, str]] = {}
    no_time: list[str] = []

    def expect(path, kind, mode, data=b"", nlink=1, group=None, uid=0, mtime=TIME) -> None:
        line = {"type": kind, "mode": f"{mode:04o}", "uid": str(uid), "gid": "0", "mtime": f"{mtime}.000000000"}
        if kind != "dir":
            line["nlink"] = str(nlink)
        if group:
            line["group"] = group
        if kind == "file":
            line["size"], line["sha256"] = str(len(data)), hashlib.sha256(data).hexdigest()
        expected[escape(path.encode())] = line

    def expect_dir_without_entry(path) -> None:
        expect(path, "dir", 0o755)
        no_time.append(path)

    l0.dir("./")
    expect(".", "dir", 0o755)

    # umoci: the hidden child takes the time of its directory along.
    l0.dir("marker-last")
    l0.dir("marker-last/sub")
    l0.file("marker-last/sub/old")
    l1.dir("marker-last", mode=0o711)
    l1.dir("marker-last/sub", mode=0o700)
    l1.file("marker-last/sub/new", "new")
    l1.opaque("marker-last")
    expect("marker-last", "dir", 0o711)
    expect("marker-last/sub", "dir", 0o700)
    expect("marker-last/sub/new", "file", 0o644, b"new")

    # umoci: a directory that is only implied is new before the marker, the lower layer's after it.
    for name in ("implied-first", "implied-last"):
        l0.dir(name)
        l0.dir(f"{name}/sub", mode=0o700, uid=9)
        l0.file(f"{name}/sub/old")
        if name == "implied-first":
            l1.opaque(name)
        l1.file(f"{name}/sub/new", "new")
        if name == "implied-last":
            l1.opaque(name)
        expect(name, "dir", 0o755)
        expect_dir_without_entry(f"{name}/sub")
        expect(f"{name}/sub/new", "file", 0o644, b"new")

    # umoci: making the missing directory changes the time of the one that it is in.
    l0.dir("parent")
    l0.file("parent/missing/file", "x")
    expect("parent", "dir", 0o755)
    expect_dir_without_entry("parent/missing")
    expect("parent/missing/file", "file", 0o644, b"x")

    # umoci: refuses a link to a name that the same layer hides before it.
    l0.dir("renamed")
    l0.file("renamed/old", "renamed")
    l1.whiteout("renamed/old")
    l1.hardlink("renamed/new", "renamed/old")
    expect("renamed", "dir", 0o755)
    expect("renamed/new", "file", 0o644, b"renamed")

    # umoci: refuses these types. A global header (git archive writes one) concerns no file; POSIX has
    # a contiguous file read as a plain one where the system has none.
    l0.pax({"comment": b"0123456789abcdef"}, kind=b"g")
    l0.dir("types")
    l0.entry("types/contiguous", b"7", b"contiguous")
    expect("types", "dir", 0o755)
    expect("types/contiguous", "file", 0o644, b"contiguous")

    # umoci: refuses GNU tar's own sparse files (type S), which --sparse writes by default.
    l0.dir("sparse")
    l0.gnu_tar(sparse_files("old-gnu"), "--format=gnu", *SPARSE_OPTIONS)
    expect("sparse", "dir", 0o755)
    for name, (size, pieces) in SPARSE.items():
        data = bytearray(size)
        for at, piece in pieces.items():
            data[at:at + len(piece)] = piece
        expect(f"sparse/old-gnu-{name}", "file", 0o644, bytes(data))
    return [l0.bytes(), l1.bytes()], expected, no_time


def hostile() -> dict[str, list[bytes]]:
    """Layers that no honest tool writes. Refusing them is right, and so is a tree without harm; to
    crash, to hang, to lose a directory or to reach outside the tree is not."""
    def layers(lower, upper=None) -> list[bytes]:
        l0, l1 = Tar(), Tar()
        l0.dir("./")
        l0.dir("victim")
        l0.file("victim/file", "must stay")
        lower(l0)
        if upper:
            upper(l1)
        return [l0.bytes(), l1.bytes()]

    def bad_checksum(tar: Tar) -> None:
        block = bytearray(header(b"bad", FILE))
        block[0] ^= 1
        tar.raw(bytes(block))

    nothing = lambda tar: None
    return {
        "marker-without-name": layers(nothing, lambda tar: tar.file("victim/.wh.")),
        "marker-of-dot": layers(nothing, lambda tar: tar.file("victim/.wh..")),
        "marker-of-dot-dot": layers(nothing, lambda tar: tar.file("victim/.wh...")),
        "link-to-nothing": layers(lambda tar: tar.hardlink("link", "no/such/name")),
        "link-to-itself": layers(lambda tar: tar.hardlink("link", "link")),
        "link-to-later": layers(lambda tar: (tar.hardlink("link", "later"), tar.file("later", "x"))),
        "link-to-directory": layers(lambda tar: tar.hardlink("link", "victim")),
        "link-to-root": layers(lambda tar: tar.hardlink("link", "/")),
        "file-below-file": layers(nothing, lambda tar: tar.file("victim/file/below", "x")),
        "symlink-as-root": layers(nothing, lambda tar: tar.entry("./", SYMLINK, linkname="/etc")),
        "file-as-root": layers(nothing, lambda tar: tar.entry("./", FILE, b"x")),
        "loop-as-parent": layers(lambda tar: tar.symlink("loop", "loop"), lambda tar: tar.file("loop/file", "x")),
        "empty-name": layers(lambda tar: tar.file("", "x")),
        "nul-in-name": layers(lambda tar: tar.file("x", "x", pax={"path": b"nul\0in/name"})),
        "component-of-256-bytes": layers(lambda tar: tar.file("a" * 256, "a component of 256 bytes")),
        "path-of-5000-bytes": layers(lambda tar: tar.file("p/" * 2500 + "end", "x")),
        "10000-directories-deep": layers(lambda tar: tar.file("d/" * 10_000 + "end", "x")),
        "negative-size": layers(lambda tar: tar.raw(header(b"negative", FILE, size=-1, numbers=base256))),
        "size-beyond-layer": layers(lambda tar: tar.raw(header(b"long", FILE, size=1 << 40))),
        "size-near-2-64": layers(lambda tar: tar.raw(header(b"long", FILE, size=(1 << 63) - 1))),
        "pax-size-overflow": layers(lambda tar: tar.file("x", "x", pax={"size": b"18446744073709551615"})),
        "pax-length-lies": layers(lambda tar: (tar.raw(header(b"p", b"x", size=512) + b"999 path=x\n".ljust(512, b"\0")), tar.file("x", "x"))),
        "pax-of-1-gib": layers(lambda tar: tar.raw(header(b"p", b"x", size=1 << 30))),
        "bad-checksum": layers(bad_checksum),
        "lone-zero-block": layers(lambda tar: (tar.raw(bytes(512)), tar.file("after", "x"))),
        "unknown-type": layers(lambda tar: tar.entry("unknown", b"Q", b"data")),
        "directory-with-size": layers(lambda tar: tar.raw(header(b"dir/", DIR, size=1024))),
        "sparse-map-lies": layers(lambda tar: tar.file("sparse", "x" * 512, pax={
            "GNU.sparse.major": b"0", "GNU.sparse.minor": b"1", "GNU.sparse.size": b"100",
            "GNU.sparse.map": b"0,512,18446744073709551000,512"})),
        "xattr-without-prefix": layers(lambda tar: tar.file("x", "x", xattrs={"nonsense": b"x", "": b"y"})),
        "xattr-of-1-mib": layers(lambda tar: tar.file("x", "x", xattrs={"user.big": b"v" * (1 << 20)})),
        "time-out-of-range": layers(lambda tar: tar.file("x", "x", pax={"mtime": b"9" * 30})),
        "device-number-wide": layers(lambda tar: tar.entry("x", CHAR, rdev=(0o7777777, 0o7777777))),
        "uid-out-of-range": layers(lambda tar: tar.file("x", "x", uid=1 << 40)),
    }


def nasty_root() -> list[bytes]:
    """An opaque root between other layers; the last layer changes the root's own metadata."""
    l0, l1, l2 = Tar(), Tar(), Tar()
    l0.dir(".", mode=0o700, uid=5)
    l0.file("old", "hidden")
    l0.dir("dir")
    l0.file("dir/old", "hidden")
    l1.file("new", "new")
    l1.opaque("")
    l1.dir("dir", mode=0o711)
    l2.dir("./", mode=0o1777, gid=6, xattrs={"user.root": b"yes"}, time_ns=1_000_000_000_000_000_001)
    l2.whiteout("never-was")
    return [l0.bytes(), l1.bytes(), l2.bytes()]
