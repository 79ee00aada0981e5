"""Reads the chart's dashboard: its panels, their queries as Prometheus takes them, the metrics that they name."""

import dataclasses
import json
import pathlib
import re

from . import paths

FILE = paths.REPO / "deploy/helm/clip-csi/files/dashboard.json"
METRIC = re.compile(r"\bclip_csi_[a-z0-9_]+\b")
# What a histogram's name gets in Prometheus' text format.
HISTOGRAM_SUFFIX = re.compile(r"_(bucket|sum|count)$")


@dataclasses.dataclass
class Query:
    """One line or number of a panel."""

    expr: str
    legend: str
    instant: bool


@dataclasses.dataclass
class Panel:
    """A panel other than a row: what it is called, where it is, what it asks."""

    raw: dict
    queries: list[Query]

    @property
    def title(self) -> str:
        return self.raw["title"]

    @property
    def kind(self) -> str:
        return self.raw["type"]

    def default(self, name: str, otherwise=None):
        return self.raw["fieldConfig"]["defaults"].get(name, otherwise)


def load(file: pathlib.Path = FILE) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def rows(dashboard: dict) -> list[dict]:
    return [it for it in dashboard["panels"] if it["type"] == "row"]


def panels(dashboard: dict, *, node=".*", rate_interval="1m", range_seconds=3600) -> list[Panel]:
    """All panels, with Grafana's variables filled in as Grafana does."""
    variables = {"$node": node, "$__rate_interval": rate_interval, "$__range": f"{int(range_seconds)}s"}
    out = []
    for raw in dashboard["panels"]:
        queries = []
        for target in raw.get("targets", []):
            expr = target["expr"]
            for name, value in variables.items():
                expr = expr.replace(name, value)
            if "$" in expr:
                raise ValueError(f"panel {raw['title']!r}: a variable is unknown: {expr}")
            queries.append(Query(expr, target["legendFormat"], target.get("instant", False)))
        if raw["type"] != "row":
            out.append(Panel(raw, queries))
    return out


def metrics_of(expr: str) -> set[str]:
    """The driver's metrics that a query names; a histogram by its name without suffix."""
    return {HISTOGRAM_SUFFIX.sub("", name) if name.endswith(("_bucket", "_sum", "_count")) else name for name in METRIC.findall(expr)}


def legend(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match.group(1), ""), text)
