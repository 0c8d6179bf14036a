"""What a pod does when training is done: the marker that says so, holding, and scaling its own workload to zero."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from k8scifar.config import Config

MARKER = "summary.json"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def summary(run_dir: Path) -> dict | None:
    """The run's summary, which the trainer writes as its very last act; None while there is no whole one."""
    try:
        values = json.loads((run_dir / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def finished(config: Config) -> dict | None:
    """The summary of a run that has trained all the epochs this configuration asks for, else None."""
    found = summary(config.run_dir)
    epochs = found.get("epochs") if found else None
    return found if isinstance(epochs, int) and epochs >= config.epochs else None


def leave_message(text: str, environment: Mapping[str, str]) -> None:
    """Write one line where the kubelet finds a container's termination message, if this is a container of a pod."""
    named = environment.get("K8SCIFAR_TERMINATION_LOG")
    path = Path(named or "/dev/termination-log")
    with contextlib.suppress(OSError):
        if text and (named or path.exists()):
            path.write_text(f"{text[:1000]}\n")


def touch_heartbeat() -> None:
    """Tell the orchestrator's liveness probe that training moves: touch the file K8SCIFAR_HEARTBEAT names, if any."""
    if path := os.environ.get("K8SCIFAR_HEARTBEAT"):
        with contextlib.suppress(OSError):  # a full disk must not end the training
            Path(path).touch()


class Heartbeat:
    """The file whose age a liveness probe reads; the ranks renew it each step, the supervisor while none trains."""

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        self._mine = 0

    def touch(self) -> None:
        """Renew it; a full disk must not end the training."""
        if self.path:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch()
                self._mine = self.path.stat().st_mtime_ns

    def touch_unless_others(self) -> None:
        """Renew it unless a rank has done so since: from then on its age is the ranks' alone."""
        if self.path:
            with contextlib.suppress(OSError):
                if self.path.stat().st_mtime_ns == self._mine:
                    self.touch()


def hold(heartbeat: Heartbeat, stopped: Callable[[], bool], seconds: float = 10.0) -> None:
    """Idle until `stopped()`; renews the heartbeat each `seconds`."""
    while not stopped():
        heartbeat.touch()
        end = time.monotonic() + seconds
        while not stopped() and time.monotonic() < end:
            time.sleep(0.5)


def scale_down(statefulset: str, sleep: Callable[[float], None] = time.sleep, tries: int = 5) -> str | None:
    """`scale_to_zero`, tried several times with growing pauses; None, or why the last try failed."""
    if not statefulset:
        return "K8SCIFAR_STATEFULSET is not set"
    for attempt in range(tries):
        problem = scale_to_zero(statefulset)
        if problem is None or attempt == tries - 1:
            return problem
        sleep(2.0 * (attempt + 1))
    return None


def scale_to_zero(statefulset: str, account: Path = SERVICE_ACCOUNT, timeout: float = 10.0) -> str | None:
    """Set this StatefulSet's replicas to 0 through the Kubernetes API; None, or why it failed, in one line."""
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
