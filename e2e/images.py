#!/usr/bin/env python3
"""Makes the images of the demo and the tests, each an OCI layout in the cache, and pushes them.

usage: images.py list
       images.py build [NAME...]         all when none is named
       images.py push HOST [NAME...]     to a registry over plain http, as HOST/e2e/NAME:latest
       images.py truth NAME              prints the path of the manifest that a mount must show

An image is made when the cache has none of its version. The version is of the sources that make
it, or a number where making it is slow and the sources change often.
"""

import argparse
import fcntl
import gzip
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time

import nasty
import tree
from harness import oci, paths, process
from harness.process import run, say
from harness.rawtar import TIME, Tar, capability, header

TAG = "latest"
MIB = 1 << 20

# Wheels of the image debian-python: one big with many shared objects, then several small ones.
BIG_WHEELS = ["numpy==2.2.6"]
SMALL_WHEELS = ["requests==2.32.5", "urllib3==2.5.0", "idna==3.10", "certifi==2025.8.3", "charset-normalizer==3.4.3",
                "click==8.2.1", "jinja2==3.1.6", "markupsafe==3.0.2", "pyyaml==6.0.2"]

DEMO_LAYERS = 5
DEMO_LAYER_BYTES = 30 * MIB
# Zeros of the bomb. It costs a few kB of gzip.
BOMB_BYTES = 4 << 30


def source_hash(*names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update((paths.E2E / name).read_bytes())
    return digest.hexdigest()[:12]


class Image:
    """An image in the cache: `layout`, and what goes with it."""

    def __init__(self, name: str, directory: pathlib.Path):
        self.name, self.directory = name, directory
        self.layout = oci.Layout(directory / "layout")

    def note(self) -> dict:
        """What its builder wrote down for the tests."""
        file = self.directory / "note.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def truth(self) -> pathlib.Path:
        """The manifest that a mount must show: umoci's tree, or what the builder says."""
        given = self.directory / "expected.manifest"
        if given.exists():
            return given
        same_as = self.note().get("same_tree_as")
        if same_as:
            other = get(same_as)
            assert other.layout.diff_ids(TAG) == self.layout.diff_ids(TAG), "another tree after all"
            return other.truth()
        made = self.directory / "umoci.manifest"
        if not made.exists():
            run(paths.E2E / "truth.sh", f"{self.layout.directory}:{TAG}", made)
        return made

    def dirs_without_time(self) -> frozenset[str]:
        """Directories whose mtime the truth cannot tell. Never more than e2e/README.md lists."""
        return frozenset(self.note().get("dirs_without_time", []))

    def layer_digests(self) -> list[str]:
        """The blobs of layers that have bytes to fetch: an empty one needs no request."""
        return [layer["digest"] for layer in self.layout.layers(TAG) if layer["size"] > 0]

    def push(self, host: str) -> str:
        """Pushes the image unless it is there; its reference."""
        if self.note().get("push_as_docker"):
            # skopeo converts manifest and media types; the blobs stay as they are.
            run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", "--format", "v2s2",
                f"oci:{self.layout.directory}:{TAG}", f"docker://{host}/e2e/{self.name}:{TAG}")
        else:
            oci.push(self.layout, TAG, host, f"e2e/{self.name}")
        return f"{host}/e2e/{self.name}:{TAG}"


BUILDERS = {}


def image(name: str, version, needs=()):
    """Registers a builder; `needs` are images that it is made from."""
    def register(function):
        BUILDERS[name] = (function, version, needs)
        return function
    return register


def version_of(name: str) -> str:
    _, version, needs = BUILDERS[name]
    whole = [version() if callable(version) else str(version), *(version_of(need) for need in needs)]
    return hashlib.sha256("\n".join(whole).encode()).hexdigest()[:12]


