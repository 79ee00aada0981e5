#!/usr/bin/env python3
"""Builds the project's image from its Dockerfile with buildah, and keeps it as an OCI layout in the cache.

usage: project_image.py [--programs]     builds if needed and prints the layout's directory, or that of the image's programs

No image can be pulled in the tests, so the one that the Dockerfile begins with is made here: the same
Debian with a C compiler, and this machine's Rust.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
import time

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import images
from harness import oci, paths, process
from harness.process import run, say

TAG = "e2e"
# What the Dockerfile copies, and what says how.
SOURCES = ["Dockerfile", ".dockerignore", "Cargo.toml", "Cargo.lock", "LICENSE", "src"]
# As in the base image of the Dockerfile; the number is raised when how it is made changes.
BASE_PACKAGES = ["ca-certificates", "gcc", "libc6-dev"]
BASE_VERSION = 1
# `dist` is what users get. CLIP_E2E_CARGO_PROFILE=release is faster to build while the image is worked on.
PROFILE = os.environ.get("CLIP_E2E_CARGO_PROFILE") or "dist"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
RUST = "/usr/local/rust"


def source_files() -> list[pathlib.Path]:
    tops = [paths.REPO / name for name in SOURCES]
    return sorted(file for top in tops for file in (top.rglob("*") if top.is_dir() else [top]) if file.is_file())


def source_hash() -> str:
    digest = hashlib.sha256(f"{PROFILE}\n{run('rustc', '-vV').stdout}{BASE_VERSION}".encode())
    for file in source_files():
        digest.update(f"{file.relative_to(paths.REPO)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def version() -> str:
    return json.loads(run("cargo", "metadata", "--no-deps", "--offline", "--format-version=1", "--manifest-path", paths.REPO / "Cargo.toml").stdout)["packages"][0]["version"]


def base_tar() -> pathlib.Path:
    """A Debian with a C compiler, as a tar in the cache."""
    suite, source, options = images.debian_source()
    name = hashlib.sha256("\n".join([str(BASE_VERSION), suite, *BASE_PACKAGES]).encode()).hexdigest()[:12]
    path = paths.cache() / f"base-{name}.tar"
    if not path.exists():
        begin = time.monotonic()
        new = path.with_suffix(".new.tar")
        run("mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", f"--include={','.join(BASE_PACKAGES)}", *options, suite, new, source)
        new.rename(path)
        say(f"base of the Dockerfile's build made in {time.monotonic() - begin:.1f} s")
    return path


class Buildah:
    """buildah with a storage of its own, removed after use."""

    def __init__(self, directory: pathlib.Path):
        config = directory / "storage.conf"
        config.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/graph"\nrunroot = "{directory}/run"\n')
        # Its locks would go to /etc/cni.
        network = directory / "containers.conf"
        network.write_text(f'[network]\nnetwork_config_dir = "{directory}/network"\n')
        self.env = {"CONTAINERS_STORAGE_CONF": str(config), "CONTAINERS_CONF": str(network), "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(directory)}

    def __call__(self, *words, **options):
        return run("buildah", *words, env=self.env, **options)


def layout() -> oci.Layout:
    """The image, built if the cache has none of these sources."""
    parent = paths.cache() / "project-images"
    parent.mkdir(exist_ok=True)
    done = parent / source_hash()
    # Who has it already waits for nobody's build.
    if not done.exists():
        with locked(parent):
            build_into(done)
    return oci.Layout(done)


@contextlib.contextmanager
def locked(parent: pathlib.Path):
    """Two runs do not make the same: the second one waits, and finds it."""
    with open(parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_into(done: pathlib.Path) -> None:
    if not done.exists():
        with tempfile.TemporaryDirectory(prefix=".new.", dir=done.parent) as directory:
            try:
                build(pathlib.Path(directory))
            finally:
                process.unmount_below(directory)
            if source_hash() != done.name:
                raise process.Failed("the sources changed while the image was built: run it again")
            # At once: a directory under its name is whole.
            (pathlib.Path(directory) / "layout").rename(done)


def programs() -> pathlib.Path:
    """A directory with the image's programs, as they are in it: what users get."""
    done = layout().directory
    directory = done.parent / f"{done.name}-programs"
    if not directory.exists():
        with locked(done.parent):
            if not directory.exists():
                unpack(oci.Layout(done), directory)
    return directory


def unpack(image: oci.Layout, directory: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".new.", dir=directory.parent) as new:
        place = pathlib.Path(new) / "programs"
        place.mkdir()
        [layer] = image.layers(TAG)
        with tarfile.open(image.blob(layer["digest"])) as tar:
            for it in tar:
                path = pathlib.PurePath(it.name)
                if it.isfile() and path.parent.name == "bin":
                    (place / path.name).write_bytes(tar.extractfile(it).read())
                    (place / path.name).chmod(0o755)
        # At once: a directory under its name is whole.
        place.rename(directory)


def build(directory: pathlib.Path) -> None:
    begin = time.monotonic()
    # A copy, so that every file is newer than what an earlier build left: cargo goes by times.
    context = directory / "context"
    for file in source_files():
        copy = context / file.relative_to(paths.REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)

    buildah = Buildah(directory)
    base = buildah("from", "scratch").stdout.strip()
    buildah("add", "--quiet", base, base_tar(), "/")
    buildah("config", "--env", f"PATH={RUST}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "--env", "CARGO_HOME=/usr/local/cargo", base)
    buildah("commit", "--quiet", base, "docker.io/library/rust:1.95-slim-bookworm")
    buildah("rm", base)

    # Dependencies stay compiled between builds, and crates are those that this machine has fetched.
    target = paths.cache() / f"project-target-{PROFILE}"
    target.mkdir(exist_ok=True)
    cargo_home = pathlib.Path(os.environ.get("CARGO_HOME") or pathlib.Path.home() / ".cargo")
    volumes = {run("rustc", "--print", "sysroot").stdout.strip(): f"{RUST}:ro", CERTIFICATES: f"{CERTIFICATES}:ro", target: "/src/target"}
    for name in ("registry", "config.toml"):
        if (cargo_home / name).exists():
            volumes[cargo_home / name] = f"/usr/local/cargo/{name}"
    say(f"building the project's image (buildah, profile {PROFILE}; a few minutes the first time)")
    command = ["bud", "--pull-never", "--format", "oci", "--layers=false", "--timestamp", "0", "--tag", f"localhost/clip-csi:{TAG}",
               "--build-arg", f"CARGO_PROFILE={PROFILE}", "--build-arg", f"VERSION={version()}",
               *(f"--volume={source}:{where}" for source, where in volumes.items()), "--file", context / "Dockerfile", context]
    buildah(*command, timeout=3600)
    buildah("push", "--quiet", f"localhost/clip-csi:{TAG}", f"oci:{directory / 'layout'}:{TAG}")
    found = oci.Layout(directory / "layout")
    size = sum(it["size"] for it in found.layers(TAG))
    say(f"the project's image built in {time.monotonic() - begin:.1f} s; {size / 1e6:.1f} MB compressed")


if __name__ == "__main__":
    try:
        print(programs() if sys.argv[1:] == ["--programs"] else layout().directory)
    except process.Failed as error:
        sys.exit(f"project_image.py: {error}")
