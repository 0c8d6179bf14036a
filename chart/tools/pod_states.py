"""Describe the state of a pod and of a release's workload in words."""

from __future__ import annotations

from typing import Any

from kube import Release
from kube_objects import answers, condition, label, named

Nodes = dict[str, "dict[str, Any] | None"]  # by name; None: the cluster has no such machine


def state_of(pod: dict[str, Any], nodes: Nodes | None = None) -> tuple[str, str]:
    """The container that a pod is at (empty: none), and the pod's state."""
    status = pod.get("status", {})
    container, words = _current(pod)
    if status.get("phase") == "Failed" and status.get("reason"):
        return container, f"failed: {status['reason']}{_after_colon(status.get('message'))}"
    if reason := lost(pod, nodes or {}):
        return "", f"{reason}; it was {' '.join([container, words]).strip()} before"
    if since := pod.get("metadata", {}).get("deletionTimestamp"):
        return container, f"being deleted (since {since}), {words}"
    return container, words


def lost(pod: dict[str, Any], nodes: Nodes) -> str:
    """Why the state of a pod is unknown: its machine is off or out of reach. Empty if it is known."""
    name = pod.get("spec", {}).get("nodeName", "")
    if not name or pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return ""
    advice = "start that machine again, and training continues"
    if name not in nodes:  # the user may not see nodes
        known = answers(pod) or pod["metadata"].get("deletionTimestamp")
        return "" if known else f"unknown: node {name} is off; {advice}"
    if nodes[name] is None:
        return f"unknown: node {name} is no longer in the cluster"
    ready = condition(nodes[name] or {}, "Ready")
    if not ready or ready.get("status") == "True":
        return ""
    since = f" since {ready['lastTransitionTime']}" if ready.get("lastTransitionTime") else ""
    return f"unknown: node {name} is NotReady{since}{_after_colon(ready.get('message'))}; {advice}"


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether a pod is Ready and not being deleted."""
    return condition(pod, "Ready").get("status") == "True" and not pod["metadata"].get("deletionTimestamp")


def _current(pod: dict[str, Any]) -> tuple[str, str]:
    """The first container that has not succeeded, and its state; those that a mesh adds come last."""
    status, own = pod.get("status", {}), label(pod, "component")
    declared = pod.get("spec", {}).get("initContainers") or []
    sidecars = [each["name"] for each in declared if each.get("restartPolicy") == "Always"]
    inits = [each for each in status.get("initContainerStatuses") or [] if each["name"] not in sidecars]
    containers = sorted(status.get("containerStatuses") or [], key=lambda each: each["name"] != own)
    for each in [*inits, *containers]:
        state = each.get("state", {})
        has_begun = state and state.get("waiting", {}).get("reason") != "PodInitializing"
        if has_begun and not _has_succeeded(state):
            return each["name"], _state(each, condition(pod, "Ready") if each in containers else {})
    if done := [each["name"] for each in containers if _has_succeeded(each.get("state", {}))]:
        return done[0], "done"
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return "", f"not scheduled: {scheduled.get('message') or scheduled.get('reason', '')}"
    if any("waiting" in each.get("state", {}) for each in [*inits, *containers]):
        return "", "about to start: the machine mounts its volumes and pulls its image"
    return "", status.get("phase", "unknown").lower()


def _has_succeeded(state: dict[str, Any]) -> bool:
    return "terminated" in state and not state["terminated"].get("exitCode")


def _state(each: dict[str, Any], ready: dict[str, Any]) -> str:
    """A container's state, with the end of its previous run; `ready` is the pod's condition, empty for an init one."""
    state, count = each.get("state", {}), each.get("restartCount", 0)
    before = each.get("lastState", {}).get("terminated") or {}
    restarts = f", restarted {count} time{'s' if count > 1 else ''}" if count else ""
    if before:
        restarts += f" (the last ended {_end(before)})"
    if "waiting" in state:
        reason, text = state["waiting"].get("reason") or "waiting", state["waiting"].get("message", "")
        if reason == "CrashLoopBackOff" and before:  # its message is only how long the pause is
            return f"{reason}: ended {_end(before)}; started {count + 1} times"
        return f"{reason}{_after_colon(text)}{restarts}"
    if "terminated" in state:
        return f"ended {_end(state['terminated'])}{restarts}"
    if ready and each.get("started") is False:
        return f"starting{restarts}"
    if ready.get("status") == "False" and not each.get("ready", True):
        return f"running, not ready{restarts}"
    return f"running{restarts}"


def _end(terminated: dict[str, Any]) -> str:
    reason = terminated.get("reason", "")
    cause = f" ({reason})" if reason not in ("", "Error", "Completed") else ""
    return f"with exit code {terminated.get('exitCode', '?')}{cause}{_after_colon(terminated.get('message'))}"


def _after_colon(message: str | None) -> str:
    """The last 60 words of a message after a colon; empty for no message."""
    words = " ".join((message or "").split()[-60:])
    return f": {words}" if words else ""


def workload_lines(release: Release, lost_pods: list[str]) -> list[str]:
    """The state of the training's workload: one line, and one more while a rollout lasts."""
    item, namespace = release.workload, release.kubectl.namespace
    if not item:
        return [f"release {release.name} in {namespace}: not installed any more; these objects were kept:"]
    ready = sum(is_ready(pod) and named(pod) not in lost_pods for pod in release.pods("trainer"))
    start = f"{item['kind']} {named(item)} in {namespace}:"
    if item["kind"] == "Job":
        return [f"{start} {_job(item, ready)}"]
    wanted = item["spec"].get("replicas", 1)
    if not wanted:
        return [f"{start} scaled to 0 pods"]
    return [f"{start} {ready} of {wanted} pod(s) ready", *_rollout(item, release)]


def _job(item: dict[str, Any], ready: int) -> str:
    state, wanted = item.get("status", {}), item["spec"].get("completions") or item["spec"].get("parallelism", 1)
    for kind, words in (("Failed", "Failed"), ("FailureTarget", "Failed, its pods are being ended")):
        found = condition(item, kind)
        if found.get("status") == "True":
            return f"{words}: {found.get('reason', '')}{_after_colon(found.get('message'))}"
    if condition(item, "Complete").get("status") == "True":
        return f"Complete: {state.get('succeeded', wanted)} of {wanted} pod(s) done"
    if item["spec"].get("suspend"):
        return "suspended by a queue, or by hand"
    done = f", {state['succeeded']} done" if state.get("succeeded") else ""
    failed = f", {state['failed']} failed so far" if state.get("failed") else ""
    return f"{ready} of {wanted} pod(s) ready{done}{failed}"


def _rollout(item: dict[str, Any], release: Release) -> list[str]:
    """What a rollout waits for, and what to type if a pod of the former revision blocks it."""
    newest = item.get("status", {}).get("updateRevision", "")
    revisions = [
        (pod, pod["metadata"].get("labels", {}).get("controller-revision-hash", "")) for pod in release.pods("trainer")
    ]
    former = [pod for pod, revision in revisions if newest and revision not in ("", newest)]
    if not former:
        return []
    if stuck := [named(pod) for pod in former if not is_ready(pod)]:
        return [
            f"  {' and '.join(stuck)}: has the former settings and is not ready, which blocks the rollout; "
            f"type: kubectl {release.kubectl.options()} delete pod {' '.join(stuck)}"
        ]
    waits = [named(pod) for pod, revision in revisions if revision == newest and not is_ready(pod)]
    after = f" once {' and '.join(waits)} is ready" if waits else ""
    return [f"  rollout: {' and '.join(map(named, former))} still has the former settings, and is replaced{after}"]
