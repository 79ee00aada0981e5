"""What a volume's attributes do: a directory of the image, a layer to write, who says what a tag means, plain http."""

import json
import os

import tree
from harness import process, services, trio
from harness.environment import Case

MIB = 1 << 20
ROUNDS = 4


def writable(**more) -> dict:
    return {"writable": "true", **more}


class Path(Case):
    # It has directories, links and all that a tree can have.
    IMAGE = "nasty"

    def test_a_directory_of_the_image_is_seen(self):
        node = self.trio()
        reference = self.env.push(self.IMAGE)
        node.must_publish("whole", reference)
        directories = [it for it in sorted(node.target("whole").iterdir()) if it.is_dir() and not it.is_symlink()]
        self.assertGreater(len(directories), 1, "the image has too few directories")
        for directory in directories:
            node.must_publish("part", reference, path=directory.name)
            self.assertEqual(tree.manifest(str(node.target("part"))), tree.manifest(str(directory)))
            node.must_unpublish("part")
        # A restart finds it as it is.
        for _ in range(2):
            node.must_publish("part", reference, path=directories[0].name)
            node.restart("node")
        self.assertEqual(len([it for it in process.mounts_below(node.targets) if "/part/" in it]), 1)
        node.must_unpublish("part")
        node.must_unpublish("whole")

    def test_what_is_no_directory_of_the_image_is_refused(self):
        node = self.trio()
        reference = self.env.push(self.IMAGE)
        node.must_publish("whole", reference)
        top = node.target("whole")
        found = sorted(it for it in top.rglob("*") if "=" not in it.name)
        file = next(it for it in found if it.is_file() and not it.is_symlink())
        link = next(it for it in found if it.is_symlink() and it.is_dir())
        for path in ("none/at/all", "/etc", "../etc", ".", "a/../b", "", str(file.relative_to(top)), str(link.relative_to(top))):
            reply = node.publish("part", reference, path=path)
            self.assertEqual(reply.code, "INVALID_ARGUMENT", (path, reply))
            self.assertTrue(reply.message.startswith("path: "), reply)
            self.assertFalse(node.target("part").exists())
        node.must_unpublish("whole")


class Writable(Case):
    def node(self, **settings) -> trio.Trio:
        return self.trio(config=self.config(node={"max_writable_bytes": 64 * MIB, **settings}))

    def test_it_is_off_unless_the_operator_allows_it(self):
        node = self.trio()
        reply = node.publish("v", self.env.push("small"), "--writable", **writable())
        self.assertEqual(reply.code, "INVALID_ARGUMENT", reply)
        self.assertIn("node.max_writable_bytes", reply.message)
        self.assertEqual(node.left_behind(), [])

    def test_what_is_written_outlives_every_role_and_not_the_volume(self):
        node = self.node()
        reference = self.env.push("small")
        node.must_publish("v", reference, "--writable", **writable(writableSize="8Mi"))
        node.must_publish("w", reference, "--writable", **writable(writableSize="8Mi"))
        top = node.target("v")
        self.assert_tree("small", top)
        file = next(it for it in top.rglob("*") if it.is_file() and not it.is_symlink() and it.stat().st_size)
        before = file.read_bytes()
        for number in range(ROUNDS):
            for role in trio.ROLES:
                (top / "new").write_text(f"{number} {role}")
                with file.open("ab") as out:
                    out.write(b"x")
                node.restart(role)
                # Answered by the server alone: the next role must not end before this one has what it held, which is what no mount survives.
                [source] = node.directory.glob("state/sources/*/mnt")
                os.statvfs(source)
                self.assertEqual((top / "new").read_text(), f"{number} {role}")
            # A repeated call changes nothing.
            node.must_publish("v", reference, "--writable", **writable(writableSize="8Mi"))
        self.assertEqual(file.read_bytes(), before + b"x" * ROUNDS * len(trio.ROLES))
        self.assert_tree("small", node.target("w"))
        stats = {it.get("unit", "BYTES"): it for it in json.loads(node.csi("stats", "v", top).message)["usage"]}
        self.assertEqual(int(stats["BYTES"]["total"]), 8 * MIB)
        self.assertGreater(int(stats["BYTES"]["used"]), 0)
        # What is beyond the size is refused, and hurts nobody.
        with self.assertRaises(OSError), (top / "big").open("wb") as out:
            out.write(b"\1" * 9 * MIB)
        (top / "big").unlink()
        node.must_unpublish("v")
        node.must_publish("v", reference, "--writable", **writable(writableSize="8Mi"))
        self.assert_tree("small", top)
        node.must_unpublish("v")
        node.must_unpublish("w")
        process.wait_until(lambda: not process.mounts_below(node.targets), "all to be unmounted")
        self.assertEqual(list(node.state_dir.glob("writable/*")) + list(node.state_dir.glob("volumes/*")), [])

    def test_killed_at_each_step_it_is_mounted_or_gone(self):
        """The node service dies at each step of a publish and of an unpublish; the next one goes on."""
        node = self.node(idle_source_seconds=0)
        reference = self.env.push("small")
        for step in ("node:prepared", "publish:recorded", "publish:staged", "publish:bound", "unpublish:detached", "unpublish:removed"):
            for again in (True, False):
                node.stop("node")
                node.start("node", env={"CLIP_CSI_FAILPOINT": step})
                node.publish("v", reference, "--writable", **writable())
                if step.startswith("unpublish"):
                    (node.target("v") / "new").write_text("new")
                    node.unpublish("v")
                process.wait_until(lambda: not node.servers["node"].alive(), f"the death at {step}")
                node.start("node")
                if again:
                    node.must_publish("v", reference, "--writable", **writable())
                    self.assert_tree("small", node.target("v"))
                    (node.target("v") / "new").write_text("new")
                node.must_unpublish("v")
                process.wait_until(lambda: not node.left_behind(), "all to be gone", 10)


