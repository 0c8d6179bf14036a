"""How the claims of a release stand, in words, and what to type where one keeps a pod from starting."""

from __future__ import annotations

import re
from typing import Any

from kube import Release
from kube_objects import condition
from pod_states import Nodes, lost
from volumes import LOCAL, claim_of, own, purpose, uses

NODE = "volume.kubernetes.io/selected-node"  # annotation: the machine on which the class made a claim's volume
ELSEWHERE = re.compile(r"volume node affinity|PersistentVolume's node affinity")


def claims(release: Release) -> list[str]:
    """A line for each claim; where some are not in use, which are; and what to type for what will not settle."""
    found, workload = release.objects.get("PersistentVolumeClaim", []), release.workload
    used = {item["metadata"]["name"] for item in found if workload and uses(workload, item["metadata"]["name"])}
    lines = []
    for claim in found:
        state, name = claim.get("status", {}), claim["metadata"]["name"]
        mark = (", in use" if name in used else ", not in use, kept") if used and len(used) < len(found) else ""
        size = state.get("capacity", {}).get("storage", "")
        lines.append(f"  volume {name}: {' '.join([state.get('phase', 'unknown'), size]).strip()}{mark}")
    if any(item["metadata"]["name"] in used and classless(item) for item in found):
        lines.append(
            "  the cluster has no default StorageClass: `kubectl get storageclass` lists those that it has, and "
            "`--set local.storageClassName=NAME` takes one; or a folder of each machine: `--set local.hostPath=FOLDER`"
        )
    return lines


def classless(claim: dict[str, Any]) -> bool:
    """Whether a pod's own claim waits for a default storage class that the cluster does not have."""
    pending = claim.get("status", {}).get("phase") == "Pending"
    return purpose(claim) == LOCAL and pending and claim["spec"].get("storageClassName") is None


def replacements(release: Release, nodes: Nodes) -> list[str]:
    """For each pod whose own volume is on a machine that is away: what to type if that one is gone for good."""
    if not own(release.workload):
        return []
    claimed = {item["metadata"]["name"]: item for item in release.objects.get("PersistentVolumeClaim", [])}
    lines = []
    for pod in release.pods("trainer"):
        name, claim = pod["metadata"]["name"], claim_of(pod["spec"])
        machine = pod["spec"].get("nodeName") or place(claimed.get(claim))
        unfit = condition(pod, "PodScheduled")
        bound = unfit.get("status") == "False" and ELSEWHERE.search(unfit.get("message") or "")
        gone = machine in nodes and nodes[machine] is None
        off = machine in nodes and not gone and condition(nodes[machine] or {}, "Ready").get("status") != "True"
        if not (machine in nodes and lost(pod, nodes)) and not (bound and (gone or off or machine not in nodes)):
            continue
        options = release.kubectl.options()
        tied = claimed.get(claim, {"spec": {}})["spec"].get("storageClassName") != ""  # a folder of any machine is not
        typed = [f"kubectl delete node {machine}"] if machine in nodes and not gone else []
        typed += [f"kubectl {options} delete pvc/{claim} pod/{name}"] if tied and claim else []
        if typed:
            lines.append(
                f"  {name}: if {machine or 'the machine of its volume'} is gone for good, another one can take its "
                f"place, and gets data and checkpoint from the others; type: {' && '.join(typed)}"
            )
    return lines


def place(claim: dict[str, Any] | None) -> str:
    """The machine that has a claim's volume; empty where that is not known."""
    return ((claim or {"metadata": {}})["metadata"].get("annotations") or {}).get(NODE, "")


def machines(release: Release) -> set[str]:
    """The machines that the release's pods, and its own volumes, are on."""
    pods = {pod["spec"].get("nodeName", "") for pod in release.pods()}
    used = [item for item in release.objects.get("PersistentVolumeClaim", []) if own(release.workload)]
    return (pods | {place(item) for item in used}) - {""}
