"""Pods as the tests want them: a shell, and an image mounted by the driver."""

from .cluster import REGISTRY

DRIVER = "csi.clip-csi.dev"
SHELL = f"{REGISTRY}/shell:1"
# Waits, and ends when it is asked to: a first process has no default for SIGTERM.
STAY = "trap exit TERM; sleep 3600 & wait"


def pod(name: str, *, command: list[str] | str = STAY, node: str | None = None, image: str | None = None, attributes: dict | None = None,
        secret: str | None = None, mount: dict | None = None, volume: dict | None = None, container: dict | None = None, **spec) -> dict:
    """A pod that shows an image at /mnt. `volume` is another source for it; `container` and `spec` are added as they are."""
    source = volume
    if image is not None:
        source = {"csi": {"driver": DRIVER, "volumeAttributes": {"image": image, **(attributes or {})}, **({"nodePublishSecretRef": {"name": secret}} if secret else {})}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {
            # Not 0, which is what `--force` means: the API server would forget the pod before kubelet has taken it down.
            "terminationGracePeriodSeconds": 2,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "restartPolicy": "Never",
            **({"nodeName": node} if node else {}),
            "containers": [{
                "name": "main",
                "image": SHELL,
                "command": ["sh", "-c", command] if isinstance(command, str) else command,
                **({"volumeMounts": [{"name": "image", "mountPath": "/mnt", "readOnly": True, **(mount or {})}]} if source else {}),
                **(container or {}),
            }],
            **({"volumes": [{"name": "image", **source}]} if source else {}),
            **spec,
        },
    }