class Policy(Case):
    def setUp(self):
        super().setUp()
        self.env.push("small")
        self.env.push("multi-member")
        self.reference = f"{self.registry.host}/e2e/moving:now"

    def move(self, name: str) -> None:
        """Makes the tag another image's."""
        process.run("skopeo", "copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false",
                    f"docker://{self.env.push(name)}", f"docker://{self.reference}")

    def test_who_says_what_a_tag_means(self):
        node = self.trio()
        self.move("small")
        reply = node.publish("never", self.reference, pullPolicy="Never")
        self.assertEqual(reply.code, "NOT_FOUND", reply)
        self.assertIn("pullPolicy is Never", reply.message)
        self.assertEqual(node.left_behind(), [])
        # Not known: the registry says.
        node.must_publish("first", self.reference, pullPolicy="IfNotPresent")
        self.move("multi-member")
        for volume, policy, want in (("stay", "IfNotPresent", "small"), ("never", "Never", "small"), ("always", "Always", "multi-member"),
                                     # The registry has said again what it means.
                                     ("moved", "IfNotPresent", "multi-member"), ("plain", None, "multi-member")):
            more = {"pullPolicy": policy} if policy else {}
            node.must_publish(volume, self.reference, **more)
            self.assert_tree(want, node.target(volume))
        # What it means is known across a restart.
        self.move("small")
        node.restart("agent", "node")
        node.must_publish("later", self.reference, pullPolicy="IfNotPresent")
        self.assert_tree("multi-member", node.target("later"))

    def test_the_right_to_pull_is_checked_unless_the_operator_trusts_never(self):
        for trusts in (False, True):
            registry = services.Registry(self.work, self.env.work / "registry", name=f"own-{trusts}")
            self.addCleanup(registry.stop)
            reference = self.env.push("small").replace(self.registry.host, registry.host, 1)
            config = self.config(f"{trusts}.toml", plain_http=[registry.host], registry={"trust_pull_policy_never": trusts, "retries": 0, "connect_timeout_seconds": 1})
            node = self.trio(f"node-{trusts}", config)
            node.must_publish("first", reference)
            self.assert_tree("small", node.target("first"))
            registry.stop()
            self.assertEqual(node.publish("if", reference, pullPolicy="IfNotPresent").code, "UNAVAILABLE")
            reply = node.publish("never", reference, pullPolicy="Never")
            self.assertEqual(reply.code, "OK" if trusts else "UNAVAILABLE", reply)
            if trusts:
                self.assert_tree("small", node.target("never"))
            node.end()


class Insecure(Case):
    def test_plain_http_is_for_volumes_that_say_so_and_hosts_that_the_operator_names(self):
        reference = self.env.push("small")
        for hosts, attributes, want in (([], {"insecure": "true"}, "INVALID_ARGUMENT"), ([self.registry.host], {}, None), ([self.registry.host], {"insecure": "false"}, None),
                                        ([self.registry.host], {"insecure": "true"}, "OK")):
            with self.subTest(hosts=hosts, attributes=attributes):
                name = f"{len(hosts)}{len(attributes)}{attributes.get('insecure')}"
                config = self.config(f"{name}.toml", plain_http=[], registry={"insecure_hosts": hosts, "retries": 0})
                node = self.trio(name, config)
                reply = node.publish("v", reference, **attributes)
                if want:
                    self.assertEqual(reply.code, want, reply)
                else:
                    self.assertNotEqual(reply.code, "OK", reply)
                if want == "INVALID_ARGUMENT":
                    self.assertIn("registry.insecure_hosts", reply.message)
                if want == "OK":
                    self.assert_tree("small", node.target("v"))
                    # What is not there yet is fetched in the same way by the next agent.
                    node.restart("agent")
                    self.assertTrue(node.publish("w", reference, **attributes).ok)
                node.end()


class Modes(Case):
    def test_a_volume_for_one_pod_is_given_to_one_also_after_a_restart(self):
        node = self.trio()
        reference = self.env.push("small")
        one_pod = ("--bare", "--mode", "SINGLE_NODE_SINGLE_WRITER")
        node.must_publish("v", reference, *one_pod)
        elsewhere = node.targets / "other" / "mount"
        elsewhere.parent.mkdir()
        for _ in range(2):
            reply = node.csi("publish", "v", elsewhere, f"image={reference}", *one_pod)
            self.assertEqual(reply.code, "FAILED_PRECONDITION", reply)
            self.assertFalse(elsewhere.exists())
            node.restart("node")
        node.must_unpublish("v")
        self.assertEqual(node.csi("publish", "v", elsewhere, f"image={reference}", *one_pod).code, "OK")
        self.assertEqual(node.csi("unpublish", "v", elsewhere).code, "OK")

    def test_readers_on_many_nodes_and_no_writers(self):
        node = self.trio()
        reference = self.env.push("small")
        node.must_publish("v", reference, "--bare", "--mode", "MULTI_NODE_READER_ONLY")
        self.assert_tree("small", node.target("v"))
        for mode in ("MULTI_NODE_MULTI_WRITER", "MULTI_NODE_SINGLE_WRITER"):
            reply = node.publish("w", reference, "--bare", "--mode", mode)
            self.assertEqual(reply.code, "INVALID_ARGUMENT", reply)
            self.assertIn("ReadOnlyMany", reply.message)
        node.must_unpublish("v")
