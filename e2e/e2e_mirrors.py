"""Mirrors between real registries: content from the mirror, rights from the registry."""

import json
import pathlib

import images
from cluster.pki import Pki
from e2e_csi import docker_config
from harness import process, services
from harness.environment import Case


class Mirrors(Case):
    """The shared registry serves to everybody what a private one, over the same storage, protects."""

    def setUp(self):
        super().setUp()
        htpasswd = process.run("htpasswd", "-Bbn", "user", "right-password").stdout
        self.env.push("demo1")
        self.origin = services.Registry(self.work, self.env.work / "registry", htpasswd=htpasswd, name="origin")
        self.addCleanup(self.origin.stop)
        self.mirror = services.Registry(self.work, self.env.work / "registry", name="mirror")
        self.addCleanup(self.mirror.stop)
        self.reference = f"{self.origin.host}/e2e/demo1:{images.TAG}"
        self.secret = docker_config(self.origin.host, "user", "right-password")

    def mirrored(self, **settings) -> pathlib.Path:
        config = self.work / "mirrors.toml"
        lines = [f'[registry.hosts."{self.origin.host}"]', "plain_http = true", f"mirrors = {json.dumps([self.mirror.host])}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        lines += [f'[registry.hosts."{self.mirror.host}"]', "plain_http = true"]
        config.write_text("\n".join(lines) + "\n")
        return config

    def test_content_comes_from_the_mirror_and_rights_from_the_registry(self):
        worker = self.worker(config=self.mirrored())
        wrong = docker_config(self.origin.host, "user", "wrong-password")
        self.assertEqual(worker.publish("v", self.reference, "--secret", wrong).code, "UNAUTHENTICATED")
        self.assertEqual(self.mirror.blob_gets(), {})
        worker.must_publish("v", self.reference, "--secret", self.secret)
        self.assert_tree("demo1", worker.target("v"))
        self.assertEqual(self.origin.blob_gets(), {})
        self.assertGreater(sum(self.mirror.blob_gets().values()), 0)

    def test_a_volume_without_credentials_has_what_the_mirror_shows_unless_that_must_not_count(self):
        worker = self.worker(config=self.mirrored())
        worker.must_publish("v", self.reference)
        self.assert_tree("demo1", worker.target("v"))
        strict = self.worker("strict", config=self.mirrored(always_ask_origin=True))
        self.assertEqual(strict.publish("v", self.reference).code, "UNAUTHENTICATED")
        strict.must_publish("v", self.reference, "--secret", self.secret)
        self.assert_tree("demo1", strict.target("v"))

    def test_a_mirror_that_is_down_costs_little(self):
        worker = self.worker(config=self.mirrored())
        self.mirror.stop()
        reply = worker.must_publish("v", self.reference, "--secret", self.secret)
        self.assertLess(reply.milliseconds, 5000)
        self.assert_tree("demo1", worker.target("v"))
        self.assertIn("mirror failed, passing it over", worker.log.read_text())


class Certificates(Case):
    """A registry that asks everybody for a certificate, and a node that has a hosts.toml for it."""

    def test_a_registry_that_wants_a_certificate_is_shown_that_of_hosts_toml(self):
        """Who has none, or one of another authority, is told what to do; who has the right one reads."""
        pki, other = (Pki(self.work / name, "", ["IP:127.0.0.1"]) for name in ("pki", "other"))
        for it in (pki, other):
            it.issue("client", "/CN=node", "extendedKeyUsage=clientAuth")
        self.env.push("demo1")
        authority = pki.file("ca.crt")
        registry = services.Registry(self.work, self.env.work / "registry", tls=(pki.file("apiserver.crt"), pki.file("apiserver.key"), authority), name="certified")
        self.addCleanup(registry.stop)
        reference = f"{registry.host}/e2e/demo1:{images.TAG}"
        cases = {"none": None, "stranger": other, "friend": pki}
        for name, shown in cases.items():
            with self.subTest(name):
                directory = self.work / f"certs-{name}" / registry.host
                directory.mkdir(parents=True)
                client = f"client = {json.dumps([[str(shown.file('client.crt')), str(shown.file('client.key'))]])}\n" if shown else ""
                (directory / "hosts.toml").write_text(f'server = "https://{registry.host}"\nca = {json.dumps(str(authority))}\n{client}')
                worker = self.worker(name, config=self.config(f"{name}.toml", registry={"hosts_dir": str(directory.parent)}))
                reply = worker.publish("v", reference)
                if shown == pki:
                    self.assertEqual(reply.code, "OK", reply)
                    self.assert_tree("demo1", worker.target("v"))
                else:
                    self.assertEqual(reply.code, "UNAVAILABLE", reply)
                    self.assertRegex(reply.message, r"it wants to be shown a certificate that it trusts \(\w+\): name one as client in its hosts.toml$")
