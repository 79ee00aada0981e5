"""An index that was pushed beside an image: a node with nothing mounts the image before it has read a layer of it."""

import hashlib
import hmac
import json
import re
import secrets

import images
from harness import driver, oci, process, services
from harness.environment import Case

ARTIFACT_TYPE = "application/vnd.clip-csi.index.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
AUTHENTICATION = "dev.clip-csi.hmac-sha256"
DIFF_ID, LAYER_BLOB = "dev.clip-csi.layer.diff-id", "dev.clip-csi.layer.blob"
CODES = {"application/vnd.clip-csi.layer-index.v1+zstd": 1, "application/vnd.clip-csi.access-map.v1": 2}


def raw(digest: str) -> bytes:
    return bytes.fromhex(digest.removeprefix("sha256:"))


def authenticate(artifact: dict, key: bytes) -> str:
    """The authentication code, from docs/INDEX_FORMAT.md and not from the driver's code."""
    content = b"clip-csi.index.v1\0" + raw(artifact["subject"]["digest"])
    for blob in artifact["layers"]:
        notes = blob["annotations"]
        content += bytes([CODES[blob["mediaType"]]]) + raw(notes[DIFF_ID]) + raw(notes[LAYER_BLOB])
        content += raw(blob["digest"]) + blob["size"].to_bytes(8, "little")
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def swap_indexes(artifact: dict) -> None:
    """Gives the indexes of the two lowest layers to each other."""
    first, second = [blob for blob in artifact["layers"] if CODES[blob["mediaType"]] == 1][:2]
    for field in ("digest", "size"):
        first[field], second[field] = second[field], first[field]


