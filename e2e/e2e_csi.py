"""The CSI services as kubelet and csi-sanity use them; logs, metrics, health."""

import base64
import json
import os
import pathlib
import re
import stat
import subprocess
import threading
import urllib.error
import urllib.request

import images
from harness import driver, paths, process, services
from harness.environment import Case


# While csi-sanity runs: as many as make it run several times.
SANITY_KILLS = 10


def docker_config(host: str, user: str, password: str) -> str:
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    return ".dockerconfigjson=" + json.dumps({"auths": {host: {"auth": auth}}})


class Sanity(Case):
    def test_csi_sanity(self):
        worker = self.worker()
        done = process.run(paths.E2E / "sanity.py", worker.socket, self.env.push("small"), check=False, timeout=300)
        print(done.stdout or done.stderr)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(worker.left_behind(), [])

    def test_csi_sanity_while_agent_and_serve_are_killed(self):
        """Three roles and a controller of its own; every second agent or serve dies, and comes back."""
        node, image = self.trio(), self.env.push("small")
        node.must_publish("warm-up", image)
        node.must_unpublish("warm-up")
        socket = self.work / "controller.sock"
        controller = process.Server([self.env.binary(), "controller", "--endpoint", f"unix://{socket}"], stdout=self.work / "log.controller")
        self.addCleanup(controller.stop)
        controller.wait_ready(socket.exists, "clip-csi controller")
        done, kills = threading.Event(), []

        def kill():
            while not done.wait(1):
                role = "agent" if len(kills) % 2 else "serve"
                node.restart(role, wait=False)
                kills.append(role)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            while len(kills) < SANITY_KILLS:
                run = process.run(paths.E2E / "sanity.py", node.socket, image, "--controller", socket, check=False, timeout=300)
                self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        finally:
            done.set()
            killer.join()
        print(f"{len(kills)} kills; {run.stdout.splitlines()[-1]}")
        process.wait_until(lambda: node.answers("agent") and node.answers("serve"), "both to be back")
        self.assertEqual([it for it in node.left_behind() if "open" not in it and "sources" not in it], [])


class Publish(Case):
    def test_publish_is_idempotent_and_unpublish_takes_all_back(self):
        worker = self.worker()
        reference = self.env.push("small")
        for _ in range(10):
            worker.must_publish("v", reference)
        self.assertEqual(len([it for it in process.mounts_below(worker.targets)]), 1, "one bind, not ten")
        self.assert_tree("small", worker.target("v"))
        for _ in range(3):
            worker.must_unpublish("v")
        self.assertEqual(worker.left_behind(), [f"target {worker.target('v')}"][:0])
        self.assertFalse(worker.target("v").exists(), "the target path is the driver's to remove")

    def test_other_attributes_at_a_published_target_are_refused(self):
        worker = self.worker()
        worker.must_publish("v", self.env.push("small"))
        reply = worker.publish("v", self.env.push("multi-arch"))
        self.assertEqual(reply.code, "ALREADY_EXISTS", reply)
        self.assert_tree("small", worker.target("v"))

    def test_unpublish_of_what_never_was_succeeds(self):
        worker = self.worker()
        self.assertEqual(worker.unpublish("never").code, "OK")

    def test_volume_survives_another_worker_of_the_same_name_being_refused(self):
        """A second process on the same state directory must not take over or clean up."""
        worker = self.worker()
        worker.must_publish("v", self.env.push("small"))
        done = subprocess.run(
            [paths.binary(), "node", "--endpoint", f"unix://{self.work}/b.sock", "--node-id", "b", "--state-dir", worker.state_dir,
             "--cache-dir", worker.cache_dir, "--config", worker.config], capture_output=True, text=True, timeout=30)
        self.assertNotEqual(done.returncode, 0)
        self.assert_tree("small", worker.target("v"))

    def test_volume_stats(self):
        worker = self.worker()
        worker.must_publish("v", self.env.push("small"))
        self.assertIn("GET_VOLUME_STATS", worker.csi("caps").message)
        reply = worker.csi("stats", "v", worker.target("v"))
        self.assertEqual(reply.code, "OK", reply)
        stats = {it.get("unit", "BYTES"): it for it in json.loads(reply.message)["usage"]}
        # Every name of the tree but those that are hard links to another one.
        inodes = {(it.st_dev, it.st_ino): it for it in map(os.lstat, [worker.target("v"), *worker.target("v").rglob("*")])}
        self.assertEqual(int(stats["INODES"]["total"]), len(inodes))
        self.assertEqual(int(stats["BYTES"]["total"]), sum(it.st_size for it in inodes.values() if stat.S_ISREG(it.st_mode)))
        self.assertEqual(worker.csi("stats", "other", worker.target("v")).code, "NOT_FOUND")
        self.assertEqual(worker.csi("stats", "v", worker.target("v").parent).code, "NOT_FOUND")
        # Nobody is asked who might not answer.
        worker.kill()
        worker.start()
        self.assertEqual(worker.csi("stats", "v", worker.target("v")).message, reply.message)

    def test_socket_is_private_and_a_stale_one_is_replaced(self):
        worker = self.worker()
        self.assertEqual(worker.socket.stat().st_mode & 0o077, 0)
        worker.kill()
        self.assertTrue(worker.socket.exists())
        worker.start()
        self.assertTrue(worker.csi("probe").ok)

    def test_sigterm_ends_it_soon_even_with_volumes(self):
        worker = self.worker()
        worker.must_publish("v", self.env.push("small"))
        self.assertEqual(worker.stop(), 0, worker.tail())
        worker.start()
        # Whatever became of the mount, the pod can be taken down and started again.
        worker.must_unpublish("v")
        worker.must_publish("v", self.env.push("small"))
        self.assert_tree("small", worker.target("v"))

    def test_starts_with_registry_and_remote_down(self):
        down = process.free_port()
        config = self.work / "down.toml"
        config.write_text(f'[remote]\nkind = "redis"\nurl = "redis://127.0.0.1:{down}"\n[registry.hosts."{self.registry.host}"]\nplain_http = true\n')
        worker = self.worker(config=config)
        self.assertTrue(worker.csi("probe").ok)
        reply = worker.must_publish("v", self.env.push("small"))
        self.assertLess(reply.milliseconds, 3000, "a remote that is down costs one short timeout")
        self.assert_tree("small", worker.target("v"))


