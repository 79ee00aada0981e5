"""A real Prometheus on the control plane's machine that does what the chart's objects for Prometheus' operator say.

There is no operator here: what it would make of a PodMonitor and a PrometheusRule is made by the few lines below.
Debian's Prometheus cannot ask Kubernetes for pods, so they are written into a file, with the labels they would have.
"""

import json
import pathlib
import re

from harness.prometheus import Client

from .cluster import Cluster

PORT = 9090
SCRAPE_INTERVAL = "2s"


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])[A-Z]", lambda match: "_" + match.group().lower(), name)


def label(name: str) -> str:
    return re.sub("[^a-zA-Z0-9_]", "_", name)


def targets(pods: list[dict]) -> list[dict]:
    """Each port of each pod, as Prometheus' discovery of Kubernetes has it."""
    return [
        {"targets": [f"{pod['status']['podIP']}:{port['containerPort']}"], "labels": {
            "__meta_kubernetes_namespace": pod["metadata"]["namespace"],
            "__meta_kubernetes_pod_name": pod["metadata"]["name"],
            "__meta_kubernetes_pod_node_name": pod["spec"]["nodeName"],
            "__meta_kubernetes_pod_container_name": container["name"],
            "__meta_kubernetes_pod_container_port_name": port.get("name", ""),
            **{f"__meta_kubernetes_pod_label_{label(key)}": value for key, value in pod["metadata"]["labels"].items()},
        }}
        for pod in pods if pod["status"].get("podIP") for container in pod["spec"]["containers"] for port in container.get("ports", [])
    ]


def scrape_configs(monitor: dict, file: pathlib.Path) -> list[dict]:
    """As the operator's documentation has it: the pods of the namespaces with the labels, each at the named port."""
    spec = monitor["spec"]
    out = []
    for endpoint in spec["podMetricsEndpoints"]:
        labels = [{"action": "keep", "source_labels": [f"__meta_kubernetes_pod_label_{label(key)}"], "regex": re.escape(value)}
                  for key, value in spec["selector"]["matchLabels"].items()]
        namespaces = {"action": "keep", "source_labels": ["__meta_kubernetes_namespace"], "regex": "|".join(map(re.escape, spec["namespaceSelector"]["matchNames"]))}
        port = {"action": "keep", "source_labels": ["__meta_kubernetes_pod_container_port_name"], "regex": endpoint["port"]}
        relabelings = [{snake(key): value for key, value in it.items()} for it in endpoint.get("relabelings", [])]
        out.append({
            "job_name": f"podMonitor/{monitor['metadata']['namespace']}/{monitor['metadata']['name']}",
            "scrape_interval": SCRAPE_INTERVAL,
            "metrics_path": endpoint.get("path", "/metrics"),
            "file_sd_configs": [{"files": [str(file)], "refresh_interval": "1s"}],
            "relabel_configs": [namespaces, *labels, port, *relabelings],
        })
    return out


class Prometheus(Client):
    def __init__(self, cluster: Cluster, work: pathlib.Path, monitors: list[dict], rules: list[dict]):
        self.cluster, self.machine = cluster, cluster.plane.machine
        self.targets_file = work / "targets.json"
        self.discover()
        super().__init__(f"http://{self.machine.address}:{PORT}")
        # JSON is YAML.
        rule_file, config = work / "rules.json", work / "prometheus.json"
        rule_file.write_text(json.dumps({"groups": [group for it in rules for group in it["spec"]["groups"]]}))
        config.write_text(json.dumps({
            "global": {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL},
            "rule_files": [str(rule_file)],
            "scrape_configs": [it for monitor in monitors for it in scrape_configs(monitor, self.targets_file)],
        }))
        self.server = self.machine.server(
            ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={work / 'prometheus'}", f"--web.listen-address={self.machine.address}:{PORT}", "--log.level=warn"],
            stdout=work / "prometheus.log",
        )
        self.server.wait_ready(lambda: self.machine.listens(PORT), "prometheus")

    def discover(self) -> None:
        """Looks for pods, as Prometheus would all the time."""
        new = self.targets_file.with_suffix(".new")
        new.write_text(json.dumps(targets(self.cluster.get("api/v1/pods")["items"])))
        new.rename(self.targets_file)

    def get(self, path: str, **parameters):
        with self.machine.network():
            return super().get(path, **parameters)

    def stop(self) -> None:
        self.server.stop()
