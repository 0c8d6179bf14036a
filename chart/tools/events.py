"""Select the events that still matter to a release: what blocks it now, or hit it within the last hour."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any

from kube import Release
from kube_objects import condition, named, statuses
from pod_states import is_ready

SHOWN = 5
HOUR = 3600  # seconds for which something that was done to a pod is reported
START = 120  # seconds in which an ordinary start may cause warnings
DONE_TO_A_POD = re.compile(r"Evicted|Preempt|OOM|TaintManager|NodeNotReady|NodeShutdown|ExceededGracePeriod|SystemOOM")
BEFORE_START = re.compile(r"Mount|Attach|MapVolume|Sandbox|NetworkNotReady|HostPort|FailedBinding")
IMAGE = re.compile(r"^(Failed|BackOff|ErrImage\w*|InspectFailed)$")
# The kubelet asks for a pod's objects before it may see them, and asks again.
RACE = re.compile(r"no relationship found between node|failed to sync \w+ cache|object .* not registered", re.I)
# The lines on pods, claims and the workload contain these.
IN_OTHER_LINES = re.compile(
    r"^(FailedScheduling|BackoffLimitExceeded|DeadlineExceeded|PodFailurePolicy|NotTriggerScaleUp|FailedNeedsStart)$"
)


def warnings(release: Release) -> list[str]:
    """Up to five events, the newest last: object, reason, message, and how long ago if it is over."""
    found: dict[tuple[str, str, str], str] = {}
    for event in sorted(release.kubectl.items("events") or [], key=_age, reverse=True):
        text = " ".join((event.get("message") or "").split())
        about, reason = event["involvedObject"], event.get("reason", "")
        remark = _remark(event, about, reason, text, release)
        if remark is not None:
            found[about.get("name", ""), reason, text] = remark
    return [f"{name}: {reason}: {text}{remark}" for (name, reason, text), remark in [*found.items()][-SHOWN:]]


def _age(event: dict[str, Any]) -> float:
    """Seconds since an event was last seen; 0 if it has no time."""
    series = event.get("series") or {}
    seen = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return _seconds_since(seen or event["metadata"].get("creationTimestamp"))


def _seconds_since(moment: str | None) -> float:
    """Seconds since a moment as the cluster writes it; 0 for none."""
    if not moment:
        return 0.0
    then = datetime.fromisoformat(re.sub(r"\.\d+", "", moment).replace("Z", "+00:00"))
    return (datetime.now(timezone.utc) - then).total_seconds()


def _remark(event: dict[str, Any], about: dict[str, Any], reason: str, text: str, release: Release) -> str | None:
    """None for an event that is over or ordinary; else how long ago it was, empty for one that still holds."""
    kind, name = about.get("kind", ""), about.get("name", "")
    item = _object(release, kind, name)
    if item is None and not (kind == "Pod" and name.startswith(_pod_name_starts(release))):
        return None
    if DONE_TO_A_POD.search(reason):
        return f" ({_age(event) / 60:.0f} min ago)" if _age(event) < HOUR else None
    if event.get("type", "Warning") != "Warning" or item is None or IN_OTHER_LINES.match(reason):
        return None
    uid = about.get("uid")
    if uid and item["metadata"].get("uid", uid) != uid and kind != "ReplicaSet":
        return None  # it concerns a former object of that name
    if item["kind"] == "Pod":
        holds = _holds_for_pod(item, reason, text, _age(event))
    elif item["kind"] == "PersistentVolumeClaim":
        holds = item.get("status", {}).get("phase") != "Bound"
    else:
        holds = _lacks_pods(item, release)
    return "" if holds else None


def _object(release: Release, kind: str, name: str) -> dict[str, Any] | None:
    """The release's object of a kind (empty: any) and name; for a ReplicaSet its Deployment."""
    if kind == "ReplicaSet":
        deployments = release.objects.get("Deployment", [])
        return next((each for each in deployments if name.startswith(f"{named(each)}-")), None)
    objects = release.objects.get(kind, []) if kind else [each for all_ in release.objects.values() for each in all_]
    return next((each for each in objects if named(each) == name), None)


def _pod_name_starts(release: Release) -> tuple[str, ...]:
    kinds = ("StatefulSet", "Job", "Deployment")
    return tuple(f"{named(item)}-" for kind in kinds for item in release.objects.get(kind, []))


def _holds_for_pod(pod: dict[str, Any], reason: str, text: str, seconds: float) -> bool:
    """Whether a warning about a pod still holds."""
    if is_ready(pod) or pod.get("status", {}).get("phase") == "Succeeded":
        return False
    states = [each["state"] for each in statuses(pod)]
    if RACE.search(text) and seconds < START:
        return False
    if BEFORE_START.search(reason):
        return not any("running" in state or "terminated" in state for state in states)
    if IMAGE.match(reason):  # one event has the registry's message; the others only report the next try
        waits = any("Image" in state.get("waiting", {}).get("reason", "") for state in states)
        return waits and reason == "Failed" and not text.startswith("Error: ")
    if reason == "Unhealthy":  # a probe fails until an ordinary start is over
        begun = condition(pod, "PodScheduled").get("lastTransitionTime") or pod["metadata"].get("creationTimestamp")
        restarted = any(each.get("restartCount") for each in pod.get("status", {}).get("containerStatuses") or [])
        is_late = _seconds_since(begun) > START and text.startswith("Readiness")
        return text.startswith("Liveness") or restarted or is_late
    return True


def _lacks_pods(item: dict[str, Any], release: Release) -> bool:
    """Whether a workload has fewer pods than it wants, and has not ended."""
    if any(condition(item, kind).get("status") == "True" for kind in ("Complete", "Failed")):
        return False
    if item["kind"] == "Job":
        wanted = item["spec"].get("parallelism", 1) - item.get("status", {}).get("succeeded", 0)
        return len(release.pods("trainer")) < wanted
    have = release.pods("tensorboard" if item["kind"] == "Deployment" else "trainer")
    return len(have) < item["spec"].get("replicas", 1)
