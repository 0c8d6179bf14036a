"""How a pod and a workload of a release stand, in words; from the objects as kubectl prints them."""

from __future__ import annotations

from typing import Any

from kube import Release
from kube_objects import answers, condition, label

Nodes = dict[str, "dict[str, Any] | None"]  # by name; None: the cluster has no such machine


def standing(pod: dict[str, Any], nodes: Nodes | None = None) -> tuple[str, str]:
    """The container a pod is at, empty where at none, and how it stands."""
    status = pod.get("status", {})
    container, words = _containers(pod)
    if status.get("phase") == "Failed" and status.get("reason"):
        return container, f"failed: {status['reason']}{_after(status.get('message'))}"
    if gone := lost(pod, nodes or {}):
        return "", f"{gone}; it was {' '.join([container, words]).strip()} before"
    if since := pod.get("metadata", {}).get("deletionTimestamp"):
        return container, f"being deleted (since {since}), {words}"
    return container, words


def lost(pod: dict[str, Any], nodes: Nodes) -> str:
    """Why nothing is known of a pod: its machine is off or out of reach. Empty where that is not so."""
    name = pod.get("spec", {}).get("nodeName", "")
    if not name or pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return ""
    back = "start that machine again, and it goes on"
    if name in nodes:
        node = nodes[name]
        if node is None:
            return f"unknown: node {name} is not in the cluster any more"
        ready = condition(node, "Ready")
        if ready and ready.get("status") != "True":
            since = f" since {ready['lastTransitionTime']}" if ready.get("lastTransitionTime") else ""
            return f"unknown: node {name} is NotReady{since}{_after(ready.get('message'))}; {back}"
        return ""
    # Who may not look at nodes sees this: the kubelet sets both conditions alike, the node controller only the first.
    return "" if answers(pod) or pod["metadata"].get("deletionTimestamp") else f"unknown: node {name} is off; {back}"


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether a pod is Ready, and not on its way out."""
    return condition(pod, "Ready").get("status") == "True" and not pod["metadata"].get("deletionTimestamp")


def _containers(pod: dict[str, Any]) -> tuple[str, str]:
    status = pod.get("status", {})
    lasting = {
        each["name"]
        for each in pod.get("spec", {}).get("initContainers") or []
        if each.get("restartPolicy") == "Always"
    }
    own = label(pod, "component")
    inits = [each for each in status.get("initContainerStatuses") or [] if each["name"] not in lasting]
    # What a mesh or the like puts beside comes last: this is about the training.
    rest = sorted(status.get("containerStatuses") or [], key=lambda each: each["name"] != own)
    for each in inits:
        state = each.get("state", {})
        if "terminated" in state and not state["terminated"].get("exitCode"):
            continue
        if state.get("waiting", {}).get("reason") == "PodInitializing" or not state:
            continue
        return each["name"], _state(each)
    done = ""
    for each in rest:
        state = each.get("state", {})
        if "terminated" in state and not state["terminated"].get("exitCode"):
            done = done or each["name"]
        elif state and state.get("waiting", {}).get("reason") != "PodInitializing":
            return each["name"], _state(each, ready=condition(pod, "Ready"), started=each.get("started"))
    if done:
        return done, "done"
    unfit = condition(pod, "PodScheduled")
    if unfit.get("status") == "False":
        return "", f"not scheduled: {unfit.get('message') or unfit.get('reason', '')}"
    if any("waiting" in each.get("state", {}) for each in [*inits, *rest]):
        return "", "about to start: its volumes are mounted and its image is fetched"
    return "", status.get("phase", "unknown").lower()


def _state(each: dict[str, Any], ready: dict[str, Any] | None = None, started: bool | None = None) -> str:
    """One container's state; the end of its former life with it."""
    state, count = each.get("state", {}), each.get("restartCount", 0)
    before = each.get("lastState", {}).get("terminated") or {}
    former = f", restarted {count} time{'s' if count > 1 else ''}" if count else ""
    if before:
        former += f" (the last ended {_end(before)})"
    if "waiting" in state:
        reason, message = state["waiting"].get("reason") or "waiting", state["waiting"].get("message", "")
        if reason == "CrashLoopBackOff" and before:  # kubectl's message is only how long it pauses
            return f"{reason}: ended {_end(before)}; started {count + 1} times"
        return f"{reason}{_after(message)}{former}"
    if "terminated" in state:
        return f"ended {_end(state['terminated'])}{former}"
    if started is False:
        return f"starting{former}"
    if ready and ready.get("status") == "False" and not each.get("ready", True):
        return f"running, not ready{former}"
    return f"running{former}"