def get(name: str) -> Image:
    """The image from the cache, made if it is not there."""
    parent = paths.cache() / "images"
    directory = parent / f"{name}-{version_of(name)}"
    if not directory.exists():
        parent.mkdir(exist_ok=True)
        # Two runs do not make the same: the second one waits, and finds it.
        with open(parent / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():
                make(name, directory)
    return Image(name, directory)


def make(name: str, directory: pathlib.Path) -> None:
    builder, _, needs = BUILDERS[name]
    for need in needs:
        get(need)
    begin = time.monotonic()
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{name}.", dir=directory.parent))
    try:
        builder(Image(name, new))
        # At once: a directory under its name is whole.
        new.rename(directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for old in directory.parent.glob(f"{name}-????????????"):
        if old != directory:
            shutil.rmtree(old)
    say(f"image {name} made in {time.monotonic() - begin:.1f} s")


def note(it: Image, **facts) -> None:
    (it.directory / "note.json").write_text(json.dumps(facts))


def gzip_image(it: Image, layers: list[bytes], **more) -> None:
    it.layout.add_image(TAG, [(it.layout.add(oci.gzipped(data), oci.LAYER_GZIP), oci.digest_of(data)) for data in layers], **more)


def uncompressed(it: Image) -> list[bytes]:
    """The layers of an image of this file as tars."""
    blobs = [(layer, it.layout.blob(layer["digest"]).read_bytes()) for layer in it.layout.layers(TAG)]
    return [blob if layer["mediaType"] == oci.LAYER_TAR else gzip.decompress(blob) for layer, blob in blobs]


# --- Debian with Python, made by the real tools ---


def machine_sources() -> tuple[str, str, str]:
    """Suite, its main archive's address, and how apt trusts it, as this machine's apt has them."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', pathlib.Path("/etc/os-release").read_text(), re.M))
    suite = release["VERSION_CODENAME"]
    targets = run("apt-get", "indextargets", "--format", "$(RELEASE)|$(COMPONENT)|$(REPO_URI)|$(SIGNED_BY)", "Created-By: Packages").stdout
    for line in targets.splitlines():
        codename, component, address, signed_by = line.split("|", 3)
        if codename == suite and component == "main":
            return suite, address, signed_by
    raise process.Failed(f"apt of this machine has no source for {suite} main")


def debian_source() -> tuple[str, str, list[str]]:
    """For mmdebstrap: the suite, the line of a sources.list, and options, so that it fetches as this machine's apt does."""
    suite, address, signed_by = machine_sources()
    trust = f"[signed-by={signed_by}] " if signed_by.startswith("/") else ""
    proxy = re.findall(r"P='(.*)'", run("apt-config", "shell", "P", "Acquire::http::Proxy").stdout)
    options = [f"--aptopt=Acquire::http::Proxy {json.dumps(proxy[0])}"] if proxy else []
    return suite, f"deb {trust}{address} {suite} main", options


def debian_version() -> str:
    return "\n".join(["4", *BIG_WHEELS, *SMALL_WHEELS])


@image("debian-python", debian_version)
def debian_python(it: Image) -> None:
    """Layers: Debian with Python, numpy, small wheels, edits (whiteouts, hard links, a device, a capability)."""
    bundle = it.directory / "bundle"
    rootfs = bundle / "rootfs"
    reference = f"{it.layout.directory}:{TAG}"
    shutil.rmtree(it.layout.directory)
    run("umoci", "init", "--layout", it.layout.directory)
    run("umoci", "new", "--image", reference)
    run("umoci", "unpack", "--image", reference, bundle)

    def commit(what: str) -> None:
        run("umoci", "repack", "--refresh-bundle", "--history.created_by", what, "--image", reference, bundle)

    suite, source, options = debian_source()
    # mmdebstrap wants an empty or no directory and gives it the time of the build.
    rootfs.rmdir()
    run("mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", "--include=ca-certificates,python3", *options,
        suite, rootfs, source, env={"SOURCE_DATE_EPOCH": str(TIME)})
    # What mmdebstrap takes from this machine: the mirror and the resolver. Neither belongs into an image.
    (rootfs / "etc/apt/sources.list").write_text(f"deb http://deb.debian.org/debian {suite} main\n")
    (rootfs / "etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
    (rootfs / "etc/hostname").write_text("debian\n")
    commit("mmdebstrap")

    packages = rootfs / "usr/lib/python3/dist-packages"
    python = run("chroot", rootfs, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
    for wheels in (BIG_WHEELS, SMALL_WHEELS):
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", packages, "--only-binary=:all:",
            "--python-version", python, "--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64", *wheels,
            env={"PIP_ROOT_USER_ACTION": "ignore", "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
        commit("pip install")

    shutil.rmtree(rootfs / "usr/share/doc")
    (rootfs / "usr/share/doc").mkdir()
    (rootfs / "etc/motd").unlink(missing_ok=True)
    (rootfs / "etc/motd.new").write_text("edited\n")
    os.link(rootfs / "etc/motd.new", rootfs / "etc/motd.linked")
    os.mknod(rootfs / "dev/clip", 0o020640, os.makedev(10, 229))
    (rootfs / "usr/local/bin/ping").write_bytes(b"#!/bin/sh\n")
    (rootfs / "usr/local/bin/ping").chmod(0o4755)
    shutil.copy(rootfs / "usr/bin/env", rootfs / "usr/local/bin/capable")
    run("setcap", "cap_net_raw+ep", rootfs / "usr/local/bin/capable")
    run("setfattr", "-n", "user.origin", "-v", "e2e", rootfs / "usr/local/bin/capable")
    commit("edits")

    run("umoci", "gc", "--layout", it.layout.directory)
    # A bare rootfs is what the demo's layers are cut from.
    rootfs.rename(it.directory / "rootfs")
    shutil.rmtree(bundle)


@image("demo5", 4, needs=["debian-python"])
def demo5(it: Image) -> None:
    """Five gzip layers of 30 MB of real files, each below a directory of its own."""
    rootfs = get("debian-python").directory / "rootfs"
    files = sorted(
        (path for top in ("usr/lib", "usr/bin", "usr/sbin", "usr/share") for path in (rootfs / top).rglob("*")
         if path.is_file() and not path.is_symlink()),
        key=lambda path: os.fsencode(path),
    )
    # Dealt at random but always alike, so that each layer has small and big files of all kinds.
    random.Random(5).shuffle(files)
    layers, inventory = [], []
    for number in range(1, DEMO_LAYERS + 1):
        top, used, chosen = f"layer-{number}", 0, []
        while used < DEMO_LAYER_BYTES - 256 * 1024:
            for place, path in enumerate(files):
                # One huge file would leave no room for others.
                if path.stat().st_size <= min(DEMO_LAYER_BYTES - used, DEMO_LAYER_BYTES // 3):
                    break
            else:
                break
            path = files.pop(place)
            chosen.append((path.relative_to(rootfs), path))
            # A block for the header, the content padded to blocks.
            used += 512 + (path.stat().st_size + 511) // 512 * 512
        layer, dirs = Tar(), set()
        layer.dir(top)
        for relative, path in sorted(chosen):
            for parent in reversed(relative.parents[:-1]):
                if parent not in dirs:
                    dirs.add(parent)
                    layer.dir(f"{top}/{parent}")
            info = path.stat()
            layer.file(f"{top}/{relative}", path.read_bytes(), mode=info.st_mode & 0o7777, mtime=int(info.st_mtime))
        layers.append(layer.bytes())
        # What the demo reads, with what it must read.
        inventory.append({f"{top}/{relative}": hashlib.sha256(path.read_bytes()).hexdigest() for relative, path in sorted(chosen) if path.stat().st_size})
    assert all(DEMO_LAYER_BYTES * 0.95 < len(layer) < DEMO_LAYER_BYTES * 1.1 for layer in layers), [len(it) for it in layers]
    gzip_image(it, layers)
    note(it, files=inventory, layer_bytes=[len(layer) for layer in layers])


@image("demo1", 3, needs=["demo5"])
def demo1(it: Image) -> None:
    """The first layer of demo5 alone."""
    whole = get("demo5")
    gzip_image(it, uncompressed(whole)[:1])
    note(it, files=whole.note()["files"][:1], layer_bytes=whole.note()["layer_bytes"][:1])


@image("zstd", 1, needs=["debian-python"])
def zstd(it: Image) -> None:
    """debian-python with zstd layers: one frame each, except that the first has one frame per 4 MiB."""
    base = get("debian-python")
    layers = []
    for number, (data, diff_id) in enumerate(zip(uncompressed(base), base.layout.diff_ids(TAG))):
        pieces = [data[at:at + 4 * MIB] for at in range(0, len(data), 4 * MIB)] if number == 0 else [data]
        packed = b"".join(subprocess.run(["zstd", "-3", "--check", "-c"], input=piece, check=True, capture_output=True).stdout for piece in pieces)
        layers.append((it.layout.add(packed, oci.LAYER_TAR + "+zstd"), diff_id))
    it.layout.add_image(TAG, layers)
    note(it, same_tree_as="debian-python")


@image("tables", 1, needs=["demo1"])
def tables(it: Image) -> None:
    """What images with tables of contents are made of: real files, and above them one of each kind."""
    [inventory] = get("demo1").note()["files"]
    layer = Tar()
    layer.dir("kinds", time_ns=TIME * 10**9)
    layer.file("kinds/setuid", "#!/bin/sh\n", mode=0o4755, uid=1000, gid=2000)
    layer.file("kinds/capable", "x" * 70_000, xattrs={"security.capability": capability(1 << 13), "user.origin": b"e2e"})
    layer.file("kinds/empty", "")
    layer.file(f"kinds/{'long' * 40}", "long\n")
    layer.hardlink("kinds/linked", "kinds/capable")
    layer.symlink("kinds/link", "../layer-1")
    layer.char("kinds/char", (10, 229))
    layer.fifo("kinds/fifo")
    layer.whiteout(min(inventory))
    gzip_image(it, [*uncompressed(get("demo1")), layer.bytes()])


def with_tables(it: Image, kind: str, media_type: str) -> None:
    """The image `tables` with layers that carry tables of contents, made by the format's own library."""
    program = pathlib.Path(run(paths.E2E / "tools.sh", "toc").stdout.strip()) / "toc"
    layers = []
    with tempfile.TemporaryDirectory(dir=it.directory) as scratch:
        for data in uncompressed(get("tables")):
            tar, blob = pathlib.Path(scratch) / "tar", pathlib.Path(scratch) / "blob"
            tar.write_bytes(data)
            made = json.loads(run(program, kind, tar, blob).stdout)
            layers.append(({**it.layout.add(blob.read_bytes(), media_type), "annotations": made["annotations"]}, made["diff_id"]))
    it.layout.add_image(TAG, layers)
    shutil.copy(get("tables").truth(), it.directory / "expected.manifest")


TOC_SOURCES = lambda: source_hash("tools/toc/main.go", "tools/toc/go.mod")


@image("estargz", TOC_SOURCES, needs=["tables"])
def estargz(it: Image) -> None:
    """Layers in eStargz."""
    with_tables(it, "estargz", oci.LAYER_GZIP)


@image("zstd-chunked", TOC_SOURCES, needs=["tables"])
def zstd_chunked(it: Image) -> None:
    """Layers in zstd:chunked."""
    with_tables(it, "zstd-chunked", oci.LAYER_TAR + "+zstd")


@image("docker", 1, needs=["debian-python"])
def docker(it: Image) -> None:
    """debian-python as Docker has it (schema 2): converted by skopeo when it is pushed."""
    shutil.rmtree(it.layout.directory)
    run("skopeo", "copy", "--quiet", f"oci:{get('debian-python').layout.directory}:{TAG}", f"oci:{it.layout.directory}:{TAG}")
    note(it, same_tree_as="debian-python", push_as_docker=True)


# --- images written by hand ---

NASTY_SOURCES = lambda: source_hash("nasty.py", "harness/rawtar.py")


@image("nasty", NASTY_SOURCES)
def make_nasty(it: Image) -> None:
    """Every nasty case that umoci unpacks."""
    gzip_image(it, nasty.nasty())
    note(it, dirs_without_time=nasty.MTIME_OF_UNPACKING)


@image("nasty-kernel", NASTY_SOURCES)
def make_nasty_kernel(it: Image) -> None:
    """All of `nasty` but what keeps an image from being mounted in the kernel: access control lists, an archive that ends within a block."""
    gzip_image(it, nasty.nasty({case.__name__ for case in nasty.CASES} - {"acls"}, padded=True))
    note(it, dirs_without_time=nasty.MTIME_OF_UNPACKING)


@image("nasty-root", NASTY_SOURCES)
def make_nasty_root(it: Image) -> None:
    """An opaque root."""
    gzip_image(it, nasty.nasty_root())


@image("nasty-extra", NASTY_SOURCES)
def make_nasty_extra(it: Image) -> None:
    """The nasty cases that umoci refuses or gets wrong."""
    layers, expected, no_time = nasty.nasty_extra()
    gzip_image(it, layers)
    with open(it.directory / "expected.manifest", "w") as file:
        tree.write(expected, file)
    note(it, dirs_without_time=no_time)


@image("multi-member", NASTY_SOURCES, needs=["demo1"])
def multi_member(it: Image) -> None:
    """gzip layers of many members, as bgzip, eStargz and concatenation make them."""
    layers = []
    for data in [*nasty.nasty(), *uncompressed(get("demo1"))]:
        dice, at, members = random.Random(len(data)), 0, []
        while at < len(data):
            # From one byte to several chunks; sometimes an empty member, which is lawful, too.
            step = dice.choice([1, 7, 512, 70_000, MIB, 3 * MIB])
            members.append(oci.gzipped(data[at:at + step]))
            at += step
            if dice.random() < 0.1:
                members.append(oci.gzipped(b""))
        layers.append((it.layout.add(b"".join(members or [oci.gzipped(b"")]), oci.LAYER_GZIP), oci.digest_of(data)))
    it.layout.add_image(TAG, layers)
    note(it, dirs_without_time=nasty.MTIME_OF_UNPACKING)


@image("plain", NASTY_SOURCES, needs=["demo1"])
def plain(it: Image) -> None:
    """Layers that are not compressed."""
    layers = [*nasty.nasty(), *uncompressed(get("demo1"))]
    it.layout.add_image(TAG, [(it.layout.add(data, oci.LAYER_TAR), oci.digest_of(data)) for data in layers])
    note(it, dirs_without_time=nasty.MTIME_OF_UNPACKING)


def one_file(name: str, content: str) -> bytes:
    layer = Tar()
    layer.dir("./")
    layer.file(name, content)
    return layer.bytes()


def add_platform(it: Image, architecture: str, **more) -> dict:
    data = one_file("architecture", architecture + "\n")
    return it.layout.add_image(None, [(it.layout.add(oci.gzipped(data), oci.LAYER_GZIP), oci.digest_of(data))], architecture=architecture, **more)


@image("multi-arch", 2)
def multi_arch(it: Image) -> None:
    """An image index as buildx writes it: platforms with a content of their own, and an attestation."""
    statement = it.layout.add(b'{"_type": "https://in-toto.io/Statement/v0.1"}', "application/vnd.in-toto+json")
    attestation = it.layout.add_image(None, [(statement, oci.digest_of(b""))], architecture="unknown", config={"os": "unknown"})
    # This machine's platform is neither first nor last, and its manifest has no mediaType.
    it.layout.add_index(TAG, [
        (attestation, {"architecture": "unknown", "os": "unknown"}),
        (add_platform(it, "arm64"), {"architecture": "arm64", "os": "linux", "variant": "v8"}),
        (add_platform(it, "amd64", media_type=False), {"architecture": "amd64", "os": "linux"}),
        (add_platform(it, "arm"), {"architecture": "arm", "os": "linux", "variant": "v7"}),
        (add_platform(it, "amd64", config={"os": "windows"}), {"architecture": "amd64", "os": "windows", "os.version": "10.0.20348.2340"}),
    ])
    for architecture in ("amd64", "arm64"):
        expected = {
            ".": {"type": "dir", "mode": "0755", "uid": "0", "gid": "0", "mtime": f"{TIME}.000000000"},
            "architecture": {"type": "file", "mode": "0644", "uid": "0", "gid": "0", "size": str(len(architecture) + 1), "mtime": f"{TIME}.000000000",
                             "nlink": "1", "sha256": hashlib.sha256(f"{architecture}\n".encode()).hexdigest()},
        }
        with open(it.directory / f"expected.{architecture}.manifest", "w") as file:
            tree.write(expected, file)
    here = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    shutil.copy(it.directory / f"expected.{here}.manifest", it.directory / "expected.manifest")


@image("foreign", 1)
def foreign(it: Image) -> None:
    """An image index without this machine's platform."""
    it.layout.add_index(TAG, [(add_platform(it, name), {"architecture": name, "os": "linux"}) for name in ("s390x", "ppc64le")])


@image("small", 1)
def small(it: Image) -> None:
    """One file: for tests that are not about content."""
    gzip_image(it, [one_file("hello", "hello\n")])


# --- images that must be refused ---


@image("lying", 1)
def lying(it: Image) -> None:
    """The blob is what its digest says, the DiffId in the config is another tar's."""
    data = one_file("hello", "not what the config says\n")
    it.layout.add_image(TAG, [(it.layout.add(oci.gzipped(data), oci.LAYER_GZIP), oci.digest_of(b"another tar"))])


@image("truncated", 1)
def truncated(it: Image) -> None:
    """The gzip stream ends in its middle; the digest is that of the cut blob."""
    layer = Tar()
    layer.file("random", random.Random(1).randbytes(3 * MIB))
    layer.file("after", "x")
    data = layer.bytes()
    packed = oci.gzipped(data)
    it.layout.add_image(TAG, [(it.layout.add(packed[:len(packed) // 2], oci.LAYER_GZIP), oci.digest_of(data))])


@image("bad-crc", 1)
def bad_crc(it: Image) -> None:
    """The gzip trailer's checksum is wrong, as after a flipped bit."""
    data = one_file("hello", "hello\n")
    packed = bytearray(oci.gzipped(data))
    packed[-8] ^= 1
    it.layout.add_image(TAG, [(it.layout.add(bytes(packed), oci.LAYER_GZIP), oci.digest_of(data))])


@image("not-a-tar", 1)
def not_a_tar(it: Image) -> None:
    """gzip of something that is no tar."""
    data = b"This is a letter and not a tar archive.\n" * 1000
    gzip_image(it, [data])


@image("not-gzip", 1)
def not_gzip(it: Image) -> None:
    """Bytes that are neither gzip nor zstd nor tar, under gzip's media type."""
    data = random.Random(2).randbytes(50_000)
    it.layout.add_image(TAG, [(it.layout.add(data, oci.LAYER_GZIP), oci.digest_of(data))])


@image("odd-media-type", 1)
def odd_media_type(it: Image) -> None:
    """A layer of a media type that nobody knows."""
    data = one_file("hello", "hello\n")
    it.layout.add_image(TAG, [(it.layout.add(data, "application/vnd.example.layer.v9+secret"), oci.digest_of(data))])


@image("fewer-diff-ids", 1)
def fewer_diff_ids(it: Image) -> None:
    """Two layers, one DiffId."""
    data = [one_file("a", "a\n"), one_file("b", "b\n")]
    layers = [(it.layout.add(oci.gzipped(each), oci.LAYER_GZIP), oci.digest_of(each)) for each in data]
    it.layout.add_image(TAG, layers, config={"rootfs": {"type": "layers", "diff_ids": [layers[0][1]]}})


@image("bomb", 2)
def bomb(it: Image) -> None:
    """A few kB of gzip that become a file of 4 GiB of zeros; honest in all its digests."""
    block = bytes(64 * MIB)
    # Members of equal content are equal, so one is compressed and repeated.
    member = oci.gzipped(block, 9)
    head = header(b"zeros", b"0", size=BOMB_BYTES)
    digest = hashlib.sha256(head)
    for _ in range(BOMB_BYTES // len(block)):
        digest.update(block)
    digest.update(bytes(1024))
    packed = oci.gzipped(head) + member * (BOMB_BYTES // len(block)) + oci.gzipped(bytes(1024))
    it.layout.add_image(TAG, [(it.layout.add(packed, oci.LAYER_GZIP), "sha256:" + digest.hexdigest())])


def hostile_image(name: str):
    def build(it: Image) -> None:
        gzip_image(it, nasty.hostile()[name])
    return build


HOSTILE = [f"hostile-{name}" for name in nasty.hostile()]
for _name in nasty.hostile():
    BUILDERS[f"hostile-{_name}"] = (hostile_image(_name), NASTY_SOURCES, ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "build", "push", "truth"])
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.command == "list":
        for name, (builder, _, _) in BUILDERS.items():
            print(f"{name:16} {(builder.__doc__ or 'A layer that no honest tool writes.').splitlines()[0]}")
        return
    host = args.names.pop(0) if args.command == "push" else None
    unknown = [name for name in args.names if name not in BUILDERS]
    if unknown:
        sys.exit(f"images.py: no such image: {', '.join(unknown)}; `images.py list` has them")
    try:
        for name in args.names or BUILDERS:
            it = get(name)
            if args.command == "push":
                print(it.push(host))
            elif args.command == "truth":
                print(it.truth())
    except process.Failed as error:
        sys.exit(f"images.py: {error}")


if __name__ == "__main__":
    main()
