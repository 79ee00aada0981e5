"""Each role dies at each step of publish, unpublish and hand-over; repeating the call makes all right, and a pod that reads does not notice."""

import concurrent.futures
import contextlib
import time

from e2e_restart import IMAGE, UnderReaders
from harness import process, trio

OTHER = "small"
KILLED = -9
# Light ones: the cores are for the restarts.
KINDS = ("sequential", "direct", "held")


def at(step: str) -> dict[str, str]:
    """For a role's environment: it ends at this step, as by kill -9."""
    return {"CLIP_CSI_FAILPOINT": step}


class Crash(UnderReaders):
    """Volume `v` is published and read all the time; volume `x` is what a call is about."""

    def setUp(self):
        super().setUp()
        self.node = self.warm(idle_source_seconds=0)
        self.reference = self.env.push(OTHER)
        # What is there while `v` alone is published, and who filled its layers is done: then the agent has each open once.
        self.alone = process.wait_until(self.at_rest, "the agent to be done with the layers", 20)

    def at_rest(self) -> list[str] | None:
        """What is there, unless the agent has a file open twice, or one that it only writes or flushes."""
        there = sorted(self.node.left_behind())
        agents = [it for it in there if it.startswith("agent has")]
        is_done = len(agents) == len(set(agents)) and all(it.endswith(("/data open", ".clip open")) for it in agents)
        return there if is_done else None

    @contextlib.contextmanager
    def each(self, steps: tuple[str, ...]):
        """Under readers; `v` is unpublished at the end, and nothing is left."""
        with self.readers(self.node, kinds=KINDS):
            yield steps
        self.assert_tree(IMAGE, self.node.target("v"))
        self.node.must_unpublish("v")
        self.assertEqual(self.left(self.node), [])
        print(f"crashed at {len(steps)} steps; read errors: {len(self.seen.errors)}")
        self.assertEqual(self.seen.errors, [])

    def publish_and_take_back(self) -> None:
        """What kubelet does next, whatever came before: it works, and leaves nothing."""
        self.node.must_publish("x", self.reference)
        self.assert_tree(OTHER, self.node.target("x"))
        self.take_back()

    def take_back(self) -> None:
        self.node.must_unpublish("x")
        self.assertFalse(self.node.target("x").exists(), "the target's directory is the driver's to remove")
        with contextlib.suppress(process.Failed):
            process.wait_until(lambda: sorted(self.node.left_behind()) == self.alone, "nothing but v to be left", 10)
        self.assertEqual(sorted(self.node.left_behind()), self.alone)
        self.assertTrue(trio.answers(self.node.target("v")))

    def crash_node(self, step: str) -> None:
        """Node, which is to crash at the step, is called, crashes, and comes back."""
        node = self.node
        node.restart("node", env=at(step))
        reply = node.publish("x", self.reference)
        if step.startswith("unpublish:"):
            self.assertTrue(reply.ok, reply)
            reply = node.unpublish("x")
        self.assertFalse(reply.ok, f"answered although it was to crash at {step}: {reply}")
        process.wait_until(lambda: not node.servers["node"].alive(), f"node to crash at {step}")
        self.assertEqual(node.servers["node"].process.returncode, KILLED)
        node.start("node")

    def test_node(self):
        with self.each(("node:prepared", "source:mounted", "source:served", "publish:recorded", "publish:bound")) as steps:
            for step in steps:
                with self.subTest(step, then="published again"):
                    self.crash_node(step)
                    self.publish_and_take_back()
                # The pod was deleted meanwhile.
                with self.subTest(step, then="unpublished"):
                    self.crash_node(step)
                    self.take_back()
                    self.publish_and_take_back()

    def test_node_in_unpublish(self):
        with self.each(("unpublish:detached", "unpublish:removed")) as steps:
            for step in steps:
                with self.subTest(step):
                    self.crash_node(step)
                    self.take_back()
                    self.publish_and_take_back()

    def publish_meanwhile(self, reached, mend) -> None:
        """Publishes while a part of the node crashes, which is mended then: the call succeeds, at once or repeated."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            publishing = pool.submit(self.node.publish, "x", self.reference)
            try:
                process.wait_until(reached, "the crash")
            finally:
                mend()
                reply = publishing.result()
        self.assertIn(reply.code, ("OK", "UNAVAILABLE", "ABORTED"), reply)
        self.publish_and_take_back()

    def test_serve_in_takeover(self):
        """It dies again and again while it takes over, each time at the step, until another program is there."""
        node = self.node
        with self.each(("serve:received", "serve:initialised")) as steps:
            for step in steps:
                with self.subTest(step):
                    node.kill("serve")
                    node.start("serve", env=at(step), wait=False)
                    seen = set()

                    def crashed_often():
                        seen.add(node.serving())
                        return len(seen - {None}) > 2

                    self.publish_meanwhile(crashed_often, lambda: node.restart("serve"))

    def test_serve_in_publish(self):
        """As before, with no mount to take over: it dies of the new one."""
        node = self.node
        node.must_unpublish("v")
        self.alone = self.left(node)
        self.assertEqual(self.alone, [])
        for step in ("serve:received", "serve:initialised"):
            with self.subTest(step):
                node.restart("serve", env=at(step))
                first = node.serving()

                def crashed():
                    return node.serving() not in (first, None)

                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    publishing = pool.submit(node.publish, "x", self.reference)
                    try:
                        process.wait_until(crashed, f"serve to crash at {step}")
                    finally:
                        node.restart("serve")
                        reply = publishing.result()
                self.assertIn(reply.code, ("OK", "UNAVAILABLE", "ABORTED"), reply)
                node.must_publish("x", self.reference)
                self.assert_tree(OTHER, node.target("x"))
                node.must_unpublish("x")
                self.assertEqual(self.left(node), [])

    def test_former_serve_in_hand_over(self):
        """It has sent its mounts, and dies before it is told to end."""
        node = self.node
        # More than once, because what the new one sees of that depends on the moment.
        with self.each(("handover:sent",) * 5) as steps:
            for number, step in enumerate(steps):
                with self.subTest(step, number=number):
                    node.restart("serve", env=at(step))
                    former, child = node.servers["serve"], node.serving()
                    node.servers["serve"] = node.launch("serve")
                    process.wait_until(lambda: process.dead(child), f"the former serve to crash at {step}")
                    # Either one may serve now: the former one's parent starts a child, too.
                    process.wait_until(lambda: node.answers("serve") and trio.answers(node.target("v")), "the mount to be served")
                    self.assertEqual(former.stop(), 0)
                    process.wait_until(lambda: node.serving() and node.answers("serve"), "the new serve to serve")
                    self.publish_and_take_back()

    def test_new_serve_in_hand_over(self):
        """It has taken the mounts and dies; the former one, still there, goes on."""
        node = self.node
        with self.each(("handover:resumed",)) as [step]:
            former = node.servers["serve"]
            log, said = node.log_of("serve"), "the process that serves was killed"
            before = log.read_text().count(said)
            new = node.launch("serve", env=at(step))
            # Not by looking for its child, which may have crashed and been replaced before that.
            process.wait_until(lambda: log.read_text().count(said) > before, f"the new serve to crash at {step}")
            trio.kill_whole(new)
            new.process.wait()
            process.wait_until(lambda: process.children_of(former.pid) and node.answers("serve"), "the former serve to serve again")
            self.assertTrue(trio.answers(node.target("v")))
            self.publish_and_take_back()

    def test_agent_in_publish(self):
        """It dies at random moments of a publish that has to fetch the image, and comes back at once."""
        node = self.node
        with self.each(("multi-member", "nasty", "plain", "zstd")) as names:
            for name in names:
                with self.subTest(name), concurrent.futures.ThreadPoolExecutor(1) as pool:
                    reference = self.env.push(name)
                    publishing = pool.submit(node.publish, "y", reference)
                    for _ in range(3):
                        time.sleep(self.dice.uniform(0, 0.2))
                        node.restart("agent")
                    reply = publishing.result()
                    self.assertTrue(reply.ok, reply)
                    self.assert_tree(name, node.target("y"))
                    node.must_unpublish("y")
                    self.publish_and_take_back()
