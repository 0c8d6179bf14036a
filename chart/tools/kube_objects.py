"""Read labels, annotations, conditions and states of the cluster's objects as kubectl prints them."""

from __future__ import annotations

from typing import Any


def named(item: dict[str, Any]) -> str:
    """The name of an object."""
    return item["metadata"]["name"]


def label(item: dict[str, Any], name: str) -> str:
    """One of the recommended labels."""
    return item.get("metadata", {}).get("labels", {}).get(f"app.kubernetes.io/{name}", "")


def note(item: dict[str, Any], name: str) -> str:
    """One of the chart's annotations; empty if it is missing."""
    return (item["metadata"].get("annotations") or {}).get(f"k8scifar/{name}", "")


def condition(item: dict[str, Any], kind: str) -> dict[str, Any]:
    """One of the conditions in an object's status; empty if it is missing."""
    found = item.get("status", {}).get("conditions") or []
    return next((each for each in found if each["type"] == kind), {})


def statuses(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """The statuses of a pod's containers, init containers first."""
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def answers(pod: dict[str, Any]) -> bool:
    """Whether a pod can run a command: it is not being deleted, and its machine is reachable.

    The kubelet sets both conditions together; the node controller sets only Ready, if it can't reach the machine.
    """
    ready, containers = condition(pod, "Ready"), condition(pod, "ContainersReady")
    missed = ready.get("status") in ("False", "Unknown") and containers.get("status") == "True"
    missed = missed and ready.get("reason") != "ReadinessGatesNotReady"
    lost = (
        condition(pod, "DisruptionTarget").get("status") == "True" or pod.get("status", {}).get("reason") == "NodeLost"
    )
    return not (missed or lost or pod["metadata"].get("deletionTimestamp"))
