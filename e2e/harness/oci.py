"""Writes OCI image layouts by hand and pushes them byte for byte.

umoci and skopeo make the well-formed images; what they would repair or refuse to write (lying
digests, several platforms under one tag, odd media types) is written here.
"""

import gzip
import hashlib
import json
import os
import pathlib
import urllib.error
import urllib.parse
import urllib.request

LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = LAYER_TAR + "+gzip"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def gzipped(data: bytes, level: int = 6) -> bytes:
    """gzip without a time, so that the same input gives the same blob."""
    return gzip.compress(data, level, mtime=0)


class Layout:
    """An OCI image layout in a directory."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        if not (directory / "index.json").exists():
            (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
            self._write_index([])

    def blob(self, digest: str) -> pathlib.Path:
        return self.directory / "blobs/sha256" / digest.removeprefix("sha256:")

    def read_json(self, digest: str) -> dict:
        return json.loads(self.blob(digest).read_bytes())

    def add(self, data: bytes, media_type: str) -> dict:
        """Stores a blob and returns its descriptor."""
        digest = digest_of(data)
        self.blob(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_image(self, tag: str | None, layers: list[tuple[dict, str]], *, architecture="amd64", media_type=True, config=None) -> dict:
        """Stores config and manifest of `layers`, each a descriptor and a DiffId; their descriptor."""
        config = {
            "architecture": architecture,
            "os": "linux",
            "created": "2024-01-01T00:00:00Z",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
            "history": [{"created_by": "clip-csi e2e"} for _ in layers],
            **(config or {}),
        }
        manifest = {
            "schemaVersion": 2,
            **({"mediaType": MANIFEST} if media_type else {}),
            "config": self.add(json.dumps(config).encode(), CONFIG),
            "layers": [descriptor for descriptor, _ in layers],
        }
        descriptor = self.add(json.dumps(manifest).encode(), MANIFEST)
        if tag:
            self.tag(tag, descriptor)
        return descriptor

    def add_index(self, tag: str, images: list[tuple[dict, dict]]) -> dict:
        """Stores an image index of (manifest descriptor, platform) pairs under a tag."""
        index = {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [{**descriptor, "platform": platform} for descriptor, platform in images],
        }
        descriptor = self.add(json.dumps(index).encode(), INDEX)
        self.tag(tag, descriptor)
        return descriptor

    def tag(self, tag: str, descriptor: dict) -> None:
        others = [it for it in self.tagged() if it.get("annotations", {}).get("org.opencontainers.image.ref.name") != tag]
        self._write_index([*others, {**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}}])

    def tagged(self) -> list[dict]:
        return json.loads((self.directory / "index.json").read_text())["manifests"]

    def find(self, tag: str) -> dict:
        for descriptor in self.tagged():
            if descriptor.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag:
                return descriptor
        raise KeyError(f"no tag {tag} in {self.directory}")

    def _write_index(self, manifests: list[dict]) -> None:
        (self.directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))

    # --- what tests ask of an image ---

    def manifest(self, tag: str) -> dict:
        """The manifest under a tag; of an image index, the one for this machine."""
        content = self.read_json(self.find(tag)["digest"])
        here = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
        for below in content.get("manifests", []):
            if (below["platform"]["os"], below["platform"]["architecture"]) == ("linux", here):
                return self.read_json(below["digest"])
        return content

    def layers(self, tag: str) -> list[dict]:
        return self.manifest(tag)["layers"]

    def diff_ids(self, tag: str) -> list[str]:
        return self.read_json(self.manifest(tag)["config"]["digest"])["rootfs"]["diff_ids"]


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args):
        return None


def _request(method: str, url: str, body=None, headers=None):
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    # No proxy: everything is on loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)
    return opener.open(request, timeout=120)


def _exists(url: str, accept: str = "*/*") -> bool:
    try:
        return _request("HEAD", url, headers={"Accept": accept}).status == 200
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise


def push(layout: Layout, tag: str, host: str, repository: str, to_tag: str | None = None) -> str:
    """Pushes an image or an image index and all below it unchanged; the digest of its manifest."""
    base = f"http://{host}/v2/{repository}"

    def push_blob(descriptor: dict) -> None:
        if _exists(f"{base}/blobs/{descriptor['digest']}"):
            return
        location = _request("POST", f"{base}/blobs/uploads/").headers["Location"]
        location = urllib.parse.urljoin(f"{base}/", location)
        separator = "&" if "?" in location else "?"
        with open(layout.blob(descriptor["digest"]), "rb") as data:
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor["size"])}
            _request("PUT", f"{location}{separator}digest={descriptor['digest']}", data, headers)

    def push_manifest(descriptor: dict, reference: str) -> None:
        data = layout.blob(descriptor["digest"]).read_bytes()
        content = json.loads(data)
        for below in content.get("manifests", []):
            push_manifest(below, below["digest"])
        for blob in [*content.get("layers", []), *([content["config"]] if "config" in content else [])]:
            push_blob(blob)
        _request("PUT", f"{base}/manifests/{reference}", data, {"Content-Type": descriptor["mediaType"]})

    descriptor = layout.find(tag)
    push_manifest(descriptor, to_tag or tag)
    return descriptor["digest"]
