#!/usr/bin/env python3
"""Draws the chart's dashboard from the data of a real Prometheus, as docs/dashboard.svg shows it.

  dashboard_picture.py --url http://prometheus:9090 --minutes 60 --output FILE    from a Prometheus that is there
  dashboard_picture.py --output docs/dashboard.svg                                from one that it starts itself

The second way starts two workers, a registry, a Redis and a Prometheus on loopback, and lets the
workers do what nodes do for some minutes: a cold node, a node with a warm remote, readers that drop the page cache,
more images than the cache may hold, a remote that dies and comes back, names that the registry does not
have, a server that is upgraded and one that is killed, a driver that is killed as a whole under its volumes. Nothing is simulated; all
is taken down at the end.
"""

import argparse
import os
import pathlib
import random
import sys
import time

import images
from e2e_prewarm_agents import NAMESPACE, PREWARMS, TEAM, rendered
from harness import chart_svg, dashboard, driver, paths, process, prometheus, services, trio
from harness.api_server import ApiServer
from harness.process import Failed, say

POINTS = 150
SCRAPE_SECONDS = 5
RATE_INTERVAL = "30s"
MAX_CACHE_BYTES = 400 << 20


def render(client: prometheus.Client, start: float, end: float, *, node=".*", rate_interval=RATE_INTERVAL) -> tuple[str, list[str]]:
    """The picture, and the titles of panels without data."""
    source = dashboard.load()
    bottom = max(it["gridPos"]["y"] + it["gridPos"]["h"] for it in source["panels"])
    svg = chart_svg.Svg(24 * chart_svg.COLUMN, bottom * chart_svg.ROW + chart_svg.GAP)
    for row in dashboard.rows(source):
        chart_svg.draw_row(svg, row)
    empty = []
    for panel in dashboard.panels(source, node=node, rate_interval=rate_interval, range_seconds=end - start):
        if panel.kind == "stat":
            found = client.query(panel.queries[0].expr, time=end)
            value = float(found[0]["value"][1]) if found else None
            chart_svg.draw_stat(svg, panel.raw, value)
            if value is None:
                empty.append(panel.title)
            continue
        series = []
        for query in panel.queries:
            for it in client.query_range(query.expr, start, end, (end - start) / POINTS):
                series.append((dashboard.legend(query.legend, it["metric"]), [(float(t), float(v)) for t, v in it["values"]]))
        chart_svg.draw_lines(svg, panel.raw, series, start, end)
        if not series:
            empty.append(panel.title)
    return svg.end(), empty


