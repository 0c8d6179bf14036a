"""The claims of a release: what each is for, which a workload uses, and which belong together.

A workload's pods share the claim `checkpoints`, or each pod has a claim `local-WORKLOAD-ORDINAL` with its copy of the
run; pod 0's has all results.
"""

from __future__ import annotations

from typing import Any

from kube_objects import label, named

LOCAL = "local"


def purpose(claim: dict[str, Any]) -> str:
    """What a claim is for: dataset, checkpoints, or local (both, for one pod)."""
    return claim["metadata"].get("labels", {}).get("k8scifar/volume") or label(claim, "component")


def mounted(spec: dict[str, Any]) -> dict[str, str]:
    """The claims in a pod's spec, by volume."""
    found = {each["name"]: each.get("persistentVolumeClaim") or {} for each in spec.get("volumes") or []}
    return {name: claim["claimName"] for name, claim in found.items() if claim}


def claim_of(spec: dict[str, Any]) -> str:
    """The claim with the run in a pod's spec; empty if it has none."""
    found = mounted(spec)
    return found.get("checkpoints") or found.get(LOCAL, "")


def _pod_spec(workload: dict[str, Any]) -> dict[str, Any]:
    return workload["spec"].get("template", {}).get("spec", {})


def run_claim(workload: dict[str, Any] | None) -> str:
    """The claim with a workload's run, pod 0's if each pod has one; empty if there is no workload."""
    if not workload:
        return ""
    start = own_claims_start(workload)
    return f"{start}0" if start else claim_of(_pod_spec(workload))


def uses(workload: dict[str, Any], claim: str) -> bool:
    """Whether pods of a workload mount a claim."""
    start = own_claims_start(workload)
    if start and claim.startswith(start):
        return claim.removeprefix(start).isdecimal()
    return claim in mounted(_pod_spec(workload)).values()


def own_claims_start(workload: dict[str, Any] | None) -> str:
    """The start of the claims' names if each pod has a claim; empty if the pods share claims."""
    templates = (workload or {"spec": {}})["spec"].get("volumeClaimTemplates") or []
    return f"{named(templates[0])}-{named(workload)}-" if workload and templates else ""


def group(claim: dict[str, Any]) -> tuple[str, int]:
    """The name that the claims of one workload's pods share, and the pod's ordinal."""
    stem, _, ordinal = named(claim).rpartition("-")
    return (stem, int(ordinal)) if purpose(claim) == LOCAL and ordinal.isdecimal() else (named(claim), 0)


def ordered(claims: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """The claims with runs: the group of the claim `first`, then the newest group; in a group, pod 0's first."""
    found = [claim for claim in claims if purpose(claim) in ("checkpoints", LOCAL)]
    newest: dict[str, str] = {}
    for claim in found:
        stem, made = group(claim)[0], claim["metadata"].get("creationTimestamp") or ""
        newest[stem] = max(newest.get(stem, ""), made)
    used = {group(claim)[0] for claim in found if named(claim) == first}
    found.sort(key=lambda claim: group(claim)[1])
    found.sort(key=lambda claim: newest[group(claim)[0]], reverse=True)
    return sorted(found, key=lambda claim: group(claim)[0] not in used)
