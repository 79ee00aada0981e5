"""Where the Kubernetes API has an object: what kubectl asks the server for, which takes longer than the request itself."""

# Those that are in no namespace.
OF_THE_CLUSTER = {"ClusterRole", "ClusterRoleBinding", "CSIDriver", "CustomResourceDefinition", "ImageRollout", "Namespace", "Node", "NodeImageCache", "PersistentVolume",
                  "PriorityClass", "StorageClass", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
# Applied on the server's side, whoever else wrote what is there; a field that does not exist is an error.
APPLY = "application/apply-patch+yaml"
APPLIED = "fieldManager=e2e&force=true&fieldValidation=Strict"


def collection(api: str, kind: str, namespace: str | None) -> str:
    """The path of all objects of a kind: "api/v1/namespaces/default/pods"."""
    word = kind.lower()
    plural = f"{word[:-1]}ies" if word.endswith("y") else f"{word}es" if word.endswith("s") else f"{word}s"
    return "/".join(["apis" if "/" in api else "api", api, *([] if kind in OF_THE_CLUSTER else ["namespaces", namespace or "default"]), plural])


def place(it: dict) -> tuple[str, str]:
    """An object's collection, and its name there."""
    meta = it["metadata"]
    return collection(it["apiVersion"], it["kind"], meta.get("namespace")), meta["name"]
