"""`clip-csi cache ls|verify|rm` on a cache that real mounts have filled."""

import pathlib

import images
from harness import driver, process
from harness.environment import Case


class Cache(Case):
    def fill(self, name: str) -> pathlib.Path:
        self.unmount(self.mount(self.env.push(name)))
        return self.work / "cache"

    def cache(self, *words, check=True):
        return driver.clip("cache", *words, config=self.config(), cache_dir=self.work / "cache", check=check)

    def test_ls_names_the_layers(self):
        self.fill("demo5")
        printed = self.cache("ls").stdout
        for diff_id in images.get("demo5").layout.diff_ids(images.TAG):
            self.assertIn(diff_id.removeprefix("sha256:")[:12], printed)

    def test_rm_removes_one_layer_or_all(self):
        cache = self.fill("demo5")
        diff_ids = images.get("demo5").layout.diff_ids(images.TAG)
        self.cache("rm", diff_ids[0])
        printed = self.cache("ls").stdout
        self.assertNotIn(diff_ids[0].removeprefix("sha256:"), printed)
        self.assertIn(diff_ids[1].removeprefix("sha256:")[:12], printed)
        # What was removed is fetched again.
        mark = self.registry.mark()
        directory = self.mount(self.env.push("demo5"), "again")
        self.assert_tree("demo5", directory)
        self.assertEqual(self.layer_gets("demo5", mark), [1, 0, 0, 0, 0])
        self.unmount(directory)
        self.cache("rm", "--all")
        used = int(process.run("du", "-s", "--block-size=1", cache).stdout.split()[0])
        self.assertLess(used, 1 << 20)
        self.assertNotEqual(self.cache("rm", "sha256:" + "0" * 64, check=False).returncode, 0, "a layer that is not there")

    def test_verify_finds_what_the_disk_changed_and_it_is_fetched_anew(self):
        cache = self.fill("demo1")
        self.assertEqual(self.cache("verify").returncode, 0)
        # The biggest file of the cache is the layer's.
        data = max((path for path in cache.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        self.assertGreaterEqual(data.stat().st_size, images.get("demo1").note()["layer_bytes"][0])
        with open(data, "r+b") as file:
            for at in (1000, 10 << 20, 20 << 20):
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 0xFF]))
        done = self.cache("verify", check=False)
        self.assertTrue(done.returncode != 0 or "3" in done.stdout, f"three chunks are wrong: {done.stdout}{done.stderr}")
        directory = self.mount(self.env.push("demo1"), "again")
        self.assert_tree("demo1", directory)
        self.unmount(directory)
        self.assertEqual(self.cache("verify").returncode, 0)

    def test_commands_on_a_cache_in_use_do_no_harm(self):
        worker = self.worker(cache_dir=self.work / "cache")
        worker.must_publish("v", self.env.push("demo1"))
        self.cache("ls")
        self.cache("verify", check=False)
        self.cache("rm", "--all", check=False)
        # Refused or obeyed: what is mounted stays right.
        driver.drop_from_page_cache(worker.target("v"))
        self.assert_tree("demo1", worker.target("v"))
