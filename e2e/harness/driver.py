"""Runs the program under test, as a CSI worker and as a command, and speaks CSI with it."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import secrets

from . import paths, process, services


@functools.cache
def csictl() -> pathlib.Path:
    """The CSI client, built if the cache has none."""
    return pathlib.Path(process.run(paths.E2E / "tools.sh").stdout.strip()) / "csictl"


@dataclasses.dataclass
class Reply:
    """What a CSI call returned."""

    code: str
    milliseconds: float
    message: str

    @property
    def ok(self) -> bool:
        return self.code == "OK"


def write_config(file: pathlib.Path, *, plain_http=(), redis: services.Redis | None = None, remote_dir: pathlib.Path | None = None,
                 s3: services.S3 | None = None, key_file: pathlib.Path | None = None, remote: dict | None = None, **sections) -> pathlib.Path:
    """A configuration file. `sections` are tables: cache={"max_layer_bytes": 1}; `remote` is what else that table has."""
    lines = []
    # What is tested is the server, unless a test says otherwise: who has all of an image on disk would not need it.
    sections["node"] = {"kernel_mounts": "never", **sections.get("node", {})}
    for name, table in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    if redis or remote_dir or s3 or remote:
        lines.append("[remote]")
        if redis:
            lines += ['kind = "redis"', f"url = {json.dumps(redis.url)}"]
        elif remote_dir:
            lines += ['kind = "dir"', f"path = {json.dumps(str(remote_dir))}"]
        elif s3:
            bucket = {"endpoint": s3.url, "bucket": s3.bucket, **{name: str(file) for name, file in s3.key_files.items()}}
            lines += ['kind = "s3"', "s3.allow_http = true", *(f"s3.{name} = {json.dumps(value)}" for name, value in bucket.items())]
        if key_file:
            if not key_file.exists():
                key_file.touch(mode=0o600)
                key_file.write_text(secrets.token_hex(32))
            lines.append(f"hmac_key_file = {json.dumps(str(key_file))}")
        lines += [f"{key} = {json.dumps(value)}" for key, value in (remote or {}).items()]
    for host in plain_http:
        lines += [f'[registry.hosts."{host}"]', "plain_http = true"]
    file.write_text("\n".join(lines) + "\n")
    return file


class Driver:
    """A node of a cluster, with a cache, a socket and metrics of its own: what all ways to run one have in common."""

    def __init__(self, directory: pathlib.Path, config: pathlib.Path, *, cache_dir: pathlib.Path | None = None):
        self.directory, self.config = directory, config
        directory.mkdir(parents=True, exist_ok=True)
        self.state_dir = directory / "state"
        self.cache_dir = cache_dir or directory / "cache"
        self.targets = directory / "pods"
        self.targets.mkdir(exist_ok=True)
        # A socket's path has 107 bytes at most.
        self.socket = directory / "csi.sock"
        assert len(str(self.socket)) < 108, f"too long for a socket: {self.socket}"
        self.log = directory / "log"
        self.metrics_port = process.free_port()

    def csi(self, *words, timeout="130s") -> Reply:
        done = process.run(csictl(), "--endpoint", f"unix://{self.socket}", "--timeout", timeout, *words, check=False)
        if done.returncode not in (0, 1):
            raise process.Failed(f"csictl {words}: {done.stderr}")
        code, milliseconds, message = done.stdout.rstrip("\n").split("\t", 2)
        return Reply(code, float(milliseconds), message)

    def target(self, volume: str) -> pathlib.Path:
        return self.targets / volume / "mount"

    def publish(self, volume: str, image: str, *words, **attributes) -> Reply:
        """As kubelet does: the target's parent is there, the target is not."""
        self.target(volume).parent.mkdir(exist_ok=True)
        pairs = [f"{key}={value}" for key, value in attributes.items()]
        return self.csi("publish", volume, self.target(volume), f"image={image}", *pairs, *words)

    def unpublish(self, volume: str) -> Reply:
        return self.csi("unpublish", volume, self.target(volume))

    def must_publish(self, volume: str, image: str, *words, **attributes) -> Reply:
        reply = self.publish(volume, image, *words, **attributes)
        if not reply.ok:
            raise process.Failed(f"publish {image}: {reply.code}: {reply.message}\n{self.tail()}")
        return reply

    def must_unpublish(self, volume: str) -> Reply:
        reply = self.unpublish(volume)
        if not reply.ok:
            raise process.Failed(f"unpublish {volume}: {reply.code}: {reply.message}\n{self.tail()}")
        return reply

    def metrics(self) -> dict[str, float]:
        return services.metrics(self.metrics_port)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels; 0 if there is none."""
        return metric(self.metrics(), name, **labels)

    def left_behind(self) -> list[str]:
        """What is there of volumes: mounts, targets, records. Empty when nothing is published."""
        found = [f"mount {point}" for point in process.mounts_below(self.directory)]
        found += [f"target {path}" for path in self.targets.glob("*/*")]
        found += [f"record {path}" for path in self.state_dir.glob("volumes/*")]
        return found

    def tail(self, lines: int = 15) -> str:
        return last_lines(self.log, lines)


def last_lines(log: pathlib.Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="backslashreplace").splitlines()[-lines:]) if log.exists() else ""


def memory_of(pid: int) -> dict[str, int]:
    """VmRSS and VmHWM in bytes."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return {key: int(kib) * 1024 for key, kib in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.M)}


class Worker(Driver):
    """`clip-csi node` that does all by itself: one process."""

    def __init__(self, directory: pathlib.Path, config: pathlib.Path, *, cache_dir: pathlib.Path | None = None, options=(), env=None):
        super().__init__(directory, config, cache_dir=cache_dir)
        self.options, self.env = options, env
        self.start()

    def start(self) -> None:
        """Also the restart after a kill: everything is where it was."""
        self.metrics_port = process.free_port()
        self.server = process.Server(
            [paths.binary(), "node", "--in-process", "--endpoint", f"unix://{self.socket}", "--node-id", self.directory.name,
             "--state-dir", self.state_dir, "--cache-dir", self.cache_dir, "--config", self.config,
             "--metrics-addr", f"127.0.0.1:{self.metrics_port}", *self.options],
            stdout=self.log, env=self.env,
        )
        self.server.wait_ready(lambda: self.socket.exists() and self.csi("probe").ok, f"clip-csi node {self.directory.name}")

    def memory(self) -> dict[str, int]:
        return memory_of(self.server.pid)

    def stop(self) -> int:
        return self.server.stop()

    def kill(self) -> None:
        self.server.kill()


def metric(page: dict[str, float], name: str, **labels: str) -> float:
    total = 0.0
    for series, value in page.items():
        base, _, rest = series.partition("{")
        if base != f"clip_csi_{name}":
            continue
        have = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if all(have.get(key) == wanted for key, wanted in labels.items()):
            total += value
    return total


def clip(*words, config: pathlib.Path | None = None, cache_dir: pathlib.Path | None = None, check=True, timeout=300, env=None):
    """A command of the program, such as clip("mount", image, directory)."""
    common = (["--config", config] if config else []) + (["--cache-dir", cache_dir] if cache_dir else [])
    return process.run(paths.binary(), *words, *common, check=check, timeout=timeout, env=env)


def drop_from_page_cache(top) -> None:
    """Makes the next reads of these files reach whoever serves them. Only these: the machine is shared."""
    for directory, _, names in os.walk(os.fsencode(top)):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
