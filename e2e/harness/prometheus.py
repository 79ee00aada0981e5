"""A real Prometheus on loopback, with the chart's rules, that scrapes drivers and answers queries."""

import json
import pathlib
import urllib.error
import urllib.parse
import urllib.request

from . import paths, process

RULES = paths.REPO / "deploy/helm/clip-csi/files/rules"
# What the chart's PodMonitors set.
JOB, PREWARM_JOB = "clip-csi-node", "clip-csi-prewarm"


class Client:
    """Asks a Prometheus by its HTTP API."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def get(self, path: str, **parameters):
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise process.Failed(f"Prometheus, {path} {parameters}: {error.read().decode(errors='replace')}") from error
        if answer.get("warnings"):
            raise process.Failed(f"Prometheus warns of {path} {parameters}: {answer['warnings']}")
        return answer["data"]

    def query(self, expr: str, **parameters) -> list[dict]:
        """The samples of an instant query: [{"metric": {...}, "value": [time, "1"]}]."""
        data = self.get("query", query=expr, **parameters)
        return data["result"] if data["resultType"] == "vector" else [{"metric": {}, "value": data["result"]}]

    def query_range(self, expr: str, start: float, end: float, step: float) -> list[dict]:
        return self.get("query_range", query=expr, start=start, end=end, step=step)["result"]

    def targets_up(self) -> int:
        return sum(it["health"] == "up" for it in self.get("targets")["activeTargets"])


class Prometheus(Client):
    """The server. `targets` are the nodes' names and the addresses of their metrics; `controllers` those of controllers of pre-warming."""

    def __init__(self, work: pathlib.Path, targets: dict[str, str], *, controllers: dict[str, str] | None = None, scrape_interval="5s"):
        self.targets_file = work / "prometheus-targets.json"
        self.controllers = controllers or {}
        self.set_targets(targets)
        config = work / "prometheus.json"
        # JSON is YAML.
        config.write_text(json.dumps({
            "global": {"scrape_interval": scrape_interval, "evaluation_interval": scrape_interval},
            "rule_files": [str(RULES / "*.yaml")],
            "scrape_configs": [{"job_name": JOB, "file_sd_configs": [{"files": [str(self.targets_file)], "refresh_interval": "1s"}]}],
        }))
        port = process.free_port()
        super().__init__(f"http://127.0.0.1:{port}")
        self.server = process.Server(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={work / 'prometheus'}", f"--web.listen-address=127.0.0.1:{port}",
             "--storage.tsdb.retention.time=1d", "--log.level=warn"],
            stdout=work / "prometheus.log",
        )
        self.server.wait_ready(lambda: process.listens(port), "prometheus")

    def set_targets(self, targets: dict[str, str]) -> None:
        """Also later: Prometheus reads the file again when it changes."""
        entries = [{"targets": [address], "labels": {"job": job, "node": node, "instance": node}}
                   for job, of_job in ((JOB, targets), (PREWARM_JOB, self.controllers)) for node, address in of_job.items()]
        new = self.targets_file.with_suffix(".new")
        new.write_text(json.dumps(entries))
        new.rename(self.targets_file.with_suffix(".json"))

    def stop(self) -> None:
        self.server.stop()