class Index(Case):
    """With a registry of its own, since what is pushed stays there."""

    def setUp(self):
        super().setUp()
        self.registry = services.Registry(self.work, self.work / "registry")
        self.addCleanup(self.registry.stop)
        self.key_file = self.work / "key"
        self.key_file.write_text(secrets.token_hex(32))

    def node_config(self, name="config.toml", key_file=None, **registry):
        sections = {"registry": registry} if registry else {}
        return self.config(name, remote={"kind": "none", "hmac_key_file": str(key_file or self.key_file)}, **sections)

    def push_index(self, reference: str, config=None, cache="push-cache") -> str:
        """The digest of the artifact."""
        done = driver.clip("index", "push", reference, config=config or self.node_config(), cache_dir=self.work / cache)
        found = re.search(r"^index +(sha256:[0-9a-f]{64})$", done.stdout, re.M)
        self.assertIsNotNone(found, done.stdout)
        return found[1]

    def url(self, name: str, path: str) -> str:
        return f"http://{self.registry.host}/v2/e2e/{name}/{path}"

    def read(self, name: str, path: str) -> bytes:
        with oci._request("GET", self.url(name, path), headers={"Accept": MANIFEST_TYPE}) as answer:
            return answer.read()

    def artifact(self, name: str, digest: str) -> dict:
        return json.loads(self.read(name, f"manifests/{digest}"))

    def fallback_tag(self, name: str) -> str:
        layout = images.get(name).layout
        return layout.find(images.TAG)["digest"].replace(":", "-")

    def list_only(self, name: str, artifact: dict) -> str:
        """Puts an artifact there, and lists it alone; its digest."""
        body = json.dumps(artifact).encode()
        digest = oci.digest_of(body)
        oci._request("PUT", self.url(name, f"manifests/{digest}"), body, {"Content-Type": MANIFEST_TYPE}).close()
        listed = {"mediaType": MANIFEST_TYPE, "digest": digest, "size": len(body), "artifactType": ARTIFACT_TYPE,
                  "annotations": artifact.get("annotations", {})}
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [listed]}
        oci._request("PUT", self.url(name, f"manifests/{self.fallback_tag(name)}"), json.dumps(index).encode(),
                     {"Content-Type": index["mediaType"]}).close()
        return digest

    def fresh(self, name: str, config=None) -> driver.Worker:
        return self.worker(name, config=config or self.node_config())

    def check_spared(self, name: str, worker: driver.Worker, reference: str, **attributes) -> None:
        """The mount is there, and every name in it, before a byte of a layer was asked for; then it is all right."""
        mark = self.registry.mark()
        worker.must_publish("v", reference, **attributes)
        names = [path for path in worker.target("v").rglob("*")]
        self.assertGreater(len(names), 0)
        self.assertEqual(set(self.layer_gets(name, mark)), {0}, "no layer is read for the mount and its names")
        n_layers = len(set(images.get(name).layout.diff_ids(images.TAG)))
        self.assertEqual(worker.metric("pushed_index_lookups_total", outcome="hit"), n_layers)
        self.assert_tree(name, worker.target("v"))

    def check_streamed(self, name: str, worker: driver.Worker, reference: str, outcome: str) -> None:
        """The index was not used, which costs no more than the streaming of the layers."""
        mark = self.registry.mark()
        worker.must_publish("v", reference)
        self.assertEqual(set(self.layer_gets(name, mark)), {1})
        self.assertGreater(worker.metric("pushed_index_lookups_total", outcome=outcome), 0, worker.metrics())
        self.assertEqual(worker.metric("pushed_index_lookups_total", outcome="hit"), 0)
        self.assert_tree(name, worker.target("v"))
        worker.must_unpublish("v")
        worker.stop()

    def test_a_node_with_nothing_mounts_before_it_reads_a_layer(self):
        for name in ("demo1", "nasty", "zstd", "multi-member", "docker"):
            with self.subTest(name):
                reference = images.get(name).push(self.registry.host)
                digest = self.push_index(reference, cache=f"push-{name}")
                self.assertEqual(self.push_index(reference, cache=f"push-{name}"), digest, "pushed again it is the same")
                self.check_spared(name, self.fresh(name), reference)

    def test_a_pin_is_used_or_its_error_says_what_is_wrong(self):
        name = "demo1"
        reference = images.get(name).push(self.registry.host)
        digest = self.push_index(reference)
        worker = self.fresh("a")
        for pin, code, says in [
            ("latest", "INVALID_ARGUMENT", "indexDigest: digest \"latest\" is not supported"),
            (f"sha256:{'0' * 64}", "NOT_FOUND", f"index sha256:{'0' * 64} was not found at {self.registry.host}"),
            (images.get(name).layout.find(images.TAG)["digest"], "INVALID_ARGUMENT", "it is no index of this driver"),
        ]:
            with self.subTest(pin):
                reply = worker.publish("v", reference, indexDigest=pin)
                self.assertEqual(reply.code, code, reply)
                self.assertIn(says, reply.message)
                self.assertEqual(worker.left_behind(), [])
        self.check_spared(name, worker, reference, indexDigest=digest)

    def test_a_pin_without_the_key_counts_only_where_it_is_said_to(self):
        name = "demo1"
        reference = images.get(name).push(self.registry.host)
        digest = self.push_index(reference, config=self.config("no-key.toml"))
        reply = self.fresh("a").publish("v", reference, indexDigest=digest)
        self.assertEqual(reply.code, "INVALID_ARGUMENT", reply)
        self.assertIn("not authenticated by this installation's key", reply.message)
        trusting = self.node_config("trusting.toml", trust_pinned_indexes=True)
        self.check_spared(name, self.fresh("b", trusting), reference, indexDigest=digest)
        directory = self.mount(reference, "mnt", "--index-digest", digest, config=self.config())
        self.assert_tree(name, directory)

    def test_what_is_tampered_with_is_not_used(self):
        name = "nasty"
        reference = images.get(name).push(self.registry.host)
        good = self.artifact(name, self.push_index(reference))
        key = self.key_file.read_bytes()
        self.assertEqual(good["annotations"][AUTHENTICATION], authenticate(good, key), "the code is as documented")
        self.assertGreater(len(good["layers"]), 1)

        def changed(change, sign_with=None) -> dict:
            artifact = json.loads(json.dumps(good))
            change(artifact)
            if sign_with:
                artifact["annotations"][AUTHENTICATION] = authenticate(artifact, sign_with)
            return artifact

        def other_subject(artifact):
            artifact["subject"]["digest"] = oci.digest_of(b"another image")

        def unsigned(artifact):
            del artifact["annotations"]

        for what, artifact, outcome in [
            ("another key", changed(lambda it: None, b"k" * 64), "untrusted"),
            ("no key", changed(unsigned), "untrusted"),
            ("another subject, signed", changed(other_subject, key), "untrusted"),
            ("indexes of other layers", changed(swap_indexes), "untrusted"),
        ]:
            with self.subTest(what):
                self.list_only(name, artifact)
                self.check_streamed(name, self.fresh(what.replace(" ", "-")), reference, outcome)

    def test_a_signed_index_of_another_layer_is_not_used(self):
        name = "nasty"
        reference = images.get(name).push(self.registry.host)
        artifact = self.artifact(name, self.push_index(reference))
        swap_indexes(artifact)
        artifact["annotations"][AUTHENTICATION] = authenticate(artifact, self.key_file.read_bytes())
        self.list_only(name, artifact)
        worker = self.fresh("a")
        mark = self.registry.mark()
        worker.must_publish("v", reference)
        self.assertIn("registry has an index of another layer", worker.log.read_text())
        gets = self.layer_gets(name, mark)
        self.assertEqual(gets[:2], [1, 1], "these two are streamed")
        self.assert_tree(name, worker.target("v"))

    def test_a_truncated_blob_is_not_used(self):
        name = "demo1"
        reference = images.get(name).push(self.registry.host)
        artifact = self.artifact(name, self.push_index(reference))
        for blob in artifact["layers"]:
            hexadecimal = blob["digest"].removeprefix("sha256:")
            [data] = (self.work / "registry").glob(f"**/blobs/sha256/{hexadecimal[:2]}/{hexadecimal}/data")
            data.write_bytes(data.read_bytes()[:-1])
        # A new one, because the first remembers how long its blobs were.
        self.registry.stop()
        self.registry = services.Registry(self.work, self.work / "registry", port=self.registry.port)
        self.addCleanup(self.registry.stop)
        self.check_streamed(name, self.fresh("a"), reference, "error")

    def test_who_may_not_push_is_told_so(self):
        htpasswd = process.run("htpasswd", "-Bbn", "user", "right-password").stdout
        images.get("small").push(self.registry.host)
        protected = services.Registry(self.work, self.work / "registry", htpasswd=htpasswd, name="protected")
        self.addCleanup(protected.stop)
        config = self.config(plain_http=[protected.host])
        reference = f"{protected.host}/e2e/small:{images.TAG}"
        done = driver.clip("index", "push", reference, config=config, cache_dir=self.work / "cache", check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("wants credentials", done.stderr)
        docker = self.work / "docker.json"
        docker.write_text(json.dumps({"auths": {protected.host: {"username": "user", "password": "right-password"}}}))
        done = driver.clip("index", "push", reference, "--docker-config", docker, config=config, cache_dir=self.work / "cache")
        self.assertIn("index    sha256:", done.stdout)
        self.assertNotIn("right-password", done.stdout + done.stderr)
