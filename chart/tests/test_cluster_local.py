"""The cluster's tools where each pod has a volume of its own: node 0's is read, another's where that can't be."""

from __future__ import annotations

import copy
import json

import kubernetes_validate
import pytest
from chart_helpers import LOCAL, one, render
from cluster_stage import RUNNING, everything_runs, installed, node, own_claims, pod

pytestmark = pytest.mark.helm
SPREAD = "0/2 nodes are available: 1 node(s) didn't match PersistentVolume's node affinity."
OFF = "0/2 nodes are available: 1 node(s) had untolerated taint(s), 1 node(s) had volume node affinity conflict."
FULL = "0/2 nodes are available: 1 Insufficient memory, 1 node(s) had volume node affinity conflict."


@pytest.fixture(scope="module")
def local() -> list[dict]:
    return render(*LOCAL)


@pytest.fixture(scope="module")
def name(local) -> str:
    return one(local, "StatefulSet")["metadata"]["name"]


def waits(objects: list[dict], name: str, message: str) -> dict:
    """A pod for which no machine was found."""
    found = pod(objects, name, "trainer", RUNNING)
    del found["spec"]["nodeName"]
    unfit = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return found | {"status": {"phase": "Pending", "conditions": [unfit]}}


def claim_on(objects: list[dict], name: str, machine: str) -> None:
    """The class has made a claim's volume on this machine."""
    found = one(objects, "PersistentVolumeClaim", name)
    found["metadata"]["annotations"] = {"volume.kubernetes.io/selected-node": machine}
    found["spec"]["storageClassName"] = "local-path"


def read(stage, *words: str) -> tuple[str, str]:
    """What `make results` says, and the pod that it read through; empty where it made one."""
    done = stage.run("cluster", "results", *words)
    assert done.returncode == 0, done.stderr
    asked = [line for line in stage.said("exec") if " tar " in line]
    return done.stdout, asked[-1].split()[1]


def made(stage) -> list[dict]:
    return [json.loads(call["given"]) for call in stage.calls if call["given"]]


def test_status_and_results_are_node_0s(stage, local, name, run_folder):
    stage.objects(everything_runs(local))
    told = stage.run("cluster", "status").stdout
    assert f"StatefulSet {name} in default: 2 of 2 pod(s) ready" in told
    assert f"volume local-{name}-0: unknown\n" in told and f"volume local-{name}-1: unknown\n" in told
    assert "training, 1 epoch(s)" in told and "older" not in told
    said, reader = read(stage)
    assert reader == "cifar-tensorboard-x" and "copied 3 files" in said, "without the checkpoints"
    trainers = [pod(local, f"{name}-{index}", "trainer", RUNNING) for index in (0, 1)]
    stage.objects(installed(local, *trainers))
    assert read(stage)[1] == f"{name}-0", "node 1's pod runs, but has another volume"
    assert read(stage, f"--claim=local-{name}-1")[1] == f"{name}-1"


