"""Another value for each value of the chart, for tests that go through all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import yaml
from chart_helpers import CHART

DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())


def leaves(node: dict[str, Any], path: str = "") -> Iterator[str]:
    """Dotted path of each value; an empty or free-form map is one value."""
    for key, value in node.items():
        full = f"{path}{key}"
        if isinstance(value, dict) and value and not full.endswith(("esources", "equests")):
            yield from leaves(value, full + ".")
        else:
            yield full


# Another value for each that has no obvious one.
OTHER = {
    "train.distributed.comm": "bf16",
    "nodes": 1,
    "train.recipe": "best",
    "image.digest": "sha256:" + "0" * 64,
    "image.pullPolicy": "Always",
    "imagePullSecrets": [{"name": "x"}],
    "nfs.path": "/other",
    "nfs.mountOptions": ["ro"],
    "dataset.source": "synthetic",
    "dataset.s3Endpoint": "http://minio.storage:9000",
    "workload.kind": "Job",
    "elastic.enabled": False,
    "completion.policy": "scaleDown",
    "podAntiAffinity.mode": "preferred",
    "user.supplementalGroups": [5],
    "user.fsGroup": 0,
    "job.activeDeadlineSeconds": 5,
    "job.ttlSecondsAfterFinished": 0,
    "tolerations": [{"operator": "Exists"}],
    "tensorboard.tolerations": [{"operator": "Exists"}],
    "tensorboard.serviceType": "NodePort",
    "affinity": {"nodeAffinity": {"a": "b"}},
    "extraEnv": [{"name": "A", "value": "b"}],
    "extraVolumes": [{"name": "v", "emptyDir": {"medium": "Memory"}}],
    "extraVolumeMounts": [{"name": "v", "mountPath": "/v"}],
    "gpu.resourceName": "amd.com/gpu",
    "networkPolicy.tensorboardFrom": [{"podSelector": {"matchLabels": {"a": "b"}}}],
    "workload.terminationGracePeriodSeconds": 200,
    "resources": {"limits": {"cpu": "2"}},
    "initResources": {"limits": {"cpu": "2"}},
    "tensorboard.resources": {"limits": {"cpu": "2"}},
    "clusterDomain": "other.local",
    "dataset.accessMode": "ReadWriteOnce",
    "dataset.hostPath": "/x",
    "checkpoints.accessMode": "ReadWriteOnce",
    "checkpoints.hostPath": "/x",
    "local.hostPath": "/x",
}
# Values that only matter beside others.
BESIDE = {
    "local.": {"local": {"enabled": True}, "nfs": {"server": ""}},
    "dataset.nfs": {"dataset": {"nfs": {"server": "s", "path": "/p"}}},
    "checkpoints.nfs": {"checkpoints": {"nfs": {"server": "s", "path": "/p"}}},
    "dataset.size": {"dataset": {"storageClassName": "fast"}},
    "checkpoints.size": {"checkpoints": {"storageClassName": "fast"}},
    "extraVolumeMounts": {"extraVolumes": [{"name": "v", "emptyDir": {}}]},
    "job.": {"workload": {"kind": "Job"}},
    "gpu.": {"gpu": {"enabled": True}},
    "tensorboard.ingress": {"tensorboard": {"ingress": {"enabled": True, "host": "h"}}},
}


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return f"{value[:-2]}9Gi" if value.endswith("Gi") else "/x" if value.startswith("/") else "x"
    if isinstance(value, dict):
        return {"a": "b"}
    raise AssertionError(f"what else could {value!r} be? say so in OTHER")


def at(tree: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path."""
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def sections(node: dict[str, Any], path: str = "") -> Iterator[str]:
    """Dotted path of each map that has values of the chart in it."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield f"{path}{key}"
            if not key.endswith(("esources", "equests")):
                yield from sections(value, f"{path}{key}.")


def case(path: str) -> tuple[dict[str, Any], Any]:
    """The values beside which a value matters, and another value for it."""
    base: dict[str, Any] = {"nfs": {"server": "192.0.2.1"}}
    for prefix, beside in BESIDE.items():
        if path.startswith(prefix):
            base |= copy.deepcopy(beside)
    value = at(base, path)
    value = at(DEFAULTS, path) if value is None else value
    return base, OTHER[path] if path in OTHER else changed(value)


def words(path: str, value: Any) -> Iterator[str]:
    """A value as `--set` takes it, KEY=VALUE for each scalar in it."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from words(f"{path}.{key}", child)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from words(f"{path}[{index}]", child)
    else:
        text = "{}" if value == {} else "null" if value is None else str(value)
        text = text.lower() if isinstance(value, bool) else text
        yield f"{path}={text}".replace(",", "\\,")
