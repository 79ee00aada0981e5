"""kill -9 at any moment leaves a cache that is still right, and a node that can go on."""

import os
import shutil
import subprocess
import threading
import time

import images
from harness import driver, process
from harness.environment import Case

KILLS = int(os.environ.get("CLIP_E2E_KILLS", "50"))


class Kill(Case):
    def readers(self, worker: driver.Worker, names: list[str], stop: threading.Event) -> threading.Thread:
        """Reads files of the volume until told to stop. That reads fail after the kill is right."""
        def read():
            for name in names:
                if stop.is_set():
                    break
                try:
                    with open(worker.target("v") / name, "rb", buffering=0) as file:
                        while file.read(1 << 20):
                            pass
                except OSError:
                    # ENOTCONN after the kill.
                    stop.wait(0.01)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread

    def test_killed_at_random_moments(self):
        redis = self.redis()
        config = self.config(redis=redis, key_file=self.work / "key")
        # A small image, because all of it is compared after each kill; several layers, because a
        # kill may hit any of them; big enough to be hit in its middle.
        name = "multi-member"
        reference = self.env.push(name)
        files = sorted(images.get("demo1").note()["files"][0])
        print(f"seed {self.seed}, {KILLS} kills")
        worker = self.worker("a", config=config)
        # How long an undisturbed cold access takes, so that kills fall into it and shortly after.
        begin = time.monotonic()
        publish = worker.must_publish("v", reference).milliseconds / 1000
        self.assert_tree(name, worker.target("v"))
        whole = time.monotonic() - begin
        worker.must_unpublish("v")
        hit = {"before": 0, "after": 0}
        for number in range(KILLS):
            # Mostly all is cold, else it goes on with what the last kill left.
            if self.dice.random() < 0.7:
                worker.kill()
                shutil.rmtree(worker.cache_dir)
                if self.dice.random() < 0.5:
                    redis.command("FLUSHALL")
                worker.start()
            worker.target("v").parent.mkdir(exist_ok=True)
            publishing = subprocess.Popen(
                [driver.csictl(), "--endpoint", f"unix://{worker.socket}", "publish", "v", worker.target("v"), f"image={reference}"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stop = threading.Event()
            reader = self.readers(worker, self.dice.sample(files, 200), stop)
            # Mostly during a cold publish, else among the reads and uploads that follow.
            time.sleep(self.dice.uniform(0, publish * 1.2 if self.dice.random() < 0.7 else whole))
            hit["before" if publishing.poll() is None else "after"] += 1
            worker.kill()
            stop.set()
            publishing.wait(30)
            reader.join(30)
            self.assertFalse(reader.is_alive(), "a reader hangs on a mount whose server is dead")

            worker.start()
            # Kubelet does not know how far it came: it unpublishes, or publishes again.
            if self.dice.random() < 0.5:
                worker.must_unpublish("v")
            worker.must_publish("v", reference)
            self.assert_tree(name, worker.target("v"))
            worker.must_unpublish("v")
            self.assertEqual(worker.left_behind(), [], f"after kill {number}")
        print(f"kills during the publish: {hit['before']}, after it: {hit['after']}")
        self.assertGreater(hit["before"], 0, "no kill fell into a publish: the moments are wrong")
        worker.stop()
        self.assertEqual(driver.clip("cache", "verify", config=config, cache_dir=worker.cache_dir).returncode, 0)
        # Nor did any of them put something wrong into the remote cache.
        second = self.worker("b", config=config)
        second.must_publish("v", reference)
        self.assert_tree(name, second.target("v"))

    def test_no_temporary_files_gather(self):
        """What killed fills leave is cleaned up; the cache does not grow with each kill."""
        config = self.config()
        reference = self.env.push("demo5")
        worker = self.worker("a", config=config)
        sizes = []
        for _ in range(6):
            worker.target("v").parent.mkdir(exist_ok=True)
            publishing = subprocess.Popen(
                [driver.csictl(), "--endpoint", f"unix://{worker.socket}", "publish", "v", worker.target("v"), f"image={reference}"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(self.dice.uniform(0.05, 0.3))
            worker.kill()
            publishing.wait(30)
            worker.start()
        worker.must_publish("v", reference)
        self.assert_tree("demo5", worker.target("v"))
        used = int(process.run("du", "-s", "--block-size=1", worker.cache_dir).stdout.split()[0])
        whole = sum(images.get("demo5").note()["layer_bytes"])
        self.assertLess(used, whole * 1.1 + (8 << 20), f"{used} bytes for {whole} bytes of layers")

    def test_a_killed_mount_command_can_be_cleaned_up(self):
        directory = self.mount(self.env.push("small"))
        for line in process.run("ps", "-eo", "pid=,args=").stdout.splitlines():
            pid, _, arguments = line.strip().partition(" ")
            if str(directory) in arguments and "mount" in arguments:
                os.kill(int(pid), 9)
        driver.clip("unmount", directory)
        self.assertEqual(process.mounts_below(directory), [])
        self.assert_tree("small", self.mount(self.env.push("small"), "again"))
