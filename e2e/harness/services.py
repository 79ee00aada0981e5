"""The real services: docker-registry and redis-server, on free loopback ports or on a machine of the cluster."""

import collections
import json
import pathlib
import re
import urllib.request

from . import paths, process

BLOB_GET = re.compile(r'"GET /v2/\S+/blobs/(sha256:[0-9a-f]{64})(?:\?\S*)? HTTP/[0-9.]+" (\d{3})')


class Registry:
    """A docker-registry. Its access log tells which blobs were fetched."""

    def __init__(self, work: pathlib.Path, storage: pathlib.Path, *, htpasswd: str | None = None,
                 tls: tuple[pathlib.Path, ...] | None = None, name="registry", where=process.Here(), port: int | None = None):
        self.port = port or process.free_port()
        self.host = f"{where.address}:{self.port}"
        self.access_log = work / f"{name}.access.log"
        config = work / f"{name}.yml"
        auth, certificate = "", ""
        if tls is not None:
            # Certificate and key; then the authorities of those that clients have to show.
            words = [f"certificate: {json.dumps(str(tls[0]))}", f"key: {json.dumps(str(tls[1]))}"]
            words += [f"clientcas: {json.dumps([str(it) for it in tls[2:]])}"] if tls[2:] else []
            certificate = f", tls: {{{', '.join(words)}}}"
        if htpasswd is not None:
            (work / f"{name}.htpasswd").write_text(htpasswd)
            auth = f"auth: {{htpasswd: {{realm: e2e, path: {json.dumps(str(work / f'{name}.htpasswd'))}}}}}\n"
        config.write_text(
            "version: 0.1\n"
            "log: {level: warn, accesslog: {disabled: false}}\n"
            f"storage: {{filesystem: {{rootdirectory: {json.dumps(str(storage))}}}, delete: {{enabled: true}},"
            " cache: {blobdescriptor: inmemory}}\n"
            f"http: {{addr: '{self.host}'{certificate}}}\n"
            "health: {storagedriver: {enabled: false}}\n" + auth
        )
        self.server = where.server(
            ["docker-registry", "serve", config], stdout=self.access_log, stderr=work / f"{name}.log",
            # docker-registry configures itself from REGISTRY_*; none of the caller's may leak in.
            env={"OTEL_TRACES_EXPORTER": "none"},
        )
        self.server.wait_ready(lambda: where.listens(self.port), "docker-registry")

    def blob_gets(self, since: int = 0) -> collections.Counter:
        """How often each blob was fetched successfully, from byte `since` of the access log on."""
        with open(self.access_log, "rb") as log:
            log.seek(since)
            text = log.read().decode(errors="replace")
        return collections.Counter(
            digest for digest, status in BLOB_GET.findall(text) if status in ("200", "206", "307")
        )

    def mark(self) -> int:
        """A place in the access log for `blob_gets`."""
        return self.access_log.stat().st_size

    def stop(self) -> None:
        self.server.stop()


class S3:
    """A versitygw with one empty bucket."""

    bucket = "layers"

    def __init__(self, work: pathlib.Path, *, where=process.Here()):
        self.port = process.free_port()
        self.url = f"http://{where.address}:{self.port}"
        directory = work / f"s3-{self.port}"
        # To it, a directory is a bucket.
        (directory / "buckets" / self.bucket).mkdir(parents=True)
        (directory / "metadata").mkdir()
        self.key_files = {name: directory / name for name in ("access_key_file", "secret_key_file")}
        for name, file in self.key_files.items():
            file.write_text(f"e2e-{name}\n")
        program = pathlib.Path(process.run(paths.E2E / "tools.sh", "s3").stdout.strip()) / "versitygw"
        self.server = where.server(
            [program, "--port", f"{where.address}:{self.port}", "--quiet", "--access", "e2e-access_key_file", "--secret", "e2e-secret_key_file",
             "posix", "--sidecar", directory / "metadata", directory / "buckets"],
            stdout=directory / "log",
        )
        self.server.wait_ready(lambda: where.listens(self.port), "versitygw")

    def stop(self) -> None:
        self.server.stop()


class Redis:
    """A redis-server without persistence that evicts what has a TTL, as the documentation advises."""

    def __init__(self, work: pathlib.Path, *, port: int | None = None, maxmemory="512mb", where=process.Here()):
        self.where, self.port = where, port or process.free_port()
        self.url = f"redis://{where.address}:{self.port}"
        directory = work / f"redis-{self.port}"
        directory.mkdir(exist_ok=True)
        self.server = where.server(
            ["redis-server", "--port", str(self.port), "--bind", where.address, "--protected-mode", "no", "--save", "", "--appendonly", "no",
             "--dir", directory, "--maxmemory", maxmemory, "--maxmemory-policy", "volatile-lfu"],
            stdout=directory / "log",
        )
        self.server.wait_ready(lambda: self.command("PING") == "PONG", "redis-server")

    def command(self, *words: str) -> str | None:
        """The reply's first line without its type, or None when nobody answers."""
        try:
            with self.where.connect(self.port, timeout=2) as connection:
                payload = b"".join(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)
                connection.sendall(b"*%d\r\n" % len(words) + payload)
                return connection.makefile("rb").readline().decode().strip()[1:]
        except OSError:
            return None

    def stop(self) -> None:
        self.server.stop()

    def kill(self) -> None:
        self.server.kill()


def metrics(port: int) -> dict[str, float]:
    """A /metrics page: 'name{labels}' as it is written -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        return parse_metrics(page.read().decode())


def parse_metrics(page: str) -> dict[str, float]:
    lines = page.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and not line.startswith("#")}
