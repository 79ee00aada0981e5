"""The ways to credentials, against a registry that gives tokens, with the program's three processes apart."""

import base64
import json
import os
import pathlib
import time

import images
from harness import process, testregistry
from harness.environment import Case

POD = ["csi.storage.k8s.io/pod.namespace=team", "csi.storage.k8s.io/pod.name=web-0", "csi.storage.k8s.io/serviceAccount.name=app"]
# The user is what the token of the service account says, as registries with workload identity have it.
PLUGIN = """#!/bin/sh
cat > "$DIR/asked.new"; cat "$DIR/asked.new" >> "$DIR/asked"; echo >> "$DIR/asked"
user=$(cat "$DIR/user")
printf '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","cacheDuration":"1h","auth":{"%s":{"username":"%s","password":"pw"}}}' "$HOST" "$user"
"""


class Credentials(Case):
    def setUp(self):
        super().setUp()
        self.image = images.get("demo1")
        self.registry = testregistry.serving(self.work, [self.image])
        self.addCleanup(self.registry.stop)
        self.repository = f"e2e/{self.image.name}"
        self.reference = testregistry.reference(self.registry, self.image)

    def lets_in(self, *users: str, **settings) -> None:
        self.registry.set(users={f"{user}:pw": [self.repository] for user in users} or {"nobody:x": []}, **settings)

    def config(self, *lines: str) -> pathlib.Path:
        file = self.work / "credentials.toml"
        # Credentials are for what is still to be read, which is the server's.
        file.write_text("\n".join([*lines, "[node]", 'kernel_mounts = "never"', f'[registry.hosts."{self.registry.host}"]', "plain_http = true"]) + "\n")
        return file

    def secret(self, user: str) -> str:
        auth = base64.b64encode(f"{user}:pw".encode()).decode()
        return ".dockerconfigjson=" + json.dumps({"auths": {self.registry.host: {"auth": auth}}})

    def plugin(self, user: str, token: dict | None = None) -> tuple[pathlib.Path, list[str]]:
        """A directory with a plugin that answers with the user in its file `user`, and the lines of configuration that name it."""
        directory = self.work / "plugins"
        directory.mkdir()
        program = directory / "plugin"
        program.write_text(PLUGIN)
        program.chmod(0o755)
        (directory / "user").write_text(user)
        provider = {"name": "plugin", "matchImages": [self.registry.host], "defaultCacheDuration": "1h", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                    "env": [{"name": "DIR", "value": str(directory)}, {"name": "HOST", "value": self.registry.host}]}
        if token:
            provider["tokenAttributes"] = token
        file = directory / "config.yaml"
        file.write_text(json.dumps({"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": [provider]}))
        os.chmod(directory, 0o777)
        return directory, ["[registry]", f"credential_provider_config = {json.dumps(str(file))}", f"credential_provider_bin_dir = {json.dumps(str(directory))}"]

    def test_what_is_cached_is_no_right_to_read_it(self):
        """Two volumes of one image, one with a right to it: the other is refused, though all of the image is on the node and mounted."""
        self.lets_in("friend")
        worker = self.worker(config=self.config())
        worker.must_publish("mine", self.reference, "--secret", self.secret("friend"))
        self.assert_tree(self.image.name, worker.target("mine"))
        for words in ([], ["--secret", self.secret("stranger")]):
            reply = worker.publish("theirs", self.reference, *words)
            self.assertEqual(reply.code, "UNAUTHENTICATED", reply)
            self.assertFalse(worker.target("theirs").exists())
        self.assertIn('user "stranger" (nodePublishSecretRef)', reply.message)
        self.assertNotIn("pw", reply.message)
        # The right was taken away: what is mounted stays, and nothing new is.
        self.lets_in("stranger")
        self.assertEqual(worker.publish("again", self.reference, "--secret", self.secret("friend")).code, "UNAUTHENTICATED")
        self.assert_tree(self.image.name, worker.target("mine"))
        self.assertNotIn("pw", "".join(it for it in worker.log.read_text().split('"') if it == "pw"))

    def test_a_plugin_is_asked_where_the_secret_is_refused_and_anew_when_its_answer_ends(self):
        """The plugin's credentials end in the middle of the image: readers do not notice."""
        directory, lines = self.plugin("first")
        self.lets_in("first", rate_bytes_per_second=20_000_000)
        worker = self.worker(config=self.config("[cache]", "complete_layers = false", *lines))
        worker.must_publish("v", self.reference, "--secret", self.secret("stranger"))
        self.assertEqual(len((directory / "asked").read_text().splitlines()), 1)
        worker.must_unpublish("v")
        (directory / "user").write_text("second")
        self.lets_in("second")
        worker.must_publish("v", self.reference)
        self.assert_tree(self.image.name, worker.target("v"))
        self.assertEqual(len((directory / "asked").read_text().splitlines()), 2)

    def test_a_repeated_publish_renews_and_mounts_nothing(self):
        """As kubelet does with requiresRepublish: the password was changed, what is missing is read with the new one."""
        self.lets_in("old")
        worker = self.worker(config=self.config())
        worker.must_publish("v", self.reference, "--secret", self.secret("old"))
        mounts = process.mounts_below(worker.directory)
        inode = worker.target("v").stat().st_ino
        for _ in range(2):
            worker.must_publish("v", self.reference, "--secret", self.secret("new"))
        self.assertEqual(process.mounts_below(worker.directory), mounts)
        self.assertEqual(worker.target("v").stat().st_ino, inode)
        self.assertEqual(worker.log.read_text().count("took the credentials of a repeated publish"), 1)
        self.assert_tree(self.image.name, worker.target("v"))

    def test_a_repeated_publish_reaches_the_agent_through_the_server(self):
        """Each of the three processes has the credentials of the day: an agent that starts is told them by the server."""
        self.lets_in("old", "new")
        trio = self.trio(config=self.config())
        told = lambda: trio.log_of("agent").read_text().count("ready for the chunks of a mount")
        trio.must_publish("v", self.reference, "--secret", self.secret("old"))
        process.wait_until(lambda: told() == 1, "the agent to hear of the mount", 10)
        trio.must_publish("v", self.reference, "--secret", self.secret("new"))
        process.wait_until(lambda: told() == 2, "the agent to hear of the new credentials", 10)
        trio.must_publish("v", self.reference, "--secret", self.secret("new"))
        trio.kill("agent")
        trio.start("agent")
        process.wait_until(lambda: told() == 3, "the next agent to hear of the mount", 10)
        self.assert_tree(self.image.name, trio.target("v"))

    def test_a_plugin_is_given_the_token_of_the_service_account(self):
        """With kubelet's words of whose pod it is; without them nothing is given."""
        directory, lines = self.plugin("app", {"serviceAccountTokenAudience": "registry.example", "cacheType": "Token", "requireServiceAccount": True})
        self.lets_in("app")
        worker = self.worker(config=self.config(*lines))
        reply = worker.publish("v", self.reference)
        self.assertEqual(reply.code, "UNAUTHENTICATED", reply)
        self.assertIn("registry.example", reply.message)
        token = {"registry.example": {"token": "secret-token", "expirationTimestamp": "2030-01-01T00:00:00Z"}}
        words = [*POD, "csi.storage.k8s.io/pod.uid=6a1c", "--secret", f"csi.storage.k8s.io/serviceAccount.tokens={json.dumps(token)}"]
        reply = worker.csi("publish", "v", worker.target("v"), f"image={self.reference}", *words)
        self.assertTrue(reply.ok, reply)
        asked = json.loads((directory / "asked").read_text().splitlines()[-1])
        self.assertEqual(asked["serviceAccountToken"], "secret-token")
        self.assertNotIn("secret-token", worker.log.read_text())

    def test_a_token_that_expires_while_a_layer_is_read_is_renewed(self):
        """Tokens live for a second; the connection breaks later than that, and what is missing needs a new one."""
        self.lets_in("friend", token_seconds=1, rate_bytes_per_second=4_000_000,
                     faults=[{"kind": "truncate", "only": "blobs", "at_byte": 6_000_000, "times": 1}])
        worker = self.worker(config=self.config())
        begin = time.monotonic()
        worker.must_publish("v", self.reference, "--secret", self.secret("friend"))
        self.assert_tree(self.image.name, worker.target("v"))
        self.assertGreater(time.monotonic() - begin, 1.0)
        self.assertEqual(self.registry.total().faults, {"truncate": 1})
