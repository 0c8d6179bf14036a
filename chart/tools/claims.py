"""Describe the claims of a release, and what to type if one keeps a pod from starting."""

from __future__ import annotations

import re
from typing import Any

from kube import Release
from kube_objects import condition, named
from pod_states import Nodes, lost
from volumes import LOCAL, claim_of, own_claims_start, purpose, uses

NODE = "volume.kubernetes.io/selected-node"  # annotation: the machine that has a claim's volume
ELSEWHERE = re.compile(r"volume node affinity|PersistentVolume's node affinity")


def claim_lines(release: Release) -> list[str]:
    """A line for each claim, and what to type if the cluster has no default StorageClass."""
    claims, workload = release.claims_of_all_kinds(), release.workload
    used = [claim for claim in claims if workload and uses(workload, named(claim))]
    lines = []
    for claim in claims:
        state = claim.get("status", {})
        mark = ", in use" if claim in used else ", not in use, kept"
        size = state.get("capacity", {}).get("storage", "")
        words = " ".join(filter(None, [state.get("phase", "unknown"), size]))
        lines.append(f"  volume {named(claim)}: {words}{mark if 0 < len(used) < len(claims) else ''}")
    if any(map(_lacks_class, used)):
        lines.append(
            "  the cluster has no default StorageClass: `kubectl get storageclass` lists the others; choose one with "
            "`--set local.storageClassName=NAME`, or a folder of each machine with `--set local.hostPath=FOLDER`"
        )
    return lines


def _lacks_class(claim: dict[str, Any]) -> bool:
    """Whether a pod's claim waits for a default StorageClass that the cluster does not have."""
    pending = claim.get("status", {}).get("phase") == "Pending"
    return purpose(claim) == LOCAL and pending and claim["spec"].get("storageClassName") is None


def replacement_lines(release: Release, nodes: Nodes) -> list[str]:
    """For each pod whose volume is on a machine that is away: what to type if that machine is gone for good."""
    if not own_claims_start(release.workload):
        return []
    claims = {named(item): item for item in release.claims_of_all_kinds()}
    lines = []
    for pod in release.pods("trainer"):
        name = claim_of(pod["spec"])
        claim = claims.get(name, {"metadata": {}, "spec": {}})
        machine = pod["spec"].get("nodeName") or _machine_of(claim)
        if not _needs_replacement(pod, machine, nodes):
            continue
        typed = [f"kubectl delete node {machine}"] if nodes.get(machine) else []
        if name and claim["spec"].get("storageClassName") != "":  # a hostPath may be on any machine
            typed.append(f"kubectl {release.kubectl.options()} delete pvc/{name} pod/{named(pod)}")
        if typed:
            lines.append(
                f"  {named(pod)}: if {machine or 'the machine of its volume'} is gone for good, another one can take "
                f"its place, and gets data and checkpoint from the others; type: {' && '.join(typed)}"
            )
    return lines


def _needs_replacement(pod: dict[str, Any], machine: str, nodes: Nodes) -> bool:
    """Whether a pod is lost with its machine, or can't be scheduled because its volume is on one that is away."""
    if machine in nodes and lost(pod, nodes):
        return True
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") != "False" or not ELSEWHERE.search(scheduled.get("message") or ""):
        return False
    return condition(nodes.get(machine) or {}, "Ready").get("status") != "True"


def _machine_of(claim: dict[str, Any]) -> str:
    """The machine that has a claim's volume; empty if it is unknown."""
    return (claim["metadata"].get("annotations") or {}).get(NODE, "")


def machines(release: Release) -> set[str]:
    """The machines that have the release's pods and the pods' volumes."""
    pods = {pod["spec"].get("nodeName", "") for pod in release.pods()}
    claims = release.claims_of_all_kinds() if own_claims_start(release.workload) else []
    return (pods | set(map(_machine_of, claims))) - {""}
