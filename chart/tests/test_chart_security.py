"""Restricted Pod Security as installed, and a scan of what is rendered with its exceptions reasoned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chart_helpers import FILES, LOCAL, NFS, layers, pods, render, run

pytestmark = pytest.mark.helm
EVERYTHING = (
    *NFS,
    "--set=completion.policy=scaleDown,tensorboard.ingress.enabled=true,tensorboard.ingress.host=a.example",
)
FOLDER = (*LOCAL, "--set=local.hostPath=/srv/k8scifar")
# What the scan may find, and why that is as it should be.
EXCEPTIONS = {
    "CKV_K8S_9": "readiness: the trainer serves nobody, and a rolling upgrade must not wait for its training",
    "CKV_K8S_11": "CPU limits only slow a training down; they can be set by value",
    "CKV_K8S_15": "IfNotPresent, so that an image loaded into a cluster without a registry works; by value",
    "CKV_K8S_38": "the token is mounted only with completion.policy=scaleDown, which needs it",
    "CKV_K8S_40": "user id 1000 owns the files on NFS, as a laptop's first user does; by value",
    "CKV_K8S_43": "the tag is the chart's own version; image.digest pins it",
}
TEST_POD = {
    "CKV_K8S_8": "liveness: `helm test` runs once and ends by itself",
    "CKV2_K8S_6": "it listens on no port that a NetworkPolicy could close",
}
# Volume types that the restricted Pod Security Standard admits.
ADMITTED = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


@pytest.mark.parametrize("options", [*map(layers, FILES), EVERYTHING, FOLDER], ids=[*FILES, "everything", "folder"])
def test_restricted_pod_security(options):
    found = pods(render(*options))
    assert len(found) == 3  # the workload's, TensorBoard's and the test's
    for pod in found:
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["securityContext"].get("fsGroup") == (1000 if set(LOCAL) & set(options) else None)
        for volume in pod["volumes"]:
            assert set(volume) - {"name"} <= ADMITTED
        for container in pod["containers"] + pod.get("initContainers", []):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            assert not {"privileged", "runAsUser", "procMount", "seccompProfile"} & set(context)
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert {"requests", "limits"} <= set(container["resources"])


def test_no_pod_has_a_token_it_does_not_need():
    assert [pod["automountServiceAccountToken"] for pod in pods(render(*NFS))] == [False] * 3
    assert sorted(pod["automountServiceAccountToken"] for pod in pods(render(*EVERYTHING))) == [False, False, True]


@pytest.mark.slow
def test_scan_finds_only_what_is_reasoned(tmp_path):
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv, which runs the scanner, is not beside this Python")
    scanner = [str(uv), "tool", "run", "--quiet", "--from", "checkov==3.3.4", "checkov"]
    if subprocess.run([*scanner, "--version"], capture_output=True, check=False, timeout=240).returncode:
        pytest.skip("checkov can't be downloaded here")
    for name, options in (("everything", EVERYTHING), ("job", layers("job.yaml"))):
        (tmp_path / f"{name}.yaml").write_text(run(*options, f"--namespace={name}").stdout)
    scan = [*scanner, "-d", str(tmp_path), "--framework", "kubernetes", "--skip-download", "-o", "json"]
    done = subprocess.run(scan, capture_output=True, text=True, check=False, timeout=240)
    results = json.loads(done.stdout)
    assert results["summary"]["passed"] > 300
    found = {
        (check["check_id"], check["resource"]): check["check_name"] for check in results["results"]["failed_checks"]
    }
    odd = {
        key: words
        for key, words in found.items()
        if key[0] not in EXCEPTIONS and not (key[0] in TEST_POD and key[1].endswith("cifar-status"))
    }
    assert odd == {}
    assert set(EXCEPTIONS) | set(TEST_POD) == {check for check, _ in found}, "an exception is no longer needed"
