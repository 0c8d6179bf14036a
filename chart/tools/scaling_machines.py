"""The machines that `make scaling` may train on in a cluster, and who else trains there."""

from __future__ import annotations

import json
from typing import Any

from kube import Kubectl, ToolError, holds_items
from kube_objects import condition, label


def fitting(kubectl: Kubectl, spec: dict[str, Any]) -> list[str] | None:
    """The machines that take a pod of this spec; None where a person may not look at nodes. Raises ToolError."""
    done = kubectl.run("get", "nodes", "--ignore-not-found", "--output=json", "--request-timeout=20s")
    if done.returncode:
        if "forbidden" in done.stderr.lower():
            return None
        raise ToolError(kubectl.why(("get",), done.stderr, done.returncode))
    found = []
    for item in json.loads(done.stdout or '{"items": []}')["items"]:
        own, labels = item.get("spec", {}), item["metadata"].get("labels", {}).items()
        taints = [each for each in own.get("taints") or [] if each.get("effect") in ("NoSchedule", "NoExecute")]
        borne = all(any(tolerates(each, taint) for each in spec.get("tolerations") or []) for taint in taints)
        ready = condition(item, "Ready").get("status") == "True" and not own.get("unschedulable")
        if ready and borne and (spec.get("nodeSelector") or {}).items() <= labels:
            found.append(item["metadata"]["name"])
    return found


def tolerates(toleration: dict[str, Any], taint: dict[str, Any]) -> bool:
    """Whether a pod's toleration is for a machine's taint, by Kubernetes' rules."""
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return (toleration.get("key"), toleration.get("value", "")) == (taint["key"], taint.get("value", ""))


def others(kubectl: Kubectl, release: str) -> list[str]:
    """Other releases of the chart that have training pods, in words; empty where a person may not look."""
    chosen = "--selector=app.kubernetes.io/part-of=k8scifar,app.kubernetes.io/component=trainer"
    done = kubectl.run("get", "pods", "--all-namespaces", chosen, "--output=json", "--request-timeout=10s")
    if done.returncode or not holds_items(done.stdout):
        return []
    named = {
        f"release {label(item, 'instance')} in namespace {item['metadata'].get('namespace', '')}"
        for item in json.loads(done.stdout)["items"]
        if item.get("status", {}).get("phase") == "Running"
    }
    return sorted(named - {f"release {release} in namespace {kubectl.namespace}"})
