"""Images whose layers carry tables of contents, made by the formats' own libraries: mounted by these, and right."""

import json

import compare
import images
import tree
from harness import oci
from harness.environment import Case

# Requests for each layer that a mount takes.
REQUESTS = {"estargz": 2, "zstd-chunked": 1}


class Toc(Case):
    def assert_spared(self, name: str, node, mark: int) -> None:
        """Every name is there, and the registry was asked for no more of a layer than its table."""
        self.assertGreater(sum(1 for _ in node.target("v").rglob("*")), 100)
        self.assertEqual(set(self.layer_gets(name, mark)), {REQUESTS[name]}, "a layer is read for the mount or its names")
        n_layers = len(images.get(name).layout.layers(images.TAG))
        self.assertEqual(node.metric("toc_lookups_total", outcome="hit"), n_layers, node.metrics())

    def test_an_image_is_mounted_by_its_tables(self):
        for name in REQUESTS:
            with self.subTest(name):
                reference = self.env.push(name)
                worker = self.worker(name)
                mark = self.registry.mark()
                worker.must_publish("v", reference)
                self.assert_spared(name, worker, mark)
                self.assert_tree(name, worker.target("v"))

    def test_an_agent_that_starts_goes_on(self):
        """The server has the mount meanwhile; what it was not asked for before is fetched for it after."""
        for name in REQUESTS:
            with self.subTest(name):
                reference = self.env.push(name)
                config = self.config(f"{name}.toml", cache={"complete_layers": False})
                node = self.trio(name[0], config=config)
                mark = self.registry.mark()
                node.must_publish("v", reference)
                self.assert_spared(name, node, mark)
                (node.target("v") / "kinds" / "setuid").read_bytes()
                node.restart("agent")
                self.assert_tree(name, node.target("v"))
                node.restart("agent", "serve")
                node.must_publish("w", reference)
                self.assert_tree(name, node.target("w"))

    def test_a_table_that_the_manifest_names_wrongly_is_not_used(self):
        name = "estargz"
        self.env.push(name)
        manifest = images.get(name).layout.manifest(images.TAG)
        wrong, good = manifest["layers"]
        body = json.dumps({**manifest, "layers": [{**wrong, "annotations": good["annotations"]}, good]}).encode()
        url = f"http://{self.registry.host}/v2/e2e/{name}/manifests/wrong"
        oci._request("PUT", url, body, {"Content-Type": oci.MANIFEST}).close()
        worker = self.worker()
        worker.must_publish("v", f"{self.registry.host}/e2e/{name}:wrong")
        self.assertEqual([worker.metric("toc_lookups_total", outcome=it) for it in ("hit", "unusable")], [1, 1])
        self.assertIn("it does not have the digest that the manifest names", worker.tail(200))
        truth = tree.parse(images.get(name).truth().read_text(encoding="ascii"))
        found = compare.differences(truth, tree.manifest(str(worker.target("v"))), images.get(name).dirs_without_time())
        # Where a layer is streamed, what eStargz adds for itself are files.
        self.assertEqual(found, ["too much: .no.prefetch.landmark (file)", "too much: stargz.index.json (file)"])

    def test_without_the_setting_the_layers_are_streamed(self):
        name = "zstd-chunked"
        reference = self.env.push(name)
        worker = self.worker("a", config=self.config("off.toml", cache={"layers_by_toc": False}))
        mark = self.registry.mark()
        worker.must_publish("v", reference)
        self.assertEqual(set(self.layer_gets(name, mark)), {1})
        self.assertEqual(worker.metric("toc_lookups_total", outcome="hit"), 0)
        self.assert_tree(name, worker.target("v"))
