#!/usr/bin/env python3
"""Boots distributions' kernels in virtual machines and runs the tests of images in the kernel there; the last line counts.

usage: kernels.py [-v] [NAME ...]

What is tested here depends on the kernel, and CI has one. So those of Debian and Ubuntu are fetched from their archives and booted with the tests' own
binary as their only program. Each must show the trees as they are; and one that the driver trusts must not leave zeros to others where a reader was
killed. Not part of `make ci`: it fetches half a gigabyte, and what archives have changes.
"""

import argparse
import dataclasses
import hashlib
import json
import lzma
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

from harness import paths

DEBIAN, UBUNTU = "http://deb.debian.org/debian", "http://archive.ubuntu.com/ubuntu"
# Which modules a machine needs that has a disk, ext4 on it, and EROFS; what is built in has none.
MODULES = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "erofs"]
# No kernel here needs a minute to boot without hardware that helps.
BOOT_SECONDS = 300
DISK_BYTES = 1 << 30
KILLED = "erofs::killed::"

INIT = """#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc none /proc
busybox mount -t sysfs none /sys
busybox mount -t devtmpfs none /dev
for module in {modules}; do busybox insmod /modules/$module.ko; done
busybox mount -t ext4 /dev/vda /tmp
echo "RELEASE $(busybox uname -r)"
it erofs:: --nocapture --test-threads=1 2>&1
echo "KILLED"
CLIP_CSI_TEST_ANY_KERNEL=1 it {killed} --nocapture 2>&1
busybox poweroff -f
"""


@dataclasses.dataclass
class Kernel:
    """Of a suite of an archive, the newest whose release matches."""

    archive: str
    suite: str
    release: str


KERNELS = {
    # The oldest series with EROFS of files that is cared for, and the newest that Debian has.
    "debian-6.12": Kernel(DEBIAN, "trixie", r"6\.12\..*-amd64"),
    "debian-7": Kernel(DEBIAN, "trixie-backports", r"7\..*-amd64"),
    # Before the fix that `erofs::unavailable` is about.
    "ubuntu-6.14": Kernel(UBUNTU, "plucky", r"6\.14\..*-generic"),
    "ubuntu-6.17": Kernel(UBUNTU, "questing", r"6\.17\..*-generic"),
}


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def packages(kernel: Kernel) -> dict[str, dict[str, str]]:
    """The packages of which the kernel is made; none if the archive has it no more."""
    index = lzma.decompress(fetched(f"{kernel.archive}/dists/{kernel.suite}/main/binary-amd64/Packages.xz")).decode()
    found = {}
    for stanza in index.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Filename|SHA256): (.*)$", stanza, re.MULTILINE))
        name = re.fullmatch(rf"linux-(image-unsigned|image|binary|modules)-({kernel.release})", fields.get("Package", ""))
        if name and not re.search("cloud|rt-", name[2]):
            found.setdefault(name[2], {})[name[1]] = fields
    newest = max(found, key=lambda it: [int(number) for number in re.findall(r"\d+", it)], default=None)
    return found.get(newest, {})


def unpacked(kernel: Kernel, to: pathlib.Path) -> bool:
    """Unpacks the kernel; whether there is one."""
    parts = packages(kernel)
    for fields in parts.values():
        package = fetched(f"{kernel.archive}/{fields['Filename']}")
        if hashlib.sha256(package).hexdigest() != fields["SHA256"]:
            sys.exit(f"kernels.py: {fields['Filename']} is not what its archive's index says: try again")
        subprocess.run(["dpkg-deb", "--extract", "/dev/stdin", to], input=package, check=True)
    return bool(parts)


def modules(tree: pathlib.Path, to: pathlib.Path) -> list[str]:
    """Unpacks the modules that are needed; their names in the order in which they are loaded."""
    there = {re.sub("-", "_", it.name.split(".ko")[0]): it for it in tree.rglob("*.ko*")}
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name not in there:
            return
        unpack = {".xz": "xz", ".zst": "zstd"}.get(there[name].suffix)
        content = subprocess.run([unpack, "-dc", there[name]], stdout=subprocess.PIPE, check=True).stdout if unpack else there[name].read_bytes()
        module = to / f"{name}.ko"
        module.write_bytes(content)
        depends = subprocess.run(["modinfo", "-F", "depends", module], stdout=subprocess.PIPE, text=True, check=True).stdout
        for other in filter(None, depends.strip().split(",")):
            add(other.replace("-", "_"))
        order.append(name)

    for name in MODULES:
        add(name)
    return order


