"""Find a pod through which a volume can be read, or make one for the time of reading."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from typing import Any

from kube import MOUNT, Release, ToolError
from kube_objects import named, note
from pod_states import state_of
from volumes import LOCAL, mounted

START_SECONDS = 180  # for the start of a pod that reads
SCHEDULE_SECONDS = 30  # for finding that pod a machine, if another claim has a copy


class OutOfReach(ToolError):
    """A claim's run can't be read; another claim may have a copy."""


@contextlib.contextmanager
def reading(release: Release, claim: str, image: str, alone: bool) -> Iterator[tuple[str, str]]:
    """A pod and its container that can read the claim; `alone`: no other claim has a copy. Raises ToolError."""
    if reader := release.reader(claim):
        yield reader
        return
    pod = reader_pod(release, image, claim)
    name = named(pod)
    print(f"no running pod can read the volume: starting pod {name} for it", flush=True)
    release.kubectl.ask("create", "--filename=-", given=json.dumps(pod))
    try:
        if not alone and not _reaches(release, name, "PodScheduled", SCHEDULE_SECONDS):
            raise OutOfReach(f"it can't be read ({_state(release, name)})")
        if not _reaches(release, name, "Ready", START_SECONDS):
            state = _state(release, name)
            raise ToolError(f"pod {name} did not start in {START_SECONDS} s ({state}); IMAGE=... chooses another image")
        yield name, "reader"
    finally:
        release.kubectl.run("delete", "pod", name, "--wait=false", "--ignore-not-found")


def _reaches(release: Release, pod: str, condition: str, seconds: int) -> bool:
    """Whether a pod has a condition within so many seconds."""
    words = ("wait", f"--for=condition={condition}", f"pod/{pod}", f"--timeout={seconds}s")
    return release.kubectl.run(*words, timeout=seconds + 30).returncode == 0


def _state(release: Release, pod: str) -> str:
    items = release.kubectl.items("pod", pod)
    return state_of(items[0])[1] if items else "it is gone"


def reader_pod(release: Release, image: str, claim: str) -> dict[str, Any]:
    """A sleeping pod that mounts the claim read-only, with the security settings of the release's pods."""
    if not claim:
        raise ToolError(f"release {release.name} has no claim: install it again, then make results")
    settings, its_image = _settings(release, claim)
    if not (image or its_image):
        raise ToolError("which image shall read the volume? IMAGE=name:tag, any with sh and tar")
    container = {
        "name": "reader",
        "image": image or its_image,
        "command": ["sh", "-c", "trap exit TERM; sleep 3600 & wait"],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "volumeMounts": [{"name": "checkpoints", "mountPath": MOUNT, "readOnly": True}],
    }
    spec = settings | {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "activeDeadlineSeconds": 3600,  # in case nobody deletes it
        "containers": [container],
        "volumes": [{"name": "checkpoints", "persistentVolumeClaim": {"claimName": claim}}],
    }
    if machine := next((pod["spec"]["nodeName"] for pod in release.pods("trainer") if _holds(pod, claim)), ""):
        term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [machine]}]}
        rule = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
        spec["affinity"] = {"nodeAffinity": rule}
    labels = {"app.kubernetes.io/instance": release.name, "app.kubernetes.io/component": "reader"}
    metadata = {"name": f"{release.name[:40]}-reader-{secrets.token_hex(3)}", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _settings(release: Release, claim: str) -> tuple[dict[str, Any], str]:
    """The settings and the image of the release's pods; from its annotations if it is uninstalled."""
    for item in release.carriers():
        if template := item.get("spec", {}).get("template"):
            keys = ("securityContext", "imagePullSecrets", "nodeSelector", "tolerations")
            pod = template["spec"]
            return {key: pod[key] for key in keys if pod.get(key)}, pod["containers"][0]["image"]
    kept = [item for item in release.claims() if named(item) == claim]
    kept += release.objects.get("ConfigMap", [])  # it has the annotations if a StatefulSet made the claims
    user = next(filter(None, (note(item, "user") for item in kept)), "1000:1000")
    uid, _, gid = user.partition(":")
    security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    security |= {"runAsUser": int(uid), "runAsGroup": int(gid)}
    return {"securityContext": security}, next(filter(None, (note(item, "image") for item in kept)), "")


def _holds(pod: dict[str, Any], claim: str) -> bool:
    """Whether the claim is this pod's own on its machine, so that no other machine can mount it."""
    return pod["spec"].get("nodeName", "") != "" and mounted(pod["spec"]).get(LOCAL) == claim
