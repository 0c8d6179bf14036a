"""The claims of a release: what each is for, which a workload uses, and which belong together.

A workload's pods share a claim `checkpoints`, or each has one of its own, `local-WORKLOAD-ORDINAL`, with its copy of
the run; of those, pod 0's holds all results.
"""

from __future__ import annotations

from typing import Any

from kube_objects import label

LOCAL = "local"


def purpose(claim: dict[str, Any]) -> str:
    """What a claim is for: dataset, checkpoints, or local (both, for one pod)."""
    return claim["metadata"].get("labels", {}).get("k8scifar/volume") or label(claim, "component")


def mounted(spec: dict[str, Any]) -> dict[str, str]:
    """The claims of a pod's spec, by volume."""
    found = {each["name"]: each.get("persistentVolumeClaim") or {} for each in spec.get("volumes") or []}
    return {name: claim["claimName"] for name, claim in found.items() if claim}


def claim_of(spec: dict[str, Any]) -> str:
    """The claim that has the runs in a pod's spec, if it has one."""
    found = mounted(spec)
    return found.get("checkpoints") or found.get(LOCAL, "")


def run_claim(workload: dict[str, Any] | None) -> str:
    """The claim that a workload keeps its run on, pod 0's where each has its own; empty where there is no workload."""
    if not workload:
        return ""
    return f"{own(workload)}0" if own(workload) else claim_of(workload["spec"].get("template", {}).get("spec", {}))


def uses(workload: dict[str, Any], claim: str) -> bool:
    """Whether pods of a workload mount a claim."""
    start = own(workload)
    if start and claim.startswith(start):
        return claim.removeprefix(start).isdecimal()
    return claim in mounted(workload["spec"].get("template", {}).get("spec", {})).values()


def own(workload: dict[str, Any] | None) -> str:
    """How the names of claims begin of which each pod has one for itself; empty where they share."""
    templates = (workload or {"spec": {}})["spec"].get("volumeClaimTemplates") or []
    return f"{templates[0]['metadata']['name']}-{workload['metadata']['name']}-" if workload and templates else ""


def siblings(claim: dict[str, Any]) -> tuple[str, int]:
    """What the claims of one workload's pods have in common, and this one's place among them."""
    name = claim["metadata"]["name"]
    stem, _, ordinal = name.rpartition("-")
    return (stem, int(ordinal)) if purpose(claim) == LOCAL and ordinal.isdecimal() else (name, 0)


def ordered(claims: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """The claims of runs: the one named first and its siblings, then the newest; of siblings, pod 0's first."""
    found = [item for item in claims if purpose(item) in ("checkpoints", LOCAL)]
    newest: dict[str, str] = {}
    for item in found:
        stem, made = siblings(item)[0], item["metadata"].get("creationTimestamp") or ""
        newest[stem] = max(newest.get(stem, ""), made)
    used = {siblings(item)[0] for item in found if item["metadata"]["name"] == first}
    found.sort(key=lambda item: siblings(item)[1])
    found.sort(key=lambda item: newest[siblings(item)[0]], reverse=True)
    return sorted(found, key=lambda item: siblings(item)[0] not in used)
