"""Scale the pod's StatefulSet to zero through the Kubernetes API, once training is done."""

from __future__ import annotations

import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def scale_down(statefulset: str, sleep: Callable[[float], None] = time.sleep, tries: int = 5) -> str | None:
    """Retry `scale_to_zero` with growing pauses; None, or why the last try failed."""
    if not statefulset:
        return "K8SCIFAR_STATEFULSET is not set"
    for attempt in range(tries):
        problem = scale_to_zero(statefulset)
        if problem is None or attempt == tries - 1:
            return problem
        sleep(2.0 * (attempt + 1))
    return None


def scale_to_zero(statefulset: str, account: Path = SERVICE_ACCOUNT, timeout: float = 10.0) -> str | None:
    """Set this StatefulSet's replicas to 0; None, or why it failed, in one line."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        return "not in a pod: KUBERNETES_SERVICE_HOST is not set"
    try:
        token = (account / "token").read_text().strip()
        namespace = (account / "namespace").read_text().strip()
        context = ssl.create_default_context(cafile=str(account / "ca.crt"))
    except OSError as error:
        return f"no service account in the pod ({error.strerror or error})"
    host = f"[{host}]" if ":" in host else host
    request = urllib.request.Request(
        f"https://{host}:{port}/apis/apps/v1/namespaces/{namespace}/statefulsets/{statefulset}/scale",
        data=json.dumps({"spec": {"replicas": 0}}).encode(),
        method="PATCH",
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout, context=context):
            return None
    except urllib.error.HTTPError as error:
        return f"the API server answered {error.code} {error.reason}; is the release's Role in place?"
    except OSError as error:
        return f"the API server can't be reached ({getattr(error, 'reason', error)})"
