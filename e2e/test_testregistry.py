#!/usr/bin/env python3
"""Tests the test registry: each of its faults does what it says, and it counts right."""

import base64
import http.client
import json
import pathlib
import re
import tempfile
import time
import unittest

from harness import oci, testregistry

TAG = "latest"
# Longer than the blocks it is sent in.
CONTENT = bytes(n * 7 % 251 for n in range(200_000))
STALL_SECONDS = 0.3


class Registry(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        directory = tempfile.TemporaryDirectory(prefix="clip-e2e-testregistry.")
        cls.addClassCleanup(directory.cleanup)
        layout = oci.Layout(pathlib.Path(directory.name) / "layout")
        cls.layer = layout.add(CONTENT, oci.LAYER_TAR)
        cls.other = layout.add(b"other", oci.LAYER_TAR)
        cls.manifest = layout.add_image(TAG, [(it, it["digest"]) for it in (cls.layer, cls.other)])
        cls.registry = testregistry.TestRegistry(pathlib.Path(directory.name), {"a/b": layout.directory})
        cls.addClassCleanup(cls.registry.stop)
        cls.blob, cls.tag = f"/v2/a/b/blobs/{cls.layer['digest']}", f"/v2/a/b/manifests/{TAG}"

    def setUp(self):
        self.registry.set()
        self.registry.reset()

    def ask(self, path: str, method="GET", bytes_range: str | None = None) -> tuple[int, dict, bytes]:
        """Status, header and body; the body's beginning if the connection breaks, in `self.broken` how."""
        connection = http.client.HTTPConnection("127.0.0.1", self.registry.port, timeout=10)
        self.addCleanup(connection.close)
        connection.request(method, path, headers={"Range": f"bytes={bytes_range}"} if bytes_range else {})
        reply, body, self.broken = connection.getresponse(), b"", None
        try:
            while block := reply.read1(1 << 16):
                body += block
        except (http.client.IncompleteRead, ConnectionResetError) as error:
            self.broken = error
        # read1 says nothing of a connection that was closed too early.
        announced = int(reply.headers.get("Content-Length", 0))
        if method == "GET" and len(body) < announced and self.broken is None:
            self.broken = EOFError(f"{len(body)} of {announced} bytes")
        return reply.status, dict(reply.headers), body

    def fault(self, kind: str, **more) -> None:
        self.registry.set(faults=[{"kind": kind, **more}])

    def test_lets_in_whoever_the_settings_name(self):
        self.registry.set(users={"me:pw": ["a/b"], "other:pw": ["c/d"]}, token_seconds=1)
        status, header, _ = self.ask(self.tag)
        self.assertEqual(status, 401)
        realm = re.search(r'realm="http://[^/]+(/token)"', header["Www-Authenticate"]).group(1)

        def token(user: str) -> tuple[int, dict]:
            connection = http.client.HTTPConnection("127.0.0.1", self.registry.port, timeout=10)
            self.addCleanup(connection.close)
            connection.request("GET", realm, headers={"Authorization": "Basic " + base64.b64encode(user.encode()).decode()})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())

        def pull(shown: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", self.registry.port, timeout=10)
            self.addCleanup(connection.close)
            connection.request("GET", self.tag, headers={"Authorization": f"Bearer {shown}"})
            return connection.getresponse().status

        self.assertEqual(token("me:wrong")[0], 401)
        status, mine = token("me:pw")
        self.assertEqual((status, mine["expires_in"]), (200, 1))
        self.assertEqual(pull(mine["token"]), 200)
        self.assertEqual(pull("made up"), 401)
        self.assertEqual(pull(token("other:pw")[1]["token"]), 401, "of another repository")
        time.sleep(1.1)
        self.assertEqual(pull(mine["token"]), 401, "it has expired")

    def test_serves_a_layout(self):
        self.assertEqual(self.ask("/v2/")[0], 200)
        for name in (TAG, self.manifest["digest"]):
            status, header, body = self.ask(f"/v2/a/b/manifests/{name}")
            self.assertEqual((status, header["Content-Type"], header["Docker-Content-Digest"]), (200, oci.MANIFEST, self.manifest["digest"]))
            self.assertEqual(oci.digest_of(body), self.manifest["digest"])
        status, header, body = self.ask(self.blob)
        self.assertEqual((status, header["Content-Length"], body), (200, str(len(CONTENT)), CONTENT))
        status, header, body = self.ask(self.blob, "HEAD")
        self.assertEqual((status, header["Content-Length"], body), (200, str(len(CONTENT)), b""))
        for path in ("/v2/a/b/manifests/none", f"/v2/a/b/blobs/{oci.digest_of(b'none')}", f"/v2/none/blobs/{self.layer['digest']}",
                     "/v2/a/b/blobs/sha256:..", "/v2/a/b/tags/list"):
            self.assertEqual(self.ask(path)[0], 404, path)
        self.assertEqual(self.ask(self.blob, "DELETE")[0], 405)

    def test_serves_ranges(self):
        size = len(CONTENT)
        for asked, begin, end in [("0-0", 0, 1), ("5-99999", 5, 100_000), ("199999-", size - 1, size), ("-10", size - 10, size), ("5-999999", 5, size), ("-999999", 0, size)]:
            status, header, body = self.ask(self.blob, bytes_range=asked)
            self.assertEqual((status, header["Content-Range"], body), (206, f"bytes {begin}-{end - 1}/{size}", CONTENT[begin:end]), asked)
        for asked in ("0-1,5-6", "5-1", "x-1"):
            self.assertEqual(self.ask(self.blob, bytes_range=asked)[::2], (200, CONTENT), asked)
        status, header, _ = self.ask(self.blob, bytes_range="200000-")
        self.assertEqual((status, header["Content-Range"]), (416, f"bytes */{size}"))

    def test_counts(self):
        self.ask(self.tag)
        self.ask(self.blob)
        self.ask(self.blob, "HEAD")
        self.ask(self.blob, bytes_range="0-99")
        layer = self.registry.blob(self.layer["digest"])
        self.assertEqual((layer.requests, layer.ranged, layer.bytes_sent, layer.faults), ({"GET": 2, "HEAD": 1}, 1, len(CONTENT) + 100, {}))
        self.assertEqual(self.registry.blob(self.other["digest"]), testregistry.Count())
        total = self.registry.total()
        self.assertEqual((total.gets, total.bytes_sent), (3, len(CONTENT) + 100 + self.manifest["size"]))
        self.registry.reset()
        self.assertEqual(self.registry.total(), testregistry.Count())

    def test_delay_and_rate(self):
        begin = time.monotonic()
        self.ask("/v2/")
        undisturbed = time.monotonic() - begin
        self.registry.set(delay_milliseconds=200)
        begin = time.monotonic()
        self.ask("/v2/")
        self.assertGreaterEqual(time.monotonic() - begin, 0.2)
        self.assertLess(undisturbed, 0.2)
        self.registry.set(rate_bytes_per_second=len(CONTENT) * 2)
        begin = time.monotonic()
        self.assertEqual(self.ask(self.blob)[2], CONTENT)
        self.assertGreaterEqual(time.monotonic() - begin, 0.45)

    def test_status(self):
        self.fault("status", status=503, times=2, only="blobs")
        self.assertEqual([self.ask(self.blob)[0] for _ in range(3)], [503, 503, 200])
        self.fault("status", status=429, retry_after_seconds=7)
        status, header, body = self.ask(self.tag)
        self.assertEqual((status, header["Retry-After"], json.loads(body)["errors"][0]["code"]), (429, "7", "TOOMANYREQUESTS"))
        self.assertEqual(self.registry.total().faults, {"status": 3})
        self.fault("status", status=500, method="HEAD")
        self.assertEqual((self.ask(self.blob, "HEAD")[0], self.ask(self.blob)[0]), (500, 200))

    def test_stall(self):
        self.fault("stall", at_byte=100_000, stall_seconds=STALL_SECONDS)
        begin = time.monotonic()
        self.assertEqual(self.ask(self.blob)[2], CONTENT)
        self.assertGreaterEqual(time.monotonic() - begin, STALL_SECONDS)
        begin = time.monotonic()
        self.assertEqual(self.ask(self.blob, bytes_range="0-99999")[2], CONTENT[:100_000])
        self.assertLess(time.monotonic() - begin, STALL_SECONDS)

    def test_truncate(self):
        for at in (0, 100_000):
            self.fault("truncate", at_byte=at)
            status, header, body = self.ask(self.blob)
            self.assertEqual((status, header["Content-Length"], body), (200, str(len(CONTENT)), CONTENT[:at]))
            self.assertIsInstance(self.broken, (EOFError, http.client.IncompleteRead))

    def test_shorten(self):
        self.fault("shorten", at_byte=100_000)
        self.assertEqual((self.ask(self.blob)[2], self.broken), (CONTENT[:100_000], None))
        status, header, body = self.ask(self.blob, bytes_range="99990-100009")
        self.assertEqual((status, header["Content-Length"], body), (206, "10", CONTENT[99_990:100_000]))

    def test_flip_bit(self):
        self.fault("flip_bit", at_byte=100_000)
        wrong = bytearray(CONTENT)
        wrong[100_000] ^= 1
        self.assertEqual(self.ask(self.blob)[2], bytes(wrong))
        self.assertEqual(self.ask(self.blob, bytes_range="100000-100009")[2], bytes(wrong[100_000:100_010]))
        self.assertEqual(self.ask(self.blob, bytes_range="100001-")[2], CONTENT[100_001:])

    def test_ignore_range(self):
        self.fault("ignore_range", times=1)
        self.assertEqual(self.ask(self.blob)[0], 200)
        self.assertEqual(self.ask(self.blob, bytes_range="5-9")[::2], (200, CONTENT))
        self.assertEqual(self.ask(self.blob, bytes_range="5-9")[::2], (206, CONTENT[5:10]))

    def test_reset(self):
        self.fault("reset", times=1)
        with self.assertRaises((ConnectionResetError, http.client.RemoteDisconnected)):
            self.ask(self.blob)
        self.fault("reset", at_byte=100_000)
        body = self.ask(self.blob)[2]
        self.assertIsInstance(self.broken, ConnectionResetError)
        self.assertEqual(body, CONTENT[:len(body)])
        self.assertLessEqual(len(body), 100_000)

    def test_whom_a_fault_meets(self):
        self.fault("status", status=500, skip=1, times=1, digest=self.layer["digest"])
        self.assertEqual([self.ask(self.blob)[0] for _ in range(3)], [200, 500, 200])
        self.assertEqual(self.ask(f"/v2/a/b/blobs/{self.other['digest']}")[0], 200)
        self.registry.set(seed=1, faults=[{"kind": "status", "status": 500, "probability": 0.5}])
        met = sum(self.ask("/v2/a/b/manifests/latest")[0] == 500 for _ in range(40))
        self.assertGreater(met, 5)
        self.assertLess(met, 35)

    def test_settings_that_make_no_sense_are_refused(self):
        for body, why in [({"delay": 1}, "unknown field"), ({"faults": [{"kind": "odd"}]}, 'no kind "odd"'), ({"faults": [{"kind": "stall"}]}, "stall_seconds"),
                          ({"faults": [{"kind": "status"}]}, "from 400 to 599"), ({"rate_bytes_per_second": -1}, "negative")]:
            connection = http.client.HTTPConnection("127.0.0.1", self.registry.port, timeout=10)
            self.addCleanup(connection.close)
            connection.request("POST", "/__control", json.dumps(body))
            reply = connection.getresponse()
            self.assertEqual(reply.status, 400, body)
            self.assertIn(why, reply.read().decode())


if __name__ == "__main__":
    unittest.main()
