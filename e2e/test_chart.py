#!/usr/bin/env python3
"""Tests the Helm chart and its monitoring without a cluster: rendering, schema, rules, dashboard, documents.

Needs Helm ($HELM, PATH, or the tests' own, which is built if the cache has none) and promtool; a test without promtool says so and is skipped.
"""

import functools
import hashlib
import http.server
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import tomllib
import unittest

import yaml

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cluster.containers import tools
from harness import dashboard, paths

CHART = paths.REPO / "deploy/helm/clip-csi"
RULES, RULE_TESTS = CHART / "files/rules", CHART / "files/tests"
DOCS = paths.REPO / "docs"
MONITORING = "monitoring.coreos.com/v1"
OLDEST, NEWEST = "1.26.0", "1.36.0"

sys.path.insert(0, str(CHART.parent))
import values_doc

# The least that an installation says.
IMAGE = {"image": {"registry": "registry.example:5000"}}

# One value for everything that is off or empty by default.
EVERYTHING = {
    "image": {"registry": "registry.example:5000", "digest": f"sha256:{'0' * 64}"},
    "imagePullSecrets": [{"name": "pull"}],
    "commonLabels": {"team": "storage"},
    "csiDriver": {"annotations": {"a": "b"}, "preventPodSchedulingIfMissing": True, "requiresRepublish": True,
                  "tokenRequests": [{"audience": "sts.example", "expirationSeconds": 3600}, {"audience": ""}]},
    "node": {
        "kubeletPath": "/data/kubelet", "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}], "nodeSelector": {"disk": "nvme"},
        "affinity": {"nodeAffinity": {}}, "priorityClass": {"create": True}, "hostNetwork": True, "dnsConfig": {"nameservers": ["10.0.0.10"]},
        "runPath": "/run/images", "selinux": {"options": {"type": "spc_t"}}, "annotations": {"a": "b"}, "podAnnotations": {"a": "b"}, "podLabels": {"a": "b"},
        "publishWaitSeconds": 60, "drainSeconds": 1, "serverDeadlineSeconds": 30, "idleSourceSeconds": 0, "maxWritableBytes": 1 << 30, "maxVolumes": 200,
        "publishesPerSecond": 5, "kernelMounts": "never",
        "serviceAccount": {"annotations": {"a": "b"}}, "startupTaint": {"enabled": True},
    },
    "agent": {"env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}], "envFrom": [{"configMapRef": {"name": "e"}}]},
    "cache": {"hostPath": "/data/cache", "maxBytes": 200 << 30, "highWatermarkPercent": 85, "lowWatermarkPercent": 70, "minFreeBytes": 1 << 30, "minFreeInodes": 5000,
              "maxLayerBytes": 1 << 40, "maxLayerEntries": 1000, "maxLayerIndexBytes": 1 << 20, "maxIndexNodes": 1000, "maxDecompressions": 2,
              "stallTimeoutSeconds": 30, "prefetch": "all"},
    "remote": {"kind": "redis", "url": "redis://reader@redis.cache:6379/1", "existingSecret": {"name": "remote", "passwordKey": "password"},
               "chunkTtlSeconds": 0, "connectTimeoutMs": 100, "requestTimeoutMs": 200, "maxIndexBytes": 1 << 20, "uploadQueueLayers": 4, "uploadAttempts": 2,
               "leaseWaitSeconds": 30},
    "registries": {
        "hosts": {"docker.io": {"mirrors": ["mirror.example:5000", "second.example"], "alwaysAskOrigin": True}, "mirror.example:5000": {"plainHttp": True},
                  "private.example": {"caBundle": {"configMap": "private-ca", "key": "root.pem"}}, "other.example": {"caBundle": {"configMap": "private-ca"}}},
        "hostsDir": "/etc/containerd/certs.d", "allowSkipVerify": True, "credentialProviders": {"configFile": "/etc/providers.yaml", "binDir": "/opt/providers"},
        "serviceAccountPullSecrets": {"enabled": True, "namespaces": ["team-a", "team-b"]},
        "existingSecret": "pull", "connectTimeoutSeconds": 5, "readTimeoutSeconds": 6, "retries": 2, "maxBackoffSeconds": 3, "maxWaitSeconds": 60,
        "maxManifestBytes": 1 << 20, "maxLayers": 10, "usePushedIndexes": False, "trustPinnedIndexes": True,
        "trustPullPolicyNever": True, "insecureHosts": ["old.example:5000"],
    },
    "controller": {"enabled": True, "replicas": 3, "priorityClassName": "important", "tolerations": [{"key": "gpu", "operator": "Exists"}], "nodeSelector": {"disk": "nvme"},
                   "affinity": {"nodeAffinity": {}}, "annotations": {"a": "b"}, "podAnnotations": {"a": "b"}, "podLabels": {"a": "b"},
                   "serviceAccount": {"annotations": {"a": "b"}}},
    "storageClasses": [{"name": "models", "parameters": {"image": "registry.example:5000/app:1", "csi.storage.k8s.io/node-publish-secret-name": "pull",
                                                          "csi.storage.k8s.io/node-publish-secret-namespace": "default"}, "reclaimPolicy": "Retain",
                        "labels": {"a": "b"}, "annotations": {"a": "b"}}],
    "fuse": {"annotations": {"a": "b"}, "podAnnotations": {"a": "b"}, "podLabels": {"a": "b"}, "threadsPerMount": 2, "readThreads": 4, "readAheadKib": 512},
    "metrics": {"podMonitor": {"forceEnable": True, "labels": {"release": "p"}, "interval": "15s", "scrapeTimeout": "5s", "relabelings": [{"targetLabel": "x", "replacement": "y"}],
                               "metricRelabelings": [{"action": "labeldrop", "regex": "z"}]},
                "prometheusRule": {"forceEnable": True, "labels": {"release": "p"}, "runbookUrl": "https://wiki.example/runbook", "disabledAlerts": ["ClipCsiHitRatioLow"],
                                   "alertLabels": {"team": "storage"}, "additionalGroups": [{"name": "own", "rules": [{"record": "a", "expr": "1"}]}]},
                "grafanaDashboard": {"enabled": True, "namespace": "grafana", "annotations": {"grafana_folder": "Storage"}}},
    "prewarm": {"enabled": True, "replicas": 3, "pullSecrets": {"namespaces": ["team-a"]}, "discovery": {"enabled": True}, "parallelImages": 4, "bytesPerSecond": 1 << 20,
                "node": {"parallelImages": 3, "bytesPerSecond": 1 << 21, "evictUnusedForSeconds": 0}, "cache": {"sizeLimit": "50Gi"},
                "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}], "envFrom": [{"configMapRef": {"name": "e"}}], "priorityClassName": "important",
                "tolerations": [{"key": "gpu", "operator": "Exists"}], "nodeSelector": {"disk": "nvme"}, "affinity": {"nodeAffinity": {}}, "annotations": {"a": "b"},
                "podAnnotations": {"a": "b"}, "podLabels": {"a": "b"}, "serviceAccount": {"annotations": {"a": "b"}}},
    "networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {}}], "egress": [{"ports": [{"port": 443}]}]},
    "test": {"volumeImage": "registry.example:5000/app:1", "path": "etc/motd", "sha256": "0" * 64, "pullSecret": "pull"},
}

COMBINATIONS = {
    "least": {},
    "everything": EVERYTHING,
    "self-registration": {"registration": {"mode": "self"}},
    "remote directory": {"remote": {"kind": "dir", "path": "/mnt/shared"}},
    "remote bucket": {"remote": {"kind": "s3", "s3": {"bucket": "layers"}}},
    "redis without secrets": {"remote": {"kind": "redis", "url": "redis://r"}},
    "redis cluster": {"remote": {"kind": "redis", "url": "redis-cluster://reader@r-0.cache:6379,r-1.cache"}},
    "no metrics": {"metrics": {"enabled": False}, "networkPolicy": {"enabled": True}},
    "no Kubernetes API": {"agent": {"events": {"enabled": False}}},
    "no objects of its own": {"csiDriver": {"create": False}, "node": {"serviceAccount": {"create": False, "name": "given"}}, "test": {"enabled": False}},
    "controller": {"controller": {"enabled": True}},
    "controller of somebody": {"controller": {"enabled": True, "serviceAccount": {"create": False, "name": "given"}}},
    "prewarm": {"prewarm": {"enabled": True}},
    "prewarm from a directory": {"prewarm": {"enabled": True, "crds": {"install": False}}, "remote": {"kind": "dir", "path": "/mnt/shared"}},
    "prewarm of somebody": {"prewarm": {"enabled": True, "serviceAccount": {"create": False, "name": "given"}}},
    "on delete": {"node": {"updateStrategy": {"type": "OnDelete"}}, "fuse": {"updateStrategy": {"type": "OnDelete"}}},
    "no surge": {"fuse": {"updateStrategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}}},
    "other names": {"fullnameOverride": "images", "namespaceOverride": "storage", "csiDriver": {"name": "images.example.org"}},
}

# What somebody may write by mistake, and a word of the answer.
MISTAKES = [
    ({"cache": {"prefetch": "everything"}}, "prefetch"),
    ({"node": {"kernelMounts": "always"}}, "kernelMounts"),
    ({"remote": {"kind": "memcached"}}, "kind"),
    ({"remote": {"kind": "redis"}}, "url"),
    ({"remote": {"kind": "dir"}}, "path"),
    ({"remote": {"kind": "s3"}}, "bucket"),
    ({"remote": {"kind": "s3", "s3": {"bucket": "layers", "endpoint": "https://id:secret@s3"}}}, "endpoint"),
    ({"remote": {"kind": "s3", "s3": {"bucket": "layers"}, "existingSecret": {"name": "s", "accessKeyIdKey": "id"}}}, "secretAccessKeyKey"),
    ({"remote": {"kind": "redis", "url": "redis://:secret@redis/0"}}, "url"),
    ({"remote": {"kind": "redis", "url": "http://redis"}}, "url"),
    ({"remote": {"kind": "redis", "url": "redis://r-0,r-1"}}, "url"),
    ({"remote": {"kind": "redis", "url": "redis-cluster://r-0,r-1/1"}}, "url"),
    ({"node": {"kubeletPath": "var/lib/kubelet"}}, "kubeletPath"),
    ({"node": {"kubeletPath": "/var/lib/kubelet/"}}, "kubeletPath"),
    ({"node": {"tolerations": {"key": "gpu"}}}, "tolerations"),
    ({"node": {"tolerations": [{"effects": "NoSchedule"}]}}, "effects"),
    ({"node": {"updateStrategy": {"type": "Rolling"}}}, "type"),
    ({"fuse": {"updateStrategy": {"rollingUpdate": {"surge": 1}}}}, "surge"),
    ({"node": {"runPath": "run"}}, "runPath"),
    ({"node": {"env": []}}, "env"),
    ({"node": {"serverDeadlineSeconds": 0}}, "serverDeadlineSeconds"),
    ({"log": {"level": "very much"}}, "level"),
    ({"node": {"resources": {"limit": {"memory": "1Gi"}}}}, "limit"),
    ({"node": {"podLabels": {"a": True}}}, "podLabels"),
    ({"cache": {"maxBytes": "100Gi"}}, "maxBytes"),
    ({"cache": {"highWatermarkPercent": 101}}, "highWatermarkPercent"),
    ({"cache": {"hostPath": "/cache, type: File}"}}, "hostPath"),
    ({"image": {"digest": "sha256:12"}}, "digest"),
    ({"image": {"registry": "https://registry.example"}}, "registry"),
    ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ({"registries": {"hosts": {"https://registry.example": {}}}}, "https://registry.example"),
    ({"registries": {"hosts": {"registry.example": {"insecure": True}}}}, "insecure"),
    ({"registries": {"hosts": {"registry.example": {"caBundle": {"key": "ca.crt"}}}}}, "configMap"),
    ({"metrics": {"port": 0}}, "port"),
    ({"metrics": {"prometheusRule": {"disabledAlerts": "ClipCsiAgentDown"}}}, "disabledAlerts"),
    ({"csiDriver": {"name": "csi.example.v2"}}, "name"),
    ({"csiDriver": {"requiresRepublish": True}}, "set csiDriver.tokenRequests"),
    ({"csiDriver": {"tokenRequests": [{"audience": "a", "expirationSeconds": 60}]}}, "expirationSeconds"),
    ({"registries": {"hostsDir": "certs.d"}}, "hostsDir"),
    ({"registries": {"credentialProviders": {"configFile": "/c.yaml"}}}, "credentialProviders.binDir is not set"),
    ({"registries": {"credentialProviders": {"binDir": "/bin"}}}, "credentialProviders.configFile is not set"),
    ({"registries": {"serviceAccountPullSecrets": {"enabled": True, "namespaces": ["Team"]}}}, "namespaces"),
    ({"registration": {"mode": "both"}}, "mode"),
    ({"registries": {"insecureHosts": ["http://old.example"]}}, "insecureHosts"),
    ({"node": {"maxWritableBytes": "1Gi"}}, "maxWritableBytes"),
    ({"controller": {"replicas": 0}}, "replicas"),
    ({"prewarm": {"replicas": 0}}, "replicas"),
    ({"prewarm": {"discovery": {"enabled": "yes"}}}, "enabled"),
    ({"prewarm": {"cache": {"sizeLimit": "lots"}}}, "sizeLimit"),
    ({"prewarm": {"pullSecrets": {"namespaces": ["Team"]}}}, "namespaces"),
    ({"prewarm": {"node": {"parallelImages": 0}}}, "parallelImages"),
    ({"storageClasses": [{"name": "models", "parameters": {"images": "a"}}]}, "images"),
    ({"storageClasses": [{"name": "models", "parameters": {"image": "a", "writable": "true"}}]}, "writable"),
    ({"storageClasses": [{"name": "models", "parameters": {}}]}, "image"),
    ({"storageClasses": [{"name": "models"}]}, "parameters"),
    # Not the schema's, but the templates' own.
    ({"storageClasses": [{"name": "models", "parameters": {"image": "a"}}]}, "controller.enabled is not"),
    ({"image": {"registry": ""}}, "image.registry is not set"),
    ({"test": {"volumeImage": "registry.example/app:1"}}, "test.sha256 is not set"),
]


@functools.cache
def helm() -> str:
    """Helm: $HELM, the one in PATH, or the tests' own."""
    return os.environ.get("HELM") or shutil.which("helm") or str(tools() / "helm")


def merged(*layers: dict) -> dict:
    out: dict = {}
    for layer in layers:
        for key, value in layer.items():
            out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def run_helm(*words, values: dict | None = None) -> subprocess.CompletedProcess:
    """Helm with values of their own, and without anybody's configuration or cluster."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [helm(), *words]
        if values is not None:
            file = pathlib.Path(scratch, "values.json")
            file.write_text(json.dumps(values))
            command += ["--values", str(file)]
        env = {"PATH": os.environ["PATH"], "HOME": scratch, "KUBECONFIG": "/dev/null"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def template(values: dict, *words, kube_version=NEWEST) -> subprocess.CompletedProcess:
    return run_helm("template", "clip-csi", str(CHART), "--namespace", "clip-csi", "--kube-version", kube_version, *words, values=merged(IMAGE, values))


def documents(text: str):
    """The YAML documents of a text. By libyaml where it is there: in Python alone this takes four times as long as Helm."""
    return yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def document(text: str):
    [it] = documents(text)
    return it


def promtool(*words, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False, cwd=cwd)


def alerts() -> dict[str, dict]:
    groups = document((RULES / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def documented_metrics() -> set[str]:
    return set(re.findall(r"^\| `(clip_csi_[a-z0-9_]+)`", (DOCS / "METRICS.md").read_text(), re.M))


def containers(objects: list[dict]):
    """Every container of the objects, with the pod's specification that it is in; those that run to an end first."""
    for it in objects:
        spec = it["spec"] if it["kind"] == "Pod" else it.get("spec", {}).get("template", {}).get("spec") if it["kind"] in ("DaemonSet", "Deployment") else None
        for container in [*(spec or {}).get("initContainers", []), *(spec or {}).get("containers", [])]:
            yield spec, container


def container_of(objects: list[dict], name: str) -> tuple[dict, dict]:
    return next((spec, it) for spec, it in containers(objects) if it["name"] == name)


def daemon_set(objects: list[dict], component: str) -> dict:
    return next(it for it in objects if it["kind"] == "DaemonSet" and it["metadata"]["name"].endswith(f"-{component}"))


def mounted(container: dict) -> dict[str, dict]:
    return {mount["name"]: mount for mount in container.get("volumeMounts", [])}


class Charted(unittest.TestCase):
    maxDiff = None

    def objects(self, values: dict, *words, kube_version=NEWEST) -> list[dict]:
        done = template(values, *words, kube_version=kube_version)
        self.assertEqual(done.returncode, 0, done.stderr)
        return [it for it in documents(done.stdout) if it]

    def only(self, objects: list[dict], kind: str) -> dict:
        found = [it for it in objects if it["kind"] == kind]
        self.assertEqual(len(found), 1, f"{kind}: {[it['metadata']['name'] for it in found]}")
        return found[0]


class Rendering(Charted):
    def test_lint_is_clean(self):
        for values in (IMAGE, EVERYTHING):
            done = run_helm("lint", "--strict", str(CHART), values=values)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            self.assertNotRegex(done.stdout, r"\[(WARNING|ERROR)\]")

    def test_every_combination_renders_for_old_and_new_clusters(self):
        for (name, values), version in itertools.product(COMBINATIONS.items(), (OLDEST, NEWEST)):
            with self.subTest(name, kube_version=version):
                if version == OLDEST and values.get("prewarm"):
                    self.assertIn("prewarm.enabled needs Kubernetes 1.30", template(values, kube_version=version).stderr)
                    values = merged(values, {"prewarm": {"enabled": False}})
                objects = self.objects(values, kube_version=version)
                names = [(it["apiVersion"], it["kind"], it["metadata"].get("namespace"), it["metadata"]["name"]) for it in objects]
                self.assertEqual(len(names), len(set(names)), names)
                for it in objects:
                    self.assertEqual(it["metadata"]["labels"]["app.kubernetes.io/instance"], "clip-csi", it["metadata"])
                for spec, container in containers(objects):
                    volumes = {volume["name"] for volume in spec["volumes"]}
                    self.assertLessEqual({mount["name"] for mount in container.get("volumeMounts", [])}, volumes)
                    targets = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
                    self.assertEqual(len(targets), len(set(targets)), targets)
                    ports = {port["name"] for port in container.get("ports", [])}
                    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                        port = container.get(probe, {}).get("httpGet", {}).get("port", 1)
                        self.assertTrue(isinstance(port, int) or port in ports, f"{probe} of {container['name']}: no port {port}")

    def test_no_volume_is_left_unused(self):
        for name, values in COMBINATIONS.items():
            for it in self.objects(values):
                if it["kind"] in ("DaemonSet", "Deployment"):
                    spec = it["spec"]["template"]["spec"]
                    used = {mount["name"] for container in [*spec.get("initContainers", []), *spec["containers"]] for mount in container["volumeMounts"]}
                    self.assertEqual({volume["name"] for volume in spec["volumes"]}, used, name)

    def test_fields_of_newer_clusters_are_gated(self):
        for version, wanted in (("1.26.0", set()), ("1.27.0", {"seLinuxMount"}), ("1.35.0", {"seLinuxMount", "preventPodSchedulingIfMissing"})):
            spec = self.only(self.objects({"csiDriver": {"preventPodSchedulingIfMissing": True}}, kube_version=version), "CSIDriver")["spec"]
            self.assertEqual(wanted, set(spec) & {"seLinuxMount", "preventPodSchedulingIfMissing"}, version)
        self.assertNotEqual(template({}, kube_version="1.25.0").returncode, 0, "kubeVersion of Chart.yaml is not enforced")

    def test_monitoring_is_gated_on_its_api(self):
        kinds = lambda values, *words: {it["kind"] for it in self.objects(values, *words)} & {"PodMonitor", "PrometheusRule"}
        self.assertEqual(kinds({}), set())
        self.assertEqual(kinds({}, "--api-versions", MONITORING), {"PodMonitor", "PrometheusRule"})
        self.assertEqual(kinds({"metrics": {"podMonitor": {"forceEnable": True}}}), {"PodMonitor"})
        self.assertEqual(kinds({"metrics": {"prometheusRule": {"forceEnable": True}}}), {"PrometheusRule"})
        self.assertEqual(kinds({"metrics": {"enabled": False}}, "--api-versions", MONITORING), set())

    def test_registration_by_the_sidecar_or_by_the_driver(self):
        names = lambda values: [it["name"] for it in daemon_set(self.objects(values), "node")["spec"]["template"]["spec"]["containers"]]
        self.assertEqual(names({}), ["node", "agent", "node-driver-registrar", "livenessprobe"])
        self.assertEqual(names({"registration": {"mode": "self"}}), ["node", "agent", "livenessprobe"])

    def test_one_path_is_true_for_kubelet_and_driver(self):
        objects = self.objects({"node": {"kubeletPath": "/data/kubelet"}})
        self.assertIn("--endpoint=unix:///data/kubelet/plugins/csi.clip-csi.dev/csi.sock", container_of(objects, "node")[1]["args"])
        self.assertIn("--kubelet-registration-path=/data/kubelet/plugins/csi.clip-csi.dev/csi.sock", container_of(objects, "node-driver-registrar")[1]["args"])
        for spec, container in containers(objects):
            host = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
            for name, mount in mounted(container).items():
                if name in host:
                    self.assertEqual(host[name], mount["mountPath"])

    def test_the_roles_meet_in_one_directory_of_the_driver(self):
        for driver in ("csi.clip-csi.dev", "images.example.org"):
            objects = self.objects({"csiDriver": {"name": driver}, "node": {"runPath": "/run/images"}})
            for role in ("node", "agent", "serve"):
                spec, container = container_of(objects, role)
                self.assertIn(f"--run-dir=/run/images/{driver}", container["args"])
                self.assertEqual(mounted(container)["run"]["mountPath"], f"/run/images/{driver}")
                self.assertIn({"path": f"/run/images/{driver}", "type": "DirectoryOrCreate"}, [it.get("hostPath") for it in spec["volumes"]])
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                command = container_of(objects, "serve")[1][probe]["exec"]["command"]
                self.assertEqual(command, ["/usr/local/bin/clip-csi", "status", "--run-dir", f"/run/images/{driver}", "serve"])
            self.assertEqual(container_of(objects, "own")[1]["args"], ["own", "--uid=65532", "--gid=65532", f"/run/images/{driver}", "/var/lib/clip-csi/cache"])

    def test_both_daemon_sets_run_on_the_same_nodes(self):
        for values in ({}, EVERYTHING):
            objects = self.objects(values)
            node, fuse = (daemon_set(objects, it)["spec"]["template"]["spec"] for it in ("node", "fuse"))
            for field in ("nodeSelector", "affinity", "tolerations", "priorityClassName"):
                self.assertEqual(node.get(field), fuse.get(field), field)

    def test_an_upgrade_hands_over(self):
        objects = self.objects({})
        self.assertEqual(daemon_set(objects, "fuse")["spec"]["updateStrategy"], {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}})
        self.assertEqual(daemon_set(objects, "node")["spec"]["updateStrategy"], {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "10%"}})
        # Both pods of a node are there for a while: nothing may belong to one alone.
        pod = daemon_set(objects, "fuse")["spec"]["template"]["spec"]
        self.assertNotIn("hostNetwork", pod)
        self.assertFalse([it for container in pod["containers"] for it in container.get("ports", [])])

    def test_a_change_of_the_configuration_changes_the_pods_that_read_it(self):
        def annotations(values: dict) -> list[str]:
            objects = self.objects(values)
            return [daemon_set(objects, it)["spec"]["template"]["metadata"]["annotations"]["checksum/config"] for it in ("node", "fuse")]
        node, fuse = annotations({})
        self.assertNotEqual(annotations({"cache": {"minFreeBytes": 1}})[0], node)
        self.assertEqual(annotations({"cache": {"minFreeBytes": 1}})[1], fuse, "what the agent alone reads pauses no reader")
        changed = annotations({"fuse": {"readThreads": 1}})
        self.assertNotIn(node, changed)
        self.assertNotIn(fuse, changed)

    def test_notes_say_what_an_upgrade_does(self):
        notes = lambda values: run_helm("install", "clip-csi", str(CHART), "--dry-run=client", "--namespace", "n", values=merged(IMAGE, values)).stdout
        self.assertIn("UPGRADES disturb no running pod", notes({}))
        self.assertNotIn("WARNING", notes({}))
        self.assertIn("fuse.updateStrategy is OnDelete", notes(COMBINATIONS["on delete"]))
        self.assertIn("WARNING: fuse.updateStrategy has no maxSurge", notes(COMBINATIONS["no surge"]))


class Configuration(Charted):
    def files(self, values: dict) -> dict[str, str]:
        return self.only([it for it in self.objects(values) if it["metadata"]["name"].endswith("-config")], "ConfigMap")["data"]

    def config(self, values: dict) -> str:
        return self.files(values)["agent.toml"]

    def everything(self) -> str:
        return self.config(EVERYTHING)

    def test_each_role_reads_its_file(self):
        objects = self.objects({})
        files = {role: mounted(container_of(objects, role)[1])["config"]["subPath"] for role in ("node", "agent", "serve")}
        self.assertEqual(files, {"node": "mounts.toml", "agent": "agent.toml", "serve": "mounts.toml"})

    def test_node_service_and_server_hear_nothing_of_registries(self):
        config = tomllib.loads(self.files(EVERYTHING)["mounts.toml"])
        whole = tomllib.loads(self.everything())
        self.assertEqual(config, {"cache": {"dir": "/data/cache"}, "fuse": whole["fuse"], "node": whole["node"]})

    def test_it_is_toml_of_the_values(self):
        config = tomllib.loads(self.everything())
        self.assertEqual(config["cache"]["dir"], "/data/cache")
        self.assertEqual(config["cache"]["max_bytes"], 200 << 30)
        self.assertEqual(config["remote"]["password_file"], "/etc/clip-csi/secrets/remote/password")
        self.assertEqual(config["remote"]["hmac_key_file"], "/etc/clip-csi/secrets/remote/hmac-key")
        self.assertEqual(config["remote"]["chunk_ttl_seconds"], 0)
        self.assertEqual(config["registry"]["hosts"]["docker.io"]["mirrors"], ["mirror.example:5000", "second.example"])
        self.assertTrue(config["registry"]["hosts"]["docker.io"]["always_ask_origin"])
        self.assertEqual(config["registry"]["hosts"]["private.example"]["ca_file"], "/etc/clip-csi/ca/private-ca/root.pem")
        self.assertEqual(config["registry"]["docker_config_file"], "/etc/clip-csi/secrets/registry/.dockerconfigjson")
        self.assertIs(config["registry"]["use_pushed_indexes"], False)
        self.assertIs(config["registry"]["trust_pinned_indexes"], True)

    def test_the_key_is_there_without_a_remote_too(self):
        values = {"remote": {"existingSecret": {"name": "keys"}}}
        self.assertEqual(tomllib.loads(self.config(values))["remote"], {"kind": "none", "hmac_key_file": "/etc/clip-csi/secrets/remote/hmac-key"})
        self.assertIn("remote-secret", mounted(container_of(self.objects(values), "agent")[1]))

    def test_a_bucket_is_named_with_its_secret(self):
        s3 = {"bucket": "layers", "endpoint": "http://s3.storage:9000", "region": "eu-1", "prefix": "a/b", "allowHttp": True}
        secret = {"name": "remote", "accessKeyIdKey": "id", "secretAccessKeyKey": "secret"}
        config = tomllib.loads(self.config({"remote": {"kind": "s3", "s3": s3, "existingSecret": secret}}))
        self.assertEqual(config["remote"]["s3"], {
            "bucket": "layers", "endpoint": "http://s3.storage:9000", "region": "eu-1", "prefix": "a/b", "allow_http": True,
            "access_key_file": "/etc/clip-csi/secrets/remote/id", "secret_key_file": "/etc/clip-csi/secrets/remote/secret",
        })
        bare = tomllib.loads(self.config({"remote": {"kind": "s3", "s3": {"bucket": "layers"}}}))
        self.assertEqual(bare["remote"]["s3"], {"bucket": "layers"})

    def test_defaults_are_the_drivers_own(self):
        self.assertEqual(tomllib.loads(self.config({})),
                         {"cache": {"dir": "/var/lib/clip-csi/cache"}, "remote": {"kind": "none"}, "registry": {}, "fuse": {}, "node": {}})

    def test_every_value_that_is_the_drivers_own_by_default_reaches_it(self):
        """A value that the templates do not read would be accepted and do nothing."""
        text = self.everything()
        values = document((CHART / "values.yaml").read_text())
        for section in ("cache", "remote", "registries", "fuse", "node"):
            for name, default in values[section].items():
                if default is None:
                    key = re.sub(r"[A-Z]", lambda match: "_" + match.group().lower(), name)
                    self.assertRegex(text, rf"(?m)^{key} = {re.escape(json.dumps(EVERYTHING[section][name]))}$")
        files = {name: tomllib.loads(file) for name, file in self.files(EVERYTHING).items()}
        self.assertEqual(files["agent.toml"]["prewarm"], {"parallel_images": 3, "bytes_per_second": 1 << 21, "evict_unused_for_seconds": 0})
        self.assertEqual(files["prewarm.toml"]["prewarm"], {"parallel_images": 4, "bytes_per_second": 1 << 20})

    def test_the_prewarm_controller_reads_registries_and_remote_as_agents_do_but_for_files_of_nodes(self):
        files = {name: tomllib.loads(file) for name, file in self.files(EVERYTHING).items()}
        agent, prewarm = files["agent.toml"], files["prewarm.toml"]
        self.assertEqual(prewarm["remote"], agent["remote"])
        of_nodes = {"hosts_dir", "allow_skip_verify", "credential_provider_config", "credential_provider_bin_dir", "service_account_pull_secrets"}
        self.assertEqual(set(agent["registry"]) - set(prewarm["registry"]), of_nodes)
        self.assertEqual(prewarm["registry"], {key: value for key, value in agent["registry"].items() if key not in of_nodes})
        self.assertEqual(prewarm["cache"]["dir"], mounted(container_of(self.objects(EVERYTHING), "prewarm")[1])["cache"]["mountPath"])
        self.assertEqual(set(self.files({})), {"agent.toml", "mounts.toml"})

    def test_the_prewarm_controller_waits_for_uploads_as_long_as_its_pod_may(self):
        for grace, drain in ((None, 25), (600, 595), (6, 1), (1, 1)):
            values = {"enabled": True} | ({} if grace is None else {"terminationGracePeriodSeconds": grace})
            prewarm = tomllib.loads(self.files({"prewarm": values})["prewarm.toml"])
            self.assertEqual(prewarm["node"], {"drain_seconds": drain}, grace)

    def test_the_program_accepts_it(self):
        if not paths.binary().exists():
            self.skipTest(f"no {paths.binary()}: run `make build`")
        for text in (*self.files({}).values(), *self.files(EVERYTHING).values()):
            with tempfile.TemporaryDirectory() as scratch:
                file = pathlib.Path(scratch, "config.toml")
                file.write_text(text)
                done = subprocess.run([paths.binary(), "cache", "ls", "--config", file, "--cache-dir", pathlib.Path(scratch, "cache")],
                                      capture_output=True, text=True, check=False)
                self.assertEqual(done.returncode, 0, done.stderr)


class Security(Charted):
    def test_only_the_node_service_is_privileged(self):
        for spec, container in containers(self.objects({})):
            context, name = container["securityContext"], container["name"]
            with self.subTest(name):
                self.assertTrue(context["readOnlyRootFilesystem"])
                self.assertEqual(context.get("privileged", False), name == "node")
                if name != "node":
                    more = {"add": ["CHOWN", "DAC_OVERRIDE", "FOWNER"]} if name == "own" else {}
                    self.assertEqual(context["capabilities"], {"drop": ["ALL"], **more})
                    self.assertFalse(context["allowPrivilegeEscalation"])
                self.assertNotIn("hostPID", spec)
                self.assertNotIn("hostNetwork", spec)
                self.assertEqual(container["terminationMessagePolicy"], "FallbackToLogsOnError")

    def test_agent_and_server_are_nobody(self):
        for role in ("agent", "serve"):
            self.assertEqual(container_of(self.objects({}), role)[1]["securityContext"], {
                "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}})

    def test_each_role_has_what_it_needs_and_no_more(self):
        objects = self.objects(EVERYTHING)
        have = {name: set(mounted(container_of(objects, name)[1])) for name in ("own", "node", "agent", "serve")}
        self.assertEqual(have, {
            "own": {"run", "cache"},
            "node": {"plugins-dir", "pods-dir", "run", "dev-fuse", "config"},
            "agent": {"run", "cache", "config", "kubernetes-api", "remote-secret", "registry-secret", "hosts-dir", "provider-config", "provider-bin", f"ca-{hashlib.sha256(b'private-ca').hexdigest()[:8]}"},
            "serve": {"run", "cache", "config"},
        })
        prewarm = set(mounted(container_of(objects, "prewarm")[1]))
        self.assertEqual(prewarm, have["agent"] - {"run", "hosts-dir", "provider-config", "provider-bin"})
        self.assertTrue(mounted(container_of(objects, "serve")[1])["cache"]["readOnly"])
        for role in ("agent", "serve"):
            for mount in container_of(objects, role)[1]["volumeMounts"]:
                self.assertNotEqual(mount.get("mountPropagation"), "Bidirectional", f"{role}: {mount}")

    def test_the_server_has_no_network(self):
        policies = {it["metadata"]["name"]: it["spec"] for it in self.objects({"networkPolicy": {"enabled": True}}) if it["kind"] == "NetworkPolicy"}
        self.assertEqual(set(policies), {"clip-csi-node", "clip-csi-fuse"})
        fuse = policies["clip-csi-fuse"]
        self.assertEqual((fuse["policyTypes"], fuse["ingress"], fuse["egress"]), (["Ingress", "Egress"], [], []))
        self.assertEqual(fuse["podSelector"]["matchLabels"]["app.kubernetes.io/component"], "fuse")

    def test_secrets_are_files_of_the_agent(self):
        done = template(merged(EVERYTHING, {"agent": {"env": []}}))
        self.assertNotIn("secretKeyRef", done.stdout)
        self.assertNotRegex(done.stdout, r"(?m)^kind: Secret$")
        objects = [it for it in documents(done.stdout) if it]
        spec, agent = container_of(objects, "agent")
        secrets = {volume["name"]: volume["secret"] for volume in spec["volumes"] if "secret" in volume}
        self.assertEqual({it["secretName"] for it in secrets.values()}, {"remote", "pull"})
        # Root's alone, and with fsGroup the agent's as well.
        self.assertEqual(spec["securityContext"]["fsGroup"], agent["securityContext"]["runAsGroup"])
        for name, secret in secrets.items():
            self.assertEqual(secret["defaultMode"], 0o400, name)
            self.assertTrue(mounted(agent)[name]["readOnly"])
            self.assertEqual([it["name"] for _, it in containers(objects) if name in mounted(it)], ["agent", "prewarm"])

    def test_the_kubernetes_api_is_the_agents_and_for_what_is_enabled(self):
        kinds = {"ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"}
        nothing, taint = {"agent": {"events": {"enabled": False}}}, {"node": {"startupTaint": {"enabled": True}}}
        no_pods, secrets = {"agent": {"events": {"pods": False}}}, {"registries": {"serviceAccountPullSecrets": {"enabled": True}}}
        for values, roles, options in ((nothing, set(), set()), (no_pods, {"Role", "RoleBinding"}, {"--events"}), ({}, kinds, {"--events", "--pod-events"}),
                                       (merged(nothing, secrets), {"ClusterRole", "ClusterRoleBinding"}, set()),
                                       (merged(nothing, taint), {"ClusterRole", "ClusterRoleBinding"}, {"--startup-taint"}),
                                       (merged(no_pods, taint), kinds, {"--events", "--startup-taint"})):
            objects = self.objects(values)
            self.assertEqual({it["kind"] for it in objects} & kinds, roles)
            self.assertFalse(self.only(objects, "ServiceAccount")["automountServiceAccountToken"])
            for component in ("node", "fuse"):
                self.assertFalse(daemon_set(objects, component)["spec"]["template"]["spec"]["automountServiceAccountToken"])
            self.assertEqual([it["name"] for _, it in containers(objects) if "kubernetes-api" in mounted(it)], ["agent"] if roles else [])
            for _, container in containers(objects):
                have = {word.partition("=")[0] for word in container.get("args", [])} & {"--events", "--pod-events", "--startup-taint"}
                self.assertEqual(have, options if container["name"] == "agent" else set())
                if have:
                    self.assertIn("NODE_ID", [it["name"] for it in container["env"]])

    # All that makes the chart grant something.
    GRANTING = {"node": {"startupTaint": {"enabled": True}}, "controller": {"enabled": True}, "prewarm": {"enabled": True, "discovery": {"enabled": True}, "pullSecrets": {"namespaces": ["team-a"]}}, "registries": {"serviceAccountPullSecrets": {"enabled": True}}}

    def rules(self) -> dict[str, list[dict]]:
        """All that may be granted, by kind and name of role."""
        return {f"{it['kind']} {it['metadata']['name']}": it["rules"] for it in self.objects(self.GRANTING) if it["kind"] in ("ClusterRole", "Role")}

    def test_roles_grant_what_is_needed(self):
        granted = {role: {(*rule["resources"], *rule["verbs"]) for rule in rules} for role, rules in self.rules().items()}
        self.assertEqual(granted, {
            "ClusterRole clip-csi-node": {("csinodes", "get"), ("nodes", "get"), ("nodes", "patch")}, "Role clip-csi-events": {("events", "create")},
            "ClusterRole clip-csi-pod-events": {("events", "create")}, "ClusterRole clip-csi-pod-info": {("csidrivers", "get")},
            "ClusterRole clip-csi-pull-secrets": {("serviceaccounts", "get"), ("secrets", "get")},
            "ClusterRole clip-csi-controller": {
                ("persistentvolumeclaims", "get", "list", "watch"), ("persistentvolumeclaims", "update"), ("persistentvolumes", "get", "list", "watch", "create", "delete"),
                ("persistentvolumes", "patch", "update"), ("storageclasses", "get", "list", "watch"), ("volumeattributesclasses", "get", "list", "watch"),
                ("events", "list", "watch", "create", "update", "patch")},
            "Role clip-csi-controller": {("leases", "get", "create", "update")},
            "ClusterRole clip-csi-prewarm": {
                ("imageprewarms", "list", "watch"), ("imagerollouts", "create", "delete", "list", "patch", "watch"), ("imageprewarms", "delete"), ("imageprewarms/status", "patch"), ("nodeimagecaches", "list", "watch"),
                ("nodes", "list", "watch"), ("events", "create"), ("pods", "list", "watch"), ("deployments", "statefulsets", "daemonsets", "list", "watch"), ("jobs", "cronjobs", "list", "watch")},
            "ClusterRole clip-csi-prewarm-pull-secrets": {("secrets", "get")},
            "ClusterRole clip-csi-prewarm-node": {
                ("imagerollouts", "list", "watch"), ("imageprewarms", "get"), ("nodeimagecaches", "get"), ("nodeimagecaches", "create", "patch"), ("nodeimagecaches/status", "patch"), ("nodes", "get"), ("pods", "list", "watch")},
            "Role clip-csi-prewarm": {("leases", "get", "create", "update")}})

    def test_pre_warming_is_there_when_it_is_wanted_and_has_rights_of_its_own(self):
        kinds = {"CustomResourceDefinition", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "Deployment"}
        self.assertFalse(kinds & {it["kind"] for it in self.objects({})})
        self.assertNotIn("--prewarm", container_of(self.objects({}), "agent")[1]["args"])
        objects = self.objects({"prewarm": {"enabled": True}})
        self.assertEqual(kinds, kinds & {it["kind"] for it in objects})
        self.assertIn("--prewarm", container_of(objects, "agent")[1]["args"])
        self.assertIn("kubernetes-api", mounted(container_of(objects, "agent")[1]))
        pod = self.only(objects, "Deployment")["spec"]["template"]["spec"]
        self.assertEqual((pod["serviceAccountName"], pod["automountServiceAccountToken"]), ("clip-csi-prewarm", False))
        self.assertFalse([it for it in pod["volumes"] if "hostPath" in it])
        [prewarm] = pod["containers"]
        self.assertTrue({"runAsNonRoot": True, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}.items() <= prewarm["securityContext"].items())
        policy = self.only(objects, "ValidatingAdmissionPolicy")["spec"]
        self.assertEqual(policy["failurePolicy"], "Fail")
        self.assertIn('"system:serviceaccount:clip-csi:clip-csi-node"', policy["matchConditions"][0]["expression"])
        self.assertEqual(self.only(objects, "ValidatingAdmissionPolicyBinding")["spec"]["validationActions"], ["Deny"])
        written = [yaml.safe_load(it.read_text()) for it in sorted((CHART / "files/crds").glob("*.yaml"))]
        for definition, file in zip([it for it in objects if it["kind"] == "CustomResourceDefinition"], written, strict=True):
            self.assertEqual(definition["metadata"]["annotations"]["helm.sh/resource-policy"], "keep")
            self.assertEqual(definition["spec"], file["spec"])
        self.assertNotIn("CustomResourceDefinition", {it["kind"] for it in self.objects({"prewarm": {"enabled": True, "crds": {"install": False}}})})

    def test_workloads_are_followed_only_where_that_is_wanted(self):
        for values in ({"prewarm": {"enabled": True}}, {"prewarm": {"discovery": {"enabled": True}}}):
            objects = self.objects(values)
            self.assertFalse([it for _, it in containers(objects) if "--discover" in it.get("args", [])])
            rules = [rule for it in objects if it["kind"] == "ClusterRole" for rule in it["rules"]]
            self.assertFalse({"pods", "deployments", "jobs"} & {resource for rule in rules for resource in rule["resources"]})
        objects = self.objects({"prewarm": {"enabled": True, "discovery": {"enabled": True}}})
        self.assertEqual([it["name"] for _, it in containers(objects) if "--discover" in it.get("args", [])], ["agent", "prewarm"])
        # No Secret is read for it but by its name, and none without prewarm.pullSecrets.namespaces.
        rules = [rule for it in objects if it["kind"] == "ClusterRole" and "prewarm" in it["metadata"]["name"] for rule in it["rules"]]
        self.assertNotIn("secrets", {resource for rule in rules for resource in rule["resources"]})

    def test_a_second_release_that_prewarms_is_refused_where_the_cluster_can_be_asked(self):
        group = "admissionregistration.k8s.io"
        owner = {"meta.helm.sh/release-name": "first", "meta.helm.sh/release-namespace": "storage"}
        answers = {
            "/version": {"major": "1", "minor": "36", "gitVersion": f"v{NEWEST}"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [{"name": group, "versions": [{"groupVersion": f"{group}/v1", "version": "v1"}]}]},
            f"/apis/{group}/v1": {"kind": "APIResourceList", "groupVersion": f"{group}/v1", "resources": [
                {"name": "validatingadmissionpolicies", "kind": "ValidatingAdmissionPolicy", "namespaced": False, "verbs": ["get", "list"]}]},
            f"/apis/{group}/v1/validatingadmissionpolicies": {"kind": "ValidatingAdmissionPolicyList", "apiVersion": f"{group}/v1", "items": [
                {"metadata": {"name": "first-clip-csi-nodeimagecaches", "annotations": owner}}, {"metadata": {"name": "somebody-elses"}}]},
        }

        class Api(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer = answers.get(self.path.partition("?")[0])
                self.send_response(200 if answer else 404)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(answer or {"kind": "Status", "code": 404, "reason": "NotFound"}).encode())

            def log_message(self, *_):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            words = ["--dry-run=server", "--disable-openapi-validation", "--kube-apiserver", f"http://127.0.0.1:{server.server_port}"]
            for name, namespace, enabled, is_refused in (("first", "storage", True, False), ("second", "storage", True, True), ("first", "other", True, True), ("second", "storage", False, False)):
                values = merged(IMAGE, {"prewarm": {"enabled": enabled}})
                done = run_helm("template", name, str(CHART), "--namespace", namespace, *words, values=values)
                # This cluster knows no other kinds, so that Helm has something to say of those that it would render.
                says = "prewarm.enabled is for one release of a cluster, and release first in namespace storage has it"
                self.assertIn(says if is_refused else "no matches for kind", done.stderr, (name, namespace, enabled))
                self.assertEqual(says in done.stderr, is_refused, (name, namespace, enabled))
            server.shutdown()

    def test_the_prewarm_controller_reads_secrets_of_named_namespaces_alone(self):
        named = lambda values: [(it["kind"], it["metadata"].get("namespace")) for it in self.objects(values) if it["metadata"]["name"] == "clip-csi-prewarm-pull-secrets"]
        self.assertEqual(named({"prewarm": {"enabled": True}}), [])
        found = named({"prewarm": {"enabled": True, "pullSecrets": {"namespaces": ["a", "b"]}}})
        self.assertEqual(sorted(found, key=str), [("ClusterRole", None), ("RoleBinding", "a"), ("RoleBinding", "b")])

    def test_the_controller_is_there_when_it_is_wanted_and_only_its_provisioner_has_a_token(self):
        self.assertNotIn("Deployment", {it["kind"] for it in self.objects({})})
        objects = self.objects({"controller": {"enabled": True}})
        pod = self.only(objects, "Deployment")["spec"]["template"]["spec"]
        self.assertFalse(pod["automountServiceAccountToken"])
        self.assertEqual({it["name"]: set(mounted(it)) for it in pod["containers"]}, {"controller": {"csi"}, "csi-provisioner": {"csi", "kubernetes-api"}})
        # The socket is its owner's alone.
        self.assertEqual({(it["securityContext"]["runAsUser"], it["securityContext"]["runAsNonRoot"]) for it in pod["containers"]}, {(65532, True)})
        address = next(it for it in pod["containers"][1]["args"] if it.startswith("--csi-address="))
        self.assertIn(f"--endpoint=unix://{address.partition('=')[2]}", pod["containers"][0]["args"])

    def test_a_storage_class_is_what_the_values_say(self):
        made = self.only(self.objects(EVERYTHING), "StorageClass")
        [wanted] = EVERYTHING["storageClasses"]
        self.assertEqual((made["provisioner"], made["parameters"], made["reclaimPolicy"]), ("csi.clip-csi.dev", wanted["parameters"], "Retain"))

    def test_secrets_may_be_read_in_the_named_namespaces_alone(self):
        for namespaces, kind, bound in (([], "ClusterRoleBinding", [None]), (["team-a", "team-b"], "RoleBinding", ["team-a", "team-b"])):
            objects = self.objects({"registries": {"serviceAccountPullSecrets": {"enabled": True, "namespaces": namespaces}}})
            found = [it for it in objects if it.get("roleRef", {}).get("name") == "clip-csi-pull-secrets"]
            self.assertEqual([it["kind"] for it in found], [kind] * len(bound))
            self.assertEqual([it["metadata"].get("namespace") for it in found], bound)

    def test_tokens_are_asked_for_and_kept_out_of_logs_where_that_can_be(self):
        for version, in_secrets in ((OLDEST, False), (NEWEST, True)):
            spec = self.only(self.objects(merged(EVERYTHING, {"prewarm": {"enabled": False}}), kube_version=version), "CSIDriver")["spec"]
            self.assertEqual(spec["tokenRequests"], [{"audience": "sts.example", "expirationSeconds": 3600}, {"audience": ""}])
            self.assertEqual((spec["requiresRepublish"], spec.get("serviceAccountTokenInSecrets", False)), (True, in_secrets))
        spec = self.only(self.objects({}), "CSIDriver")["spec"]
        self.assertEqual((spec["podInfoOnMount"], spec["requiresRepublish"]), (True, False))
        self.assertFalse({"tokenRequests", "serviceAccountTokenInSecrets"} & set(spec))

    def test_each_rule_has_its_reason_above_it(self):
        lines = template(self.GRANTING).stdout.splitlines()
        rules = [(lines[number - 1], lines[number]) for number in range(len(lines)) if lines[number].lstrip().startswith("- apiGroups:")]
        self.assertEqual(len(rules), 36)
        for above, rule in rules:
            self.assertRegex(above, r"^\s*# [A-Z].*\.$", f"no reason above {rule!r}")

    def test_rules_have_users(self):
        """No verb or resource beside those that a comment of the table in SECURITY.md explains."""
        text = (DOCS / "SECURITY.md").read_text()
        for rule in itertools.chain(*self.rules().values()):
            for resource, verb in itertools.product(rule["resources"], rule["verbs"]):
                self.assertRegex(text, rf"\| `{resource}` \| `{verb}` \|")


class Schema(Charted):
    def test_a_typo_is_refused_at_every_level(self):
        values = document((CHART / "values.yaml").read_text())
        documented = values_doc.comments((CHART / "values.yaml").read_text())
        levels = {()} | {path[:depth] for path, _ in values_doc.leaves(values, documented) for depth in range(1, len(path))}
        self.assertGreater(len(levels), 20)
        for level in sorted(levels):
            typo: dict = {"valuez": 1}
            for name in reversed(level):
                typo = {name: typo}
            with self.subTest(".".join(level) or "top"):
                done = template(typo)
                self.assertNotEqual(done.returncode, 0, "accepted")
                self.assertIn("valuez", done.stderr)

    def test_mistakes_are_refused_and_named(self):
        for values, word in MISTAKES:
            with self.subTest(json.dumps(values)):
                done = template(values)
                self.assertNotEqual(done.returncode, 0, "accepted")
                self.assertIn(word, done.stderr)

    def test_it_knows_the_values_and_no_others(self):
        schema = json.loads((CHART / "values.schema.json").read_text())

        def keys(node: dict, value) -> None:
            while "$ref" in node:
                node = schema["definitions"][node["$ref"].removeprefix("#/definitions/")]
            if node.get("additionalProperties", True) is False and isinstance(value, dict) and value:
                self.assertLessEqual(set(value), set(node["properties"]), "values without a schema")
                # Objects of Kubernetes, such as resources, may have more fields than the defaults use.
                if not set(node["properties"]) & {"limits", "rollingUpdate", "maxSurge"}:
                    self.assertEqual(set(value) - {"global"}, set(node["properties"]) - {"global"}, "a schema without a value")
                for name, inner in value.items():
                    keys(node["properties"][name], inner)

        keys(schema, document((CHART / "values.yaml").read_text()))


class Rules(unittest.TestCase):
    def setUp(self):
        if not shutil.which("promtool"):
            self.skipTest("no promtool: install the package prometheus")

    def test_promtool_accepts_the_rules(self):
        done = promtool("check", "rules", *sorted(RULES.glob("*.yaml")))
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_unit_tests_hold(self):
        done = promtool("test", "rules", *sorted(RULE_TESTS.glob("*.yaml")))
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_each_alert_has_a_case_that_fires_and_one_that_does_not(self):
        fires, silent = set(), set()
        for test in document((RULE_TESTS / "alerts.yaml").read_text())["tests"]:
            for case in test["alert_rule_test"]:
                (fires if case["exp_alerts"] else silent).add(case["alertname"])
        self.assertEqual(fires, set(alerts()))
        self.assertEqual(silent, set(alerts()))

    def test_unit_tests_notice_an_alert_that_never_or_always_fires(self):
        rules, tests = alerts(), document((RULE_TESTS / "alerts.yaml").read_text())
        for name, expr in itertools.product(rules, ("vector(0) > 1", "vector(1)")):
            # With the rest of them, which is tested above, each takes ten times as long.
            about = [it for it in tests["tests"] if any(case["alertname"] == name for case in it["alert_rule_test"])]
            with self.subTest(name, expr=expr), tempfile.TemporaryDirectory() as scratch:
                for was, is_right in ((rules[name]["expr"], True), (expr, False)):
                    rule = {**rules[name], "expr": was}
                    pathlib.Path(scratch, "rules.yaml").write_text(json.dumps({"groups": [{"name": "changed", "rules": [rule]}]}))
                    pathlib.Path(scratch, "tests.yaml").write_text(json.dumps({**tests, "rule_files": ["rules.yaml"], "tests": about}))
                    done = promtool("test", "rules", "tests.yaml", cwd=scratch)
                    self.assertEqual(done.returncode == 0, is_right, done.stdout + done.stderr)

    def test_each_recording_rule_has_a_case(self):
        recorded = {rule["record"] for group in document((RULES / "recording.yaml").read_text())["groups"] for rule in group["rules"]}
        tests = (RULE_TESTS / "recording.yaml").read_text()
        # The first is what the others are made of.
        self.assertEqual({name for name in recorded if f"expr: {name}\n" not in tests}, {"node_tier:clip_csi_tier_hits:rate5m"})

    def test_rules_use_documented_metrics(self):
        for file in RULES.glob("*.yaml"):
            for rule in (rule for group in document(file.read_text())["groups"] for rule in group["rules"]):
                expr = re.sub(r"\b\w+:clip_csi_\w+(:\w+)?", "", rule["expr"])
                self.assertEqual(dashboard.metrics_of(expr) - documented_metrics(), set(), rule)

    def test_each_alert_says_what_and_where_to_read_on(self):
        for name, rule in alerts().items():
            with self.subTest(name):
                self.assertIn(rule["labels"]["severity"], ("critical", "warning"))
                self.assertEqual(set(rule["annotations"]), {"summary", "description", "runbook_url"})
                self.assertTrue(rule["annotations"]["runbook_url"].endswith(f"docs/RUNBOOK.md#{name.lower()}"))

    def test_each_alert_has_its_section_in_the_runbook(self):
        sections = dict(re.findall(r"(?ms)^## (\w+)\n(.*?)(?=^## |\Z)", (DOCS / "RUNBOOK.md").read_text()))
        self.assertEqual({name for name in sections if name.startswith("ClipCsi")}, set(alerts()))
        for name in alerts():
            for part in ("Meaning", "Impact", "Diagnosis", "Mitigation"):
                self.assertIn(f"**{part}.**", sections[name], name)
            self.assertIn("```sh", sections[name], f"{name}: no command")


class RenderedRules(Charted):
    def test_the_prometheus_rule_is_what_promtool_tested(self):
        rendered = self.only(self.objects({"metrics": {"prometheusRule": {"forceEnable": True}}}), "PrometheusRule")["spec"]["groups"]
        written = [group for name in ("recording", "alerts") for group in document((RULES / f"{name}.yaml").read_text())["groups"]]
        self.assertEqual(rendered, written)

    def test_its_values_have_effect(self):
        rules = [rule for group in self.only(self.objects(EVERYTHING), "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
        names = {rule["alert"] for rule in rules if "alert" in rule}
        self.assertEqual(set(alerts()) - names, {"ClipCsiHitRatioLow"})
        for rule in rules:
            if "alert" in rule:
                self.assertTrue(rule["annotations"]["runbook_url"].startswith("https://wiki.example/runbook#clipcsi"))
                self.assertEqual(rule["labels"]["team"], "storage")
        self.assertIn({"record": "a", "expr": "1"}, rules)

    def test_the_pod_monitor_sets_the_labels_that_the_rules_need(self):
        endpoint = self.only(self.objects({"metrics": {"podMonitor": {"forceEnable": True}}}), "PodMonitor")["spec"]["podMetricsEndpoints"][0]
        self.assertIn({"targetLabel": "job", "replacement": "clip-csi-node"}, endpoint["relabelings"])
        self.assertIn({"targetLabel": "node", "sourceLabels": ["__meta_kubernetes_pod_node_name"]}, endpoint["relabelings"])

    def test_the_dashboard_arrives_as_it_is(self):
        found = self.only([it for it in self.objects({"metrics": {"grafanaDashboard": {"enabled": True}}}) if it["metadata"]["name"].endswith("dashboard")], "ConfigMap")
        self.assertEqual(json.loads(found["data"]["clip-csi.json"]), dashboard.load())
        self.assertEqual(found["metadata"]["labels"]["grafana_dashboard"], "1")


class Dashboard(unittest.TestCase):
    def test_queries_use_documented_metrics(self):
        for panel in dashboard.panels(dashboard.load()):
            for query in panel.queries:
                with self.subTest(panel.title):
                    used = dashboard.metrics_of(query.expr)
                    self.assertTrue(used or "up{" in query.expr)
                    self.assertEqual(used - documented_metrics(), set())

    def test_queries_are_promql(self):
        if not shutil.which("promtool"):
            self.skipTest("no promtool: install the package prometheus")
        queries = [query.expr for panel in dashboard.panels(dashboard.load()) for query in panel.queries]
        rules = {"groups": [{"name": "queries", "rules": [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(queries)]}]}
        with tempfile.TemporaryDirectory() as scratch:
            file = pathlib.Path(scratch, "queries.yaml")
            file.write_text(json.dumps(rules))
            done = promtool("check", "rules", file)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_every_query_is_of_the_chosen_nodes_and_source(self):
        for panel in dashboard.load()["panels"]:
            for target in panel.get("targets", []):
                self.assertEqual(target["datasource"], {"type": "prometheus", "uid": "${datasource}"})
                selectors = re.findall(r"\b(?:clip_csi_\w+|up)\b(\{[^}]*\})?", target["expr"])
                for selector in selectors:
                    self.assertIn('node=~"$node"', selector, target["expr"])

    def test_panels_have_names_and_places(self):
        source = dashboard.load()
        self.assertGreaterEqual(source["schemaVersion"], 38)
        ids = [panel["id"] for panel in source["panels"]]
        self.assertEqual(len(ids), len(set(ids)))
        taken = set()
        for panel in source["panels"]:
            place = panel["gridPos"]
            self.assertLessEqual(place["x"] + place["w"], 24)
            cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
            self.assertFalse(cells & taken, f"{panel['title']} lies on another panel")
            taken |= cells
            if panel["type"] != "row":
                self.assertTrue(panel["description"].endswith("."), panel["title"])

    def test_the_page_explains_every_panel(self):
        text = (DOCS / "DASHBOARD.md").read_text()
        for panel in dashboard.panels(dashboard.load()):
            self.assertIn(f"| {panel.title} |", text)


class Documents(unittest.TestCase):
    def test_versions_are_one(self):
        chart = document((CHART / "Chart.yaml").read_text())
        cargo = tomllib.loads((paths.REPO / "Cargo.toml").read_text())["package"]["version"]
        self.assertEqual((chart["version"], chart["appVersion"]), (cargo, cargo))

    def test_the_table_of_values_is_that_of_the_chart(self):
        self.assertEqual((DOCS / "VALUES.md").read_text(), values_doc.document(), "run deploy/helm/values_doc.py")

    def test_quoted_messages_are_the_programs(self):
        """What varies is written … in the tables, and {…} or a concatenation in the code."""
        code = "\n".join(file.read_text() for file in sorted((paths.REPO / "src").rglob("*.rs")))
        # A line of code that ends a string with a backslash goes on with the next line's text; names for {KEYS} are constants.
        code = re.sub(r"\\\n\s*", "", code)
        for constant, value in re.findall(r'const (\w+): &str = "([^"]*)";', code):
            code = code.replace(f"{{{constant}}}", value)
        sections = dict(re.findall(r"(?ms)^## ([^\n]+)\n(.*?)(?=^## |\Z)", (DOCS / "TROUBLESHOOTING.md").read_text()))
        checked = 0
        for row in re.findall(r"^\| (`.*?`) \|", sections["Events of the driver"] + sections["The driver does not start"], re.M):
            for text in re.findall(r"`([^`]*)`", row):
                for part in text.split("…"):
                    if len(part.strip()) > 3:
                        checked += 1
                        self.assertTrue(part.strip() in code, f"not in the code: {text}")
        self.assertGreater(checked, 40)

    def test_links_between_documents_lead_somewhere(self):
        for file in [paths.REPO / "README.md", *DOCS.glob("*.md")]:
            for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", file.read_text()):
                self.assertTrue((file.parent / target).exists(), f"{file.name}: {target}")


if __name__ == "__main__":
    unittest.main()
