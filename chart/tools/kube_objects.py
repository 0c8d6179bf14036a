"""What the cluster's objects say, as kubectl prints them; for the tools beside it."""

from __future__ import annotations

from typing import Any


def label(item: dict[str, Any], name: str) -> str:
    """One of the recommended labels."""
    return item.get("metadata", {}).get("labels", {}).get(f"app.kubernetes.io/{name}", "")


def note(item: dict[str, Any], name: str) -> str:
    """One of the chart's annotations; empty where there is none."""
    return (item["metadata"].get("annotations") or {}).get(f"k8scifar/{name}", "")


def condition(item: dict[str, Any], kind: str) -> dict[str, Any]:
    """One of the conditions in an object's status; empty where it has none of this type."""
    found = item.get("status", {}).get("conditions") or []
    return next((each for each in found if each["type"] == kind), {})


def statuses(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of its containers, those that initialise it first."""
    status = pod.get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def answers(pod: dict[str, Any]) -> bool:
    """Whether a command can be run in a pod: not on its way out, and its machine is there.

    The kubelet sets both conditions alike; where only Ready is false, the node controller has missed its machine.
    """
    ready, containers = condition(pod, "Ready"), condition(pod, "ContainersReady")
    missed = ready.get("status") in ("False", "Unknown") and containers.get("status") == "True"
    missed = missed and ready.get("reason") != "ReadinessGatesNotReady"
    lost = (
        condition(pod, "DisruptionTarget").get("status") == "True" or pod.get("status", {}).get("reason") == "NodeLost"
    )
    return not (missed or lost or pod["metadata"].get("deletionTimestamp"))