class Credentials(Case):
    def private_registry(self, **settings) -> services.Registry:
        htpasswd = process.run("htpasswd", "-Bbn", "user", "right-password").stdout
        registry = services.Registry(self.work, self.env.work / "registry", htpasswd=htpasswd, name="private", **settings)
        self.addCleanup(registry.stop)
        self.env.push("small")
        return registry

    def check(self, registry: services.Registry, config: pathlib.Path) -> None:
        worker = self.worker(config=config)
        reference = f"{registry.host}/e2e/small:{images.TAG}"
        reply = worker.publish("v", reference)
        self.assertEqual(reply.code, "UNAUTHENTICATED", reply)
        reply = worker.publish("v", reference, "--secret", docker_config(registry.host, "user", "wrong-password"))
        self.assertIn(reply.code, ("UNAUTHENTICATED", "PERMISSION_DENIED"), reply)
        self.assertNotIn("wrong-password", reply.message)
        self.assertEqual(worker.left_behind(), [])
        secret = docker_config(registry.host, "user", "right-password")
        worker.must_publish("v", reference, "--secret", secret)
        self.assert_tree("small", worker.target("v"))
        # That the layers are cached gives nobody else the right to the image.
        reply = worker.publish("other", reference)
        self.assertEqual(reply.code, "UNAUTHENTICATED", reply)
        log = worker.log.read_text()
        for private in ("right-password", "wrong-password", base64.b64encode(b"user:right-password").decode()):
            self.assertNotIn(private, log)

    def test_basic_credentials(self):
        registry = self.private_registry()
        self.check(registry, self.config(plain_http=[registry.host]))

    def test_credentials_of_the_node_serve_volumes_without_a_secret_and_are_read_anew(self):
        registry = self.private_registry()
        reference = f"{registry.host}/e2e/small:{images.TAG}"
        file = self.work / "node-credentials.json"

        def write(password: str) -> None:
            text = docker_config(registry.host, "user", password).partition("=")[2]
            new = file.with_suffix(".new")
            new.write_text(text)
            new.rename(file)

        write("wrong-password")
        config = self.config(plain_http=[registry.host], registry={"docker_config_file": str(file)})
        worker = self.worker(config=config)
        self.assertEqual(worker.publish("v", reference).code, "UNAUTHENTICATED")
        write("right-password")
        worker.must_publish("v", reference)
        self.assert_tree("small", worker.target("v"))
        # Also after a secret of the volume's own that is refused, or says nothing of the registry.
        for number, secret in enumerate((docker_config(registry.host, "user", "wrong-password"), docker_config("other.example", "user", "right-password"))):
            worker.must_publish(f"own-{number}", reference, "--secret", secret)
        # What was published once is asked for again, with the credentials of the day.
        write("wrong-password")
        reply = worker.publish("again", reference)
        self.assertEqual(reply.code, "UNAUTHENTICATED", reply)
        self.assertIn("e2e/small", reply.message)
        log = worker.log.read_text()
        for private in ("right-password", "wrong-password"):
            self.assertNotIn(private, log)

    def test_basic_credentials_with_tls_and_an_own_ca(self):
        # A CA and a certificate by it: rustls refuses a CA that serves as the server's own.
        ca, ca_key, certificate, key, request = (self.work / name for name in ("ca.pem", "ca.key", "server.pem", "server.key", "server.csr"))
        elliptic = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        process.run("openssl", "req", "-x509", *elliptic, "-days", "2", "-subj", "/CN=e2e CA", "-keyout", ca_key, "-out", ca)
        process.run("openssl", "req", *elliptic, "-subj", "/CN=e2e", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", request)
        process.run("openssl", "x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2", "-copy_extensions", "copy", "-out", certificate)
        registry = self.private_registry(tls=(certificate, key))
        config = self.work / "tls.toml"
        config.write_text(f'[registry.hosts."{registry.host}"]\nca_file = {json.dumps(str(ca))}\n')
        self.check(registry, config)
        # Without the CA, and by plain http without leave, there is no connection at all.
        config.write_text("")
        stranger = self.worker("stranger", config=config)
        reply = stranger.publish("v", f"{registry.host}/e2e/small:{images.TAG}")
        self.assertNotIn(reply.code, ("OK", "INTERNAL", "UNKNOWN"), reply)
        self.assertIn("ca_file", reply.message)

    def test_plain_http_needs_leave(self):
        config = self.work / "none.toml"
        config.write_text("")
        reply = self.worker(config=config).publish("v", self.env.push("small"))
        self.assertNotEqual(reply.code, "OK", reply)


class Telemetry(Case):
    def get(self, worker: driver.Worker, path: str) -> int:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{worker.metrics_port}{path}", timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    def test_health_and_readiness(self):
        worker = self.worker()
        self.assertEqual([self.get(worker, path) for path in ("/healthz", "/readyz", "/metrics", "/nonsense")], [200, 200, 200, 404])

    def test_metrics_tell_what_was_done(self):
        worker = self.worker()
        worker.must_publish("v", self.env.push("demo1"))
        self.assert_tree("demo1", worker.target("v"))
        worker.publish("w", f"{self.registry.host}/e2e/none:1")
        self.assertEqual(worker.metric("layer_decompressions_total", outcome="ok"), 1)
        self.assertEqual(worker.metric("layer_decompressed_bytes_total"), images.get("demo1").note()["layer_bytes"][0])
        self.assertGreater(worker.metric("tier_reads_total", tier="disk", outcome="hit"), 0)
        self.assertGreaterEqual(worker.metric("layer_cache_bytes"), images.get("demo1").note()["layer_bytes"][0])
        self.assertEqual(worker.metric("layer_cache_layers"), 1)
        self.assertEqual(worker.metric("mounts"), 1)
        rpc = [series for series in worker.metrics() if series.startswith("clip_csi_csi_requests_total") and 'NodePublishVolume' in series]
        self.assertTrue(any(re.search(r'code="NOT_?FOUND"', it, re.I) for it in rpc), rpc)
        self.assertTrue(any('code="OK"' in it.upper().replace("CODE", "code") for it in rpc), rpc)
        self.assertGreater(worker.metric("process_resident_memory_bytes"), 1e6)

    def test_log_has_the_messages_that_operators_grep_for(self):
        redis = self.redis()
        config = self.config(redis=redis, key_file=self.work / "key")
        a = self.worker("a", config=config)
        reference = self.env.push("demo1")
        a.must_publish("v", reference)
        self.assert_tree("demo1", a.target("v"))
        process.wait_until(lambda: a.metric("remote_uploads_total", outcome="ok") == 1, "the upload", 60)
        a.must_unpublish("v")
        a.must_publish("again", reference)
        self.assert_tree("demo1", a.target("again"))
        b = self.worker("b", config=config)
        b.must_publish("v", reference)
        self.assert_tree("demo1", b.target("v"))
        for worker, messages in ((a, ["initialized OCI storage with disk cache", "decompressing layer (first access)", "layer decompressed and cached to disk",
                                      "cached decompressed layer to remote cache", "disk cache hit"]),
                                 (b, ["remote cache hit", "loaded from remote cache", "layer cached to disk"])):
            log = worker.log.read_text()
            for message in messages:
                self.assertIn(message, log)
            self.assertLess(len(log.splitlines()), 100, "nothing per read above debug")

    def test_json_log_is_json(self):
        worker = self.worker(options=["--log-format", "json"])
        worker.must_publish("v", self.env.push("small"))
        worker.publish("w", f"{self.registry.host}/e2e/none:1")
        lines = worker.log.read_text().splitlines()
        self.assertGreater(len(lines), 2)
        for line in lines:
            self.assertIsInstance(json.loads(line), dict, line)


class Memory(Case):
    def test_highwater_is_bounded_with_big_layers_and_many_readers(self):
        worker = self.worker()
        worker.must_publish("v", self.env.push("debian-python"))
        self.assert_tree("debian-python", worker.target("v"))
        memory = worker.memory()
        print(f"VmRSS {memory['VmRSS'] / 1e6:.1f} MB, VmHWM {memory['VmHWM'] / 1e6:.1f} MB")
        self.assertLess(memory["VmHWM"], 20e6)