def test_binary() -> pathlib.Path:
    built = subprocess.run(["cargo", "test", "--locked", "--test", "it", "--no-run", "--message-format=json"], cwd=paths.REPO, stdout=subprocess.PIPE, text=True, check=True)
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    [binary] = [it["executable"] for it in messages if it.get("target", {}).get("name") == "it" and it.get("executable")]
    return pathlib.Path(binary)


def boot(kernel: Kernel, binary: pathlib.Path, work: pathlib.Path) -> str:
    """What the machine said; empty if there is no such kernel any more."""
    tree, root, disk, initramfs = work / "tree", work / "root", work / "disk", work / "initramfs"
    if not unpacked(kernel, tree):
        return ""
    for directory in ("bin", "proc", "sys", "dev", "tmp", "modules"):
        (root / directory).mkdir(parents=True)
    loaded = modules(tree, root / "modules")
    shutil.copy(shutil.which("busybox"), root / "bin/busybox")
    (root / "bin/cat").symlink_to("busybox")
    subprocess.run(["strip", "-o", root / "bin/it", binary], check=True)
    for library in re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", binary], stdout=subprocess.PIPE, text=True, check=True).stdout):
        (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, root / library[1:])
    (root / "init").write_text(INIT.format(modules=" ".join(loaded), killed=KILLED))
    (root / "init").chmod(0o755)
    names = subprocess.run(["find", "."], cwd=root, stdout=subprocess.PIPE, check=True).stdout
    with initramfs.open("wb") as file:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=names, stdout=file, check=True)
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    [image] = tree.rglob("vmlinuz*")
    # Emulated: a machine that is virtual itself has no help for another one, or not enough.
    ran = subprocess.run(
        ["timeout", str(BOOT_SECONDS), "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "2048", "-smp", "2", "-kernel", image, "-initrd", initramfs,
         "-drive", f"file={disk},if=virtio,format=raw", "-append", "console=ttyS0 panic=-1 quiet", "-nographic", "-no-reboot"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return ran.stdout.decode(errors="replace").replace("\r", "")


def verdict(said: str) -> tuple[bool, str]:
    """Whether that is as it should be, and what it was."""
    release = re.search(r"RELEASE (\S+)", said)
    if not release:
        return False, "did not boot"
    of_all, _, of_killed = said.partition("KILLED\n")
    results = re.findall(r"^test result: (\w+)\. (\d+) passed; (\d+) failed", of_all, re.MULTILINE)
    is_trusted = "is not known to have the fix" not in of_all
    others = [line for line in of_all.splitlines() if line.startswith("SKIP") and "is not known to have the fix" not in line]
    is_sound = f"test {KILLED}" in of_killed and "1 passed; 0 failed" in of_killed and "SKIP" not in of_killed
    trees = bool(results) and results[0][0] == "ok" and not others
    words = [
        f"Linux {release[1]}:",
        f"{results[0][1]} passed, {results[0][2]} failed," if results else "the tests did not end",
        *others,
        "a killed reader leaves nothing wrong;" if is_sound else "a killed reader leaves zeros to others;",
        "trusted" if is_trusted else "not trusted",
    ]
    return trees and (is_sound or not is_trusted), " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-v", action="store_true", help="show what each machine said")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(KERNELS)}; all if none is given")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(KERNELS)
    if unknown:
        sys.exit(f"kernels.py: no kernel {', '.join(sorted(unknown))}: there are {', '.join(KERNELS)}")
    binary = test_binary()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name in arguments.names or KERNELS:
        with tempfile.TemporaryDirectory(dir=paths.scratch()) as work:
            said = boot(KERNELS[name], binary, pathlib.Path(work))
        if arguments.v:
            print(said)
        if not said:
            counts["skipped"] += 1
            print(f"SKIP    {name}: the archive has it no more")
            continue
        is_right, words = verdict(said)
        counts["passed" if is_right else "failed"] += 1
        print(f"{'ok' if is_right else 'FAILED':7} {name}: {words}", flush=True)
        if not is_right and not arguments.v:
            print(said[-4000:])
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
