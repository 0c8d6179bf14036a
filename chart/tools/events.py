"""The events of a cluster that still matter to a release: what keeps it from going on, or struck it lately."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from typing import Any

from kube import Release
from kube_objects import condition, statuses
from pod_states import is_ready

SHOWN = 5
LATELY = 3600  # seconds for which a blow that is over is still told
FRESH = 120  # seconds in which an ordinary start may warn of what settles by itself
# Something was done to a pod from outside; told for a while, whatever became of it.
BLOWS = re.compile(r"Evicted|Preempt|OOM|TaintManager|NodeNotReady|NodeShutdown|ExceededGracePeriod|SystemOOM")
BEFORE_START = re.compile(r"Mount|Attach|MapVolume|Sandbox|NetworkNotReady|HostPort|FailedBinding")
IMAGE = re.compile(r"^(Failed|BackOff|ErrImage\w*|InspectFailed)$")
# A kubelet that asks for a pod's objects before it may see them; it asks again.
RACE = re.compile(r"no relationship found between node|failed to sync \w+ cache|object .* not registered", re.I)
# What the lines on pods, claims and the workload say already.
TOLD = re.compile(
    r"^(FailedScheduling|BackoffLimitExceeded|DeadlineExceeded|PodFailurePolicy|NotTriggerScaleUp|FailedNeedsStart)$"
)


def news(release: Release) -> list[str]:
    """Up to SHOWN events, the newest last: object, reason, message, and how long ago where it is over."""
    answer = release.kubectl.run("get", "events", "--output=json", "--request-timeout=20s", timeout=30)
    if answer.returncode:
        return []
    now = datetime.now(timezone.utc)
    found: dict[tuple[str, str, str], tuple[float, str]] = {}
    for event in sorted(json.loads(answer.stdout)["items"], key=lambda event: -age(event, now)):
        about = event["involvedObject"]
        words = " ".join((event.get("message") or "").split())
        said = matters(event, about, words, release, age(event, now))
        if said is not None:
            found[about.get("name", ""), event.get("reason", ""), words] = (age(event, now), said)
    return [f"{name}: {reason}: {words}{said}" for (name, reason, words), (_, said) in list(found.items())[-SHOWN:]]


def age(event: dict[str, Any], now: datetime) -> float:
    """Seconds since an event was seen last; 0 where it does not say when."""
    series = event.get("series") or {}
    seen = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return since(seen or event["metadata"].get("creationTimestamp"), now)


def since(moment: str | None, now: datetime) -> float:
    """Seconds since a moment as the cluster writes it; 0 for none."""
    if not moment:
        return 0.0
    return (now - datetime.fromisoformat(re.sub(r"\.\d+", "", moment).replace("Z", "+00:00"))).total_seconds()


def matters(event: dict[str, Any], about: dict[str, Any], words: str, release: Release, seconds: float) -> str | None:
    """None for what is over or ordinary; else what to add to the line: how long ago, or nothing."""
    reason, kind, name = event.get("reason", ""), about.get("kind", ""), about.get("name", "")
    objects = release.objects.get(kind, []) if kind else [item for items in release.objects.values() for item in items]
    item = next((each for each in objects if each["metadata"]["name"] == name), None)
    if item is None and kind == "ReplicaSet":  # the Deployment's
        item = next(
            (each for each in release.objects.get("Deployment", []) if name.startswith(each["metadata"]["name"] + "-")),
            None,
        )
    own = item is not None or (kind == "Pod" and name.startswith(tuple(owners(release))))
    if not own:
        return None
    if BLOWS.search(reason):
        return f" ({seconds / 60:.0f} min ago)" if seconds < LATELY else None
    if event.get("type", "Warning") != "Warning" or item is None or TOLD.match(reason):
        return None
    uid = about.get("uid")
    if uid and item["metadata"].get("uid", uid) != uid and kind != "ReplicaSet":
        return None  # of a former object of that name
    if item["kind"] == "Pod":
        return "" if of_pod(item, reason, words, seconds) else None
    if item["kind"] == "PersistentVolumeClaim":
        return "" if item.get("status", {}).get("phase") != "Bound" else None
    return "" if short_of_pods(item, release) else None


def owners(release: Release) -> list[str]:
    """How the names of a release's pods begin."""
    kinds = ("StatefulSet", "Job", "Deployment")
    return [f"{item['metadata']['name']}-" for kind in kinds for item in release.objects.get(kind, [])]


def of_pod(pod: dict[str, Any], reason: str, words: str, seconds: float) -> bool:
    """Whether a warning about a pod still holds."""
    if is_ready(pod) or pod.get("status", {}).get("phase") == "Succeeded":
        return False
    states = statuses(pod)
    if RACE.search(words) and seconds < FRESH:
        return False
    if BEFORE_START.search(reason):
        return not any("running" in each["state"] or "terminated" in each["state"] for each in states)
    if IMAGE.match(reason):  # the one with the registry's own words; the others only say that it will be tried again
        waits = any(
            "waiting" in each["state"] and "Image" in each["state"]["waiting"].get("reason", "") for each in states
        )
        return waits and reason == "Failed" and not words.startswith("Error: ")
    if reason == "Unhealthy":  # a probe of an ordinary start fails until the start is over
        begun = condition(pod, "PodScheduled").get("lastTransitionTime") or pod["metadata"].get("creationTimestamp")
        old = since(begun, datetime.now(timezone.utc)) > FRESH
        again = any(each.get("restartCount") for each in pod.get("status", {}).get("containerStatuses") or [])
        return words.startswith("Liveness") or again or (old and words.startswith("Readiness"))
    return True


def short_of_pods(item: dict[str, Any], release: Release) -> bool:
    """Whether a workload has fewer pods than it wants, and is not over."""
    if any(condition(item, kind).get("status") == "True" for kind in ("Complete", "Failed")):
        return False
    if item["kind"] == "Job":
        wanted = item["spec"].get("parallelism", 1) - item.get("status", {}).get("succeeded", 0)
        return len(release.pods("trainer")) < wanted
    have = release.pods("tensorboard" if item["kind"] == "Deployment" else "trainer")
    return len(have) < item["spec"].get("replicas", 1)