def test_a_pod_is_made_on_node_0s_machine(stage, local, name, run_folder):
    """Its own pod is there, but hangs: the volume can be mounted on no other machine."""
    hangs = pod(local, f"{name}-0", "trainer", {"waiting": {"reason": "CrashLoopBackOff"}})
    hangs["spec"]["nodeName"] = "node-b"
    stage.objects(installed(local, hangs, pod(local, f"{name}-1", "trainer", RUNNING)))
    assert read(stage)[1].startswith("cifar-reader-")
    (reader,) = made(stage)
    kubernetes_validate.validate(reader, "1.37", strict=True)
    assert reader["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == f"local-{name}-0"
    chosen = reader["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert chosen["nodeSelectorTerms"][0]["matchFields"][0]["values"] == ["node-b"]
    assert reader["spec"]["securityContext"]["fsGroup"] == 1000


@pytest.mark.parametrize("why", ["its machine is gone", "its volume is empty"])
def test_results_of_another_node_where_node_0s_can_not_be_had(stage, local, name, run_folder, why):
    gone = why == "its machine is gone"
    first = waits(local, f"{name}-0", SPREAD) if gone else pod(local, f"{name}-0", "trainer", RUNNING)
    stage.objects(installed(local, first, pod(local, f"{name}-1", "trainer", RUNNING)))
    (stage.home / "pod.json").write_text(json.dumps({"status": waits(local, "reader", SPREAD)["status"]}))
    (stage.home / ("never" if gone else "empty")).write_text(f"{name}-0")
    said, reader = read(stage)
    assert reader == f"{name}-1"
    reason = (
        "it can't be read (not scheduled: 0/2 nodes" if gone else "there is no run folder /volumes/checkpoints/runs"
    )
    assert f"local-{name}-0: {reason}" in said
    assert f"reading another node's copy, local-{name}-1, with its checkpoints" in said
    assert (stage.home / "results" / "cifar" / "checkpoints" / "step-1.pt").exists(), "another node may have these only"
    # Who asks for one claim gets that one.
    done = stage.run("cluster", "results", f"--claim=local-{name}-0")
    assert done.returncode == 2 and "another node" not in done.stdout
    if gone:
        assert len(stage.said("delete pod")) == len(made(stage)) == 2, "the pods go whatever happens"


def test_results_after_helm_uninstall(stage, local, name, run_folder):
    notes = one(local, "ConfigMap", "cifar-local")
    assert notes["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    notes = copy.deepcopy(notes)
    notes["metadata"]["annotations"] |= {"k8scifar/image": "reg/k8s:v7", "k8scifar/user": "5:6"}
    stage.objects([notes, *reversed(own_claims(local))])
    told = stage.run("cluster", "status").stdout
    assert "not installed any more" in told and f"volume local-{name}-1" in told
    read(stage)
    (reader,) = made(stage)
    assert reader["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == f"local-{name}-0"
    assert reader["spec"]["containers"][0]["image"] == "reg/k8s:v7"
    assert reader["spec"]["securityContext"]["runAsUser"] == 5


def test_claims_of_former_values_are_told_apart(stage, local, name, run_folder):
    """After an upgrade to another class: the former claims are kept, and CLAIM=... reads them."""
    former = own_claims(render(*LOCAL, "--set=local.storageClassName=slow"))
    for item in former:
        item["metadata"]["creationTimestamp"] = "2026-01-03T00:00:00Z"
    stage.objects([*former, *everything_runs(local)])
    told = stage.run("cluster", "status").stdout
    old = [item["metadata"]["name"] for item in former]
    assert (
        f"volume local-{name}-1: unknown, in use\n" in told and f"volume {old[0]}: unknown, not in use, kept\n" in told
    )
    said, _ = read(stage)
    assert f"reading local-{name}-0, in use; older claims were kept, which CLAIM=... reads: {', '.join(old)}" in said
    stage.objects([*own_claims(local), *former, one(local, "ConfigMap", "cifar-local")])  # after helm uninstall
    read(stage)
    assert made(stage)[-1]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == old[0], "of the newest"


@pytest.mark.parametrize(
    ("message", "machines", "typed"),
    [
        (SPREAD, ["node-a"], "kubectl -n default delete pvc/{claim} pod/{pod}"),
        (OFF, ["node-a", "node-b"], "kubectl delete node node-b && kubectl -n default delete pvc/{claim} pod/{pod}"),
        (FULL, ["node-a", "node-b"], ""),
    ],
)
def test_a_machine_that_was_replaced_is_told_with_what_to_type(stage, local, name, message, machines, typed):
    objects = installed(local, pod(local, f"{name}-0", "trainer", RUNNING), waits(local, f"{name}-1", message))
    claim_on(objects, f"local-{name}-1", "node-b")
    state = "True" if message == FULL else "Unknown"
    stage.objects(objects)
    stage.nodes(*(node(each, state if each == "node-b" else "True") for each in machines))
    told = stage.run("cluster", "status").stdout
    assert f"pod {name}-1: not scheduled: 0/2 nodes" in told
    words = (
        f"  {name}-1: if node-b is gone for good, another one can take its place, and gets data and checkpoint from "
    )
    lines = [line for line in told.splitlines() if line.startswith(words)]
    wanted = typed.format(claim=f"local-{name}-1", pod=f"{name}-1")
    assert [line.partition("type: ")[2] for line in lines] == ([wanted] if typed else []), told


def test_a_lost_machine_is_told_where_nodes_may_not_be_seen(stage, local, name):
    objects = installed(local, pod(local, f"{name}-0", "trainer", RUNNING), waits(local, f"{name}-1", SPREAD))
    stage.objects(objects)
    (stage.home / "forbidden").touch()
    told = stage.run("cluster", "status").stdout
    assert f"{name}-1: if the machine of its volume is gone for good" in told
    assert f"type: kubectl -n default delete pvc/local-{name}-1 pod/{name}-1\n" in told
    # While a pod is bound to the lost machine, it goes only after that, which takes who may see nodes.
    objects[-1] |= {"spec": objects[-1]["spec"] | {"nodeName": "node-b"}, "status": {"conditions": []}}
    stage.objects(objects)
    assert "type:" not in stage.run("cluster", "status").stdout


def test_a_folders_pod_needs_no_new_claim(stage):
    objects = render(*LOCAL, "--set=local.hostPath=/srv/k8scifar")
    name = one(objects, "StatefulSet")["metadata"]["name"]
    away = pod(objects, f"{name}-1", "trainer", RUNNING)
    away["spec"]["nodeName"] = "node-b"
    stage.objects(installed(objects, pod(objects, f"{name}-0", "trainer", RUNNING), away))
    stage.nodes(node("node-a"), node("node-b", "Unknown"))
    assert "type: kubectl delete node node-b\n" in stage.run("cluster", "status").stdout
    stage.nodes(node("node-a"), node("node-b"))
    assert "type:" not in stage.run("cluster", "status").stdout


def test_no_default_storage_class_is_one_line(stage, local, name):
    """The API server writes the default's name into a claim; where it has none, none is there."""
    objects = installed(local, *(waits(local, f"{name}-{index}", "unbound immediate") for index in (0, 1)))
    claims = [item for item in objects if item["kind"] == "PersistentVolumeClaim"]
    for claim in claims:
        claim["status"] = {"phase": "Pending"}
    stage.objects(objects)
    told = stage.run("cluster", "status").stdout
    (line,) = (line for line in told.splitlines() if "StorageClass" in line)
    assert "the cluster has no default StorageClass: `kubectl get storageclass` lists" in line
    assert "--set local.storageClassName=NAME" in line and "type:" not in told
    for claim in claims:
        claim["spec"]["storageClassName"] = "local-path"  # which waits for its pod
    stage.objects(objects)
    assert "StorageClass" not in stage.run("cluster", "status").stdout


def test_diagnose_tells_it_too(stage, local, name):
    import tarfile

    objects = installed(local, pod(local, f"{name}-0", "trainer", RUNNING), waits(local, f"{name}-1", SPREAD))
    claim_on(objects, f"local-{name}-1", "node-b")
    stage.objects(objects)
    done = stage.run("diagnose")
    assert done.returncode == 0, done.stderr
    (path,) = (stage.home / "results").glob("diagnose-cifar-*.tar.gz")
    with tarfile.open(path) as tar:
        (text,) = (tar.extractfile(each).read().decode() for each in tar.getnames() if each.endswith("claims.txt"))
    assert f"volume local-{name}-0: unknown\n" in text and f"delete pvc/local-{name}-1 pod/{name}-1\n" in text