def _end(terminated: dict[str, Any]) -> str:
    reason = terminated.get("reason", "")
    named = f" ({reason})" if reason not in ("", "Error", "Completed") else ""
    return f"with exit code {terminated.get('exitCode', '?')}{named}{_after(terminated.get('message'))}"


def _after(message: str | None) -> str:
    """The end of a message, in one line after a colon; empty where there is none."""
    words = " ".join((message or "").split()[-60:])
    return f": {words}" if words else ""


def workload(release: Release, lost_pods: list[str]) -> list[str]:
    """How the training's workload stands: one line, and one on a rollout that is under way."""
    item = release.workload
    where = release.kubectl.namespace
    if not item:
        return [f"release {release.name} in {where}: not installed any more; what it left:"]
    name = f"{item['kind']} {item['metadata']['name']} in {where}"
    if item["kind"] == "Job":
        return [f"{name}: {_job(item, release, lost_pods)}"]
    wanted = item["spec"].get("replicas", 1)
    if not wanted:
        return [f"{name}: scaled to 0 pods"]
    ready = sum(is_ready(pod) and pod["metadata"]["name"] not in lost_pods for pod in release.pods("trainer"))
    return [f"{name}: {ready} of {wanted} pod(s) ready", *_rollout(item, release)]


def _job(item: dict[str, Any], release: Release, lost_pods: list[str]) -> str:
    state, wanted = item.get("status", {}), item["spec"].get("completions") or item["spec"].get("parallelism", 1)
    for kind, words in (
        ("Failed", "Failed"),
        ("FailureTarget", "Failed, its pods are being ended"),
        ("Complete", "Complete"),
    ):
        found = condition(item, kind)
        if found.get("status") == "True":
            if kind == "Complete":
                return f"Complete: {state.get('succeeded', wanted)} of {wanted} pod(s) done"
            return f"{words}: {found.get('reason', '')}{_after(found.get('message'))}"
    if item["spec"].get("suspend"):
        return "suspended: a queue holds it back, or somebody did"
    ready = sum(is_ready(pod) and pod["metadata"]["name"] not in lost_pods for pod in release.pods("trainer"))
    done = f", {state['succeeded']} done" if state.get("succeeded") else ""
    failed = f", {state['failed']} failed so far" if state.get("failed") else ""
    return f"{ready} of {wanted} pod(s) ready{done}{failed}"


def _rollout(item: dict[str, Any], release: Release) -> list[str]:
    """What a rollout waits for, and what to type where it waits for a pod that can't get ready by itself."""
    newest = item.get("status", {}).get("updateRevision", "")
    pods = release.pods("trainer")
    revision = {pod["metadata"]["name"]: revision_of(pod) for pod in pods}
    old = [pod for pod in pods if revision_of(pod) and newest and revision_of(pod) != newest]
    if not old or not any(revision.values()):
        return []
    stuck = [pod["metadata"]["name"] for pod in old if not is_ready(pod)]
    if stuck:
        options = release.kubectl.options()
        return [f"  {' and '.join(stuck)}: still with the old settings, and not ready, which holds up the rollout; "
                f"type: kubectl {options} delete pod {' '.join(stuck)}"]  # fmt: skip
    waits = [
        name
        for name in revision
        if revision[name] == newest and not is_ready(next(p for p in pods if p["metadata"]["name"] == name))
    ]
    after = f" once {' and '.join(waits)} is ready" if waits else ""
    names = " and ".join(pod["metadata"]["name"] for pod in old)
    return [f"  rollout: {names} has the old settings still, and is replaced{after}"]


def revision_of(pod: dict[str, Any]) -> str:
    """The StatefulSet's revision that a pod was made from; empty for others."""
    return pod["metadata"].get("labels", {}).get("controller-revision-hash", "")
