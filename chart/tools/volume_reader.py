"""A pod through which a volume is read: one of the release's that runs, or one made for it."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from typing import Any

from kube import MOUNT, Release, ToolError
from kube_objects import note
from pod_states import standing
from volumes import LOCAL, mounted

START_SECONDS = 180  # for the pod that reads a volume nobody else has mounted
PLACE_SECONDS = 30  # for that pod to find a machine, where others have copies


class OutOfReach(ToolError):
    """A claim's run can't be had; another claim may have a copy."""


@contextlib.contextmanager
def reading(release: Release, claim: str, image: str, alone: bool) -> Iterator[tuple[str, str]]:
    """A pod and its container that have the claim mounted; `alone`: no other claim has a copy. Raises ToolError."""
    if reader := release.reader(claim):
        yield reader
        return
    pod = reader_pod(release, image, claim)
    name = pod["metadata"]["name"]
    print(f"no pod that runs has the volume mounted: pod {name} reads it", flush=True)
    release.kubectl.ask("create", "--filename=-", given=json.dumps(pod))
    try:
        if not alone and not reaches(release, name, "PodScheduled", PLACE_SECONDS):
            raise OutOfReach(f"it can't be read ({reason(release, name)})")
        if not reaches(release, name, "Ready", START_SECONDS):
            words = reason(release, name)
            raise ToolError(f"pod {name} did not start in {START_SECONDS} s ({words}); IMAGE=... names another image")
        yield name, "reader"
    finally:
        release.kubectl.run("delete", "pod", name, "--wait=false", "--ignore-not-found")


def reaches(release: Release, pod: str, condition: str, seconds: int) -> bool:
    """Whether a pod has a condition within so many seconds."""
    asked = ("wait", f"--for=condition={condition}", f"pod/{pod}", f"--timeout={seconds}s")
    return release.kubectl.run(*asked, timeout=seconds + 30).returncode == 0


def reason(release: Release, pod: str) -> str:
    """How a pod stands, in words."""
    answer = release.kubectl.run("get", "pod", pod, "--output=json")
    return standing(json.loads(answer.stdout))[1] if answer.returncode == 0 else "it is gone"


def reader_pod(release: Release, image: str, claim: str) -> dict[str, Any]:
    """A pod that sleeps with the checkpoints' volume mounted, hardened as the release's own pods are."""
    if not claim:
        raise ToolError(f"release {release.name} left no claim of its own: install it again, then make results")
    template = next(
        (item["spec"]["template"]["spec"] for item in release.carriers() if "template" in item.get("spec", {})), None
    )
    kept = [item for item in release.claims() if item["metadata"]["name"] == claim]
    kept += release.objects.get("ConfigMap", [])  # of claims that a StatefulSet made
    if template:
        keys = ("securityContext", "imagePullSecrets", "nodeSelector", "tolerations")
        spec = {key: template[key] for key in keys if template.get(key)}
        image = image or template["containers"][0]["image"]
    else:
        user = next(filter(None, (note(item, "user") for item in kept)), "1000:1000")
        uid, _, gid = user.partition(":")
        profile = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        spec = {"securityContext": profile | {"runAsUser": int(uid), "runAsGroup": int(gid)}}
        image = image or next(filter(None, (note(item, "image") for item in kept)), "")
    volume = {"name": "checkpoints", "persistentVolumeClaim": {"claimName": claim}}
    if not image:
        raise ToolError("which image reads the volume? IMAGE=name:tag, any with sh and tar")
    container = {
        "name": "reader",
        "image": image,
        "command": ["sh", "-c", "trap exit TERM; sleep 3600 & wait"],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "volumeMounts": [{"name": "checkpoints", "mountPath": MOUNT, "readOnly": True}],
    }
    if machine := next((pod["spec"]["nodeName"] for pod in release.pods("trainer") if is_on(pod, claim)), ""):
        term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [machine]}]}
        chosen = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
        spec["affinity"] = {"nodeAffinity": chosen}
    labels = {"app.kubernetes.io/instance": release.name, "app.kubernetes.io/component": "reader"}
    # It ends by itself, should nobody be there to delete it.
    life = {"restartPolicy": "Never", "automountServiceAccountToken": False, "activeDeadlineSeconds": 3600}
    metadata = {"name": f"{release.name[:40]}-reader-{secrets.token_hex(3)}", "labels": labels}
    spec |= life | {"containers": [container], "volumes": [volume]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def is_on(pod: dict[str, Any], claim: str) -> bool:
    """Whether a pod holds the claim as its own on its machine, so that nobody elsewhere can mount it."""
    return pod["spec"].get("nodeName", "") != "" and mounted(pod["spec"]).get(LOCAL) == claim