class Traffic:
    """Two workers and what pods do on them, and a controller that has images warmed there."""

    def __init__(self, work: pathlib.Path):
        self.work, self.dice, self.ends = work, random.Random(7), []

    def __enter__(self):
        try:
            self.registry = services.Registry(self.work, self.work / "registry")
            self.ends.append(self.registry.stop)
            self.redis = services.Redis(self.work)
            # The one that is there at the end.
            self.ends.append(lambda: self.redis.stop())
            say("pushing the images")
            self.references = {name: images.get(name).push(self.registry.host) for name in ("demo5", "demo1", "debian-python", "nasty", "small", "zstd")}
            # Room for the layers of one large image and some small ones, not for all: the others are evicted.
            config = driver.write_config(self.work / "config.toml", plain_http=[self.registry.host], redis=self.redis, key_file=self.work / "key",
                                         cache={"max_bytes": MAX_CACHE_BYTES})
            os.chown(self.work / "key", process.UNPRIVILEGED, process.UNPRIVILEGED)
            self.start_api()
            self.binary = paths.install(self.work / "bin")
            self.workers = {}
            for name in ("n1", "n2"):
                self.api.node(name)
                kubeconfig = self.api.kubeconfig_of(name, self.api.token(NAMESPACE, "clip-csi-node", name))
                warming = ["--node-id", name, "--prewarm", "--kubeconfig", kubeconfig]
                self.workers[name] = trio.Trio(self.work / name, config, self.binary, options={"agent": warming})
                self.ends.append(self.workers[name].end)
            controller = self.start_controller(config)
            self.prometheus = prometheus.Prometheus(self.work, self.addresses(), controllers={"n1": controller}, scrape_interval=f"{SCRAPE_SECONDS}s")
            self.ends.append(self.prometheus.stop)
            return self
        except BaseException:
            self.__exit__()
            raise

    def start_api(self) -> None:
        self.api = ApiServer(self.work)
        self.ends.append(self.api.stop)
        for namespace in (NAMESPACE, TEAM):
            self.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        self.api.apply(*rendered(discovery=False))

    def start_controller(self, config: pathlib.Path) -> str:
        """Where its metrics are."""
        address = f"127.0.0.1:{process.free_port()}"
        kubeconfig = self.api.kubeconfig_of("prewarm", self.api.token(NAMESPACE, "clip-csi-prewarm"))
        controller = process.Server(
            [self.binary, "prewarm-controller", "--lease-namespace", NAMESPACE, "--identity", "c1", "--config", config, "--cache-dir", self.work / "controller",
             "--kubeconfig", kubeconfig, "--metrics-addr", address], stdout=self.work / "controller.log")
        self.ends.append(controller.kill)
        controller.wait_ready(lambda: process.listens(int(address.rpartition(":")[2])), "the controller")
        return address

    def prewarm(self, name: str, *references: str, **spec) -> None:
        spec = {"images": [{"image": it} for it in references], "parallelism": "100%", **spec}
        self.api.do("POST", PREWARMS, {"apiVersion": "clip-csi.dev/v1alpha1", "kind": "ImagePrewarm", "metadata": {"name": name}, "spec": spec})

    def __exit__(self, *_):
        while self.ends:
            self.ends.pop()()

    def addresses(self) -> dict[str, str]:
        return {name: f"127.0.0.1:{worker.metrics_port}" for name, worker in self.workers.items()}

    def publish(self, node: str, volume: str, image: str) -> None:
        self.workers[node].must_publish(volume, self.references[image])

    def read_for(self, seconds: float, *volumes: tuple[str, str], pause=0.02) -> None:
        """Readers that take files in no order, a few from the page cache and most not."""
        files = {}
        for node, volume in volumes:
            root = self.workers[node].target(volume)
            found = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
            files[node, volume] = sorted(found)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            path = self.dice.choice(files[self.dice.choice(volumes)])
            with open(path, "rb", buffering=0) as file:
                if self.dice.random() < 0.9:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.read(1 << 20)
            time.sleep(pause)

    def play(self) -> None:
        say("n1: a cold node")
        self.publish("n1", "a", "demo5")
        self.read_for(40, ("n1", "a"))
        say("n2: a cold node, a warm remote")
        self.publish("n2", "a", "demo5")
        self.publish("n2", "a-shared", "demo5")
        self.publish("n2", "b", "small")
        self.read_for(40, ("n1", "a"), ("n2", "a"), ("n2", "b"))
        say("both: images are warmed before pods want them, one node after the other; one of them does not exist")
        self.prewarm("first", self.references["demo1"], parallelism=1, bytesPerSecondPerNode=2_000_000)
        self.read_for(45, ("n1", "a"), ("n2", "a"), ("n2", "b"))
        self.prewarm("second", self.references["zstd"])
        self.prewarm("missing", f"{self.registry.host}/e2e/missing:1", backoffLimit=0)
        self.read_for(20, ("n1", "a"), ("n2", "a"), ("n2", "b"))
        say("both: more images than the cache may hold")
        for node in self.workers:
            self.workers[node].must_unpublish("a")
            if node == "n2":
                self.workers[node].must_unpublish("a-shared")
            for image in ("debian-python", "zstd", "nasty", "demo1"):
                self.publish(node, image, image)
                self.read_for(8, (node, image))
            for image in ("debian-python", "zstd"):
                self.workers[node].must_unpublish(image)
        say("n1: names that the registry does not have")
        for number in range(4):
            reply = self.workers["n1"].publish(f"missing-{number}", f"{self.registry.host}/e2e/missing:{number}")
            if reply.code != "NOT_FOUND":
                raise Failed(f"an image that is not there: {reply}")
            # Some scrapes apart, because a counter's first value is no increase.
            self.read_for(6, ("n1", "demo1"), ("n2", "demo1"))
        say("the remote dies, and comes back")
        self.redis.kill()
        for node in self.workers:
            self.publish(node, "again", "demo5")
        self.read_for(45, ("n1", "again"), ("n2", "again"))
        self.redis = services.Redis(self.work, port=self.redis.port)
        self.read_for(45, ("n1", "again"), ("n2", "again"))
        say("n1: the server is upgraded; n2: it is killed")
        former = self.workers["n1"].hand_over()
        former.stop()
        self.read_for(15, ("n1", "again"), ("n2", "again"))
        self.workers["n2"].kill_child()
        self.read_for(15, ("n1", "again"), ("n2", "again"))
        say("n2: all of the driver is killed, and starts again")
        self.workers["n2"].kill()
        time.sleep(10)
        self.workers["n2"].start()
        self.prometheus.set_targets(self.addresses())
        self.read_for(40, ("n1", "again"))
        for volume in ("again", "b", "nasty", "demo1"):
            self.workers["n2"].must_unpublish(volume)
        self.publish("n2", "anew", "demo5")
        self.read_for(40, ("n1", "again"), ("n2", "anew"))


def own_prometheus() -> tuple[str, list[str]]:
    with process.workspace("dashboard") as work, Traffic(work) as traffic:
        start = time.time()
        traffic.play()
        time.sleep(2 * SCRAPE_SECONDS)
        svg, empty = render(traffic.prometheus, start, time.time())
    return svg, empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="FILE", help="the SVG to write")
    parser.add_argument("--url", help="a Prometheus that is there")
    parser.add_argument("--minutes", type=float, default=60, help="how far back, with --url")
    args = parser.parse_args()
    try:
        if args.url:
            now = time.time()
            svg, empty = render(prometheus.Client(args.url), now - args.minutes * 60, now, rate_interval="4m")
        else:
            if os.geteuid() != 0:
                sys.exit("dashboard_picture.py: run as root: mounting needs it")
            svg, empty = own_prometheus()
    except Failed as error:
        sys.exit(f"dashboard_picture.py: {error}")
    args.output.write_text(svg, encoding="utf-8")
    say(f"{args.output}: {len(svg.encode())} bytes")
    if empty:
        sys.exit(f"dashboard_picture.py: panels without data: {', '.join(empty)}")


if __name__ == "__main__":
    main()
