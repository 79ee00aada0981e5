"""The images of the benchmarks, made of the real files of the image debian-python, and kept in the cache.

They are no images of the tests: `images.py build` does not make them.
"""

import hashlib
import os
import pathlib
import random
import shutil
import subprocess

import images
from harness import oci, rawtar
from harness.process import run

MB = 1000 * 1000
# What the layers called so have, decompressed.
SIZES = {"bench-30mb": 30 * MB, "bench-300mb": 300 * MB, "bench-1200mb": 1200 * MB}
BIG_FILE, BIG_BYTES = "bench/big", 512 << 20
SMALL_DIR, N_SMALL = "bench/small", 20_000
# Empty files of bench-million, and how many of them a directory has.
N_MILLION, PER_DIRECTORY = 1_000_000, 1000
# As the numpy of debian-python wants it.
PANDAS_WHEELS = ["pandas==2.3.3", "python-dateutil==2.9.0.post0", "pytz==2025.2", "tzdata==2025.2", "six==1.17.0"]
PACKAGES = "usr/lib/python3/dist-packages"


class GzipLayer:
    """A layer that goes through `gzip` as it is made: none of it is held in memory."""

    def __init__(self, layout: oci.Layout, level: int):
        self.layout, self.tar, self.at = layout, rawtar.Tar(), 0
        self.hash = hashlib.sha256()
        self.path = layout.directory / "new.gz"
        with open(self.path, "wb") as out:
            self.gzip = subprocess.Popen(["gzip", f"-{level}", "-n"], stdin=subprocess.PIPE, stdout=out)

    def write(self, data: bytes) -> None:
        self.at += len(data)
        self.hash.update(data)
        self.gzip.stdin.write(data)

    def flush(self) -> None:
        for chunk in self.tar.chunks:
            self.write(chunk)
        self.tar.chunks.clear()

    def dir(self, name: str) -> None:
        self.tar.dir(name)
        self.flush()

    def file(self, name: str, data: bytes, mode=0o644) -> int:
        """Where the content begins in the layer."""
        self.tar.file(name, data, mode=mode)
        self.flush()
        return self.at - len(rawtar.padded(data))

    def end(self) -> tuple[dict, str]:
        """The blob's descriptor and the DiffId."""
        self.write(bytes(2 * rawtar.BLOCK))
        return self.close()

    def close(self) -> tuple[dict, str]:
        self.gzip.stdin.close()
        assert self.gzip.wait() == 0, "gzip failed"
        digest = "sha256:" + run("sha256sum", self.path).stdout.split()[0]
        size = self.path.stat().st_size
        self.path.rename(self.layout.blob(digest))
        return {"mediaType": oci.LAYER_GZIP, "digest": digest, "size": size}, "sha256:" + self.hash.hexdigest()


def real_files() -> list[pathlib.Path]:
    rootfs = images.get("debian-python").directory / "rootfs"
    found = (path for top in ("usr/lib", "usr/bin", "usr/share") for path in (rootfs / top).rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(found, key=os.fsencode)


def one_layer(it: images.Image, size: int) -> None:
    """One gzip layer of real files, dealt at random but always alike, the same ones again when they run out.

    gzip looks back 32 KiB only: it does not see that it has had a file before.
    """
    layer, files, dice, place, dealt = GzipLayer(it.layout, 6), real_files(), random.Random(size), [], 0
    layer.dir("files")
    while layer.at < size:
        if dealt % len(files) == 0:
            dice.shuffle(files)
        path = files[dealt % len(files)]
        # A short name, so that the header is one block, in directories of a usual size.
        if dealt % 500 == 0:
            top = f"files/{dealt // 500:04}"
            layer.dir(top)
        name, data = f"{top}/{path.name[:60]}-{dealt}", path.read_bytes()
        if layer.at + len(data) > size * 1.02:
            data = data[:max(0, size - layer.at)]
        place.append([name, layer.file(name, data), len(data)])
        dealt += 1
    at = layer.at
    descriptor, diff_id = layer.end()
    it.layout.add_image(images.TAG, [(descriptor, diff_id)])
    images.note(it, files=place, layer_bytes=at + 2 * rawtar.BLOCK)


def register(name: str, size: int) -> None:
    @images.image(name, 1, needs=["debian-python"])
    def build(it: images.Image) -> None:
        one_layer(it, size)


for _name, _size in SIZES.items():
    register(_name, _size)


def layers_of(it: images.Image, other: images.Image) -> list[tuple[dict, str]]:
    """The layers of another image, to be had in this one as well."""
    out = list(zip(other.layout.layers(images.TAG), other.layout.diff_ids(images.TAG)))
    for descriptor, _ in out:
        shutil.copy(other.layout.blob(descriptor["digest"]), it.layout.blob(descriptor["digest"]))
    return out


@images.image("bench-tree", 1, needs=["debian-python"])
def bench_tree(it: images.Image) -> None:
    """debian-python, and in one more layer a file of 512 MiB and 20,000 of 1 to 16 KiB."""
    layer, files, dice = GzipLayer(it.layout, 1), real_files(), random.Random(20)
    content = b"".join(path.read_bytes() for path in dice.sample(files, 2000))
    layer.dir("bench")
    layer.file(BIG_FILE, (content * (BIG_BYTES // len(content) + 1))[:BIG_BYTES])
    layer.dir(SMALL_DIR)
    for number in range(N_SMALL):
        if number % 200 == 0:
            layer.dir(f"{SMALL_DIR}/{number // 200:03}")
        size = dice.randint(1 << 10, 16 << 10)
        at = dice.randrange(len(content) - size)
        layer.file(f"{SMALL_DIR}/{number // 200:03}/{number:05}", content[at:at + size])
    it.layout.add_image(images.TAG, [*layers_of(it, images.get("debian-python")), layer.end()])


@images.image("bench-python", 1, needs=["debian-python"])
def bench_python(it: images.Image) -> None:
    """debian-python with pandas, all of it compiled, as images have it that were built with pip."""
    rootfs = it.directory / "rootfs"
    run("cp", "-a", images.get("debian-python").directory / "rootfs", rootfs)
    run("python3", "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", rootfs / PACKAGES, "--only-binary=:all:",
        "--python-version", run("chroot", rootfs, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip(),
        "--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64", *PANDAS_WHEELS,
        env={"PIP_ROOT_USER_ACTION": "ignore", "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    # Unchecked, because the times of the sources are not kept.
    run("chroot", rootfs, "python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", f"/{PACKAGES}")
    layer = GzipLayer(it.layout, 6)
    tar = subprocess.Popen(["tar", "-C", rootfs, "--sort=name", f"--mtime=@{rawtar.TIME}", "--numeric-owner", "-cf", "-", PACKAGES], stdout=subprocess.PIPE)
    while block := tar.stdout.read(1 << 20):
        layer.write(block)
    assert tar.wait() == 0, "tar failed"
    it.layout.add_image(images.TAG, [*layers_of(it, images.get("debian-python")), layer.close()])
    shutil.rmtree(rootfs)


@images.image("bench-million", 1)
def bench_million(it: images.Image) -> None:
    """A layer with a million empty files."""
    layer = GzipLayer(it.layout, 1)
    for number in range(N_MILLION):
        if number % PER_DIRECTORY == 0:
            layer.dir(f"{number // PER_DIRECTORY:04}")
        layer.file(f"{number // PER_DIRECTORY:04}/a-name-of-usual-length-{number:07}", b"")
    it.layout.add_image(images.TAG, [layer.end()])
