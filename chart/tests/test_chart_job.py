"""The chart's Job, beside the StatefulSet, and the notes that both print."""

import pytest
from chart_helpers import NFS, container, layers, one, render, run, trainer

pytestmark = pytest.mark.helm


def test_a_job_is_indexed_and_fails_as_a_group():
    objects = render(*layers("job.yaml"))
    job = one(objects, "Job")
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["subdomain"] == "cifar"
    assert spec["backoffLimit"] == 20 and "backoffLimitPerIndex" not in spec
    rules = spec["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules] == [
        ("FailJob", [2]),
        ("Ignore", [3]),
        ("Ignore", None),
    ]
    arguments = container(trainer(objects))["args"]
    assert "--when-done=exit" in arguments
    name = job["metadata"]["name"]
    assert f"--master-addr={name}-0.cifar.default.svc.cluster.local" in arguments
    assert not [item for item in objects if item["kind"] == "StatefulSet"]
    queued = one(render(*layers("kueue.yaml")), "Job")
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"


def test_a_changed_job_gets_another_name():
    def name(*more):
        return one(render(*layers("job.yaml"), *more), "Job")["metadata"]["name"]

    assert name() != name("--set=train.epochs=3")
    assert name() == name("--set=tensorboard.port=80")


def test_both_kinds_have_the_same_pod():
    one_kind, other = trainer(render(*NFS)), trainer(render(*NFS, "--set=workload.kind=Job"))
    for pod in (one_kind, other):
        for key in ("restartPolicy", "subdomain"):
            pod.pop(key, None)
        for item in pod["containers"] + pod["initContainers"]:
            item["args"] = [
                word
                for word in item.get("args", [])
                if not word.startswith(("--master-addr", "--when-done", "--min-nodes", "--elastic"))
            ]
    assert one_kind == other


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_notes_give_three_commands_with_this_releases_names(kind):
    # Helm 3 prints the notes only where it reaches a cluster.
    notes = run(*NFS, f"--set=workload.kind={kind}", "--dry-run=client", "-n=lab", verb="install").stdout
    notes = notes.partition("NOTES:")[2]
    assert "kubectl -n lab logs -f" in notes
    assert "kubectl -n lab port-forward svc/cifar-tensorboard 6006:6006" in notes
    assert "helm -n lab test cifar --logs" in notes
    assert "WARNING" not in notes


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("podAntiAffinity.mode=none", "may share one machine"),
        ("gpu.perNode=2", "gpu.enabled is false"),
        ("keepVolumes=false", "deletes the claims"),
        ("networkPolicy.enabled=false", "can disturb the training"),
        ("dataset.hostPath=/x", "only if they share that folder"),
        ("gpu.enabled=true,processesPerNode=2", "processesPerNode is not used"),
        ("completion.policy=scaleDown,serviceAccountName=x", "serviceAccountName is not used"),
    ],
)
def test_notes_warn(setting, words):
    notes = run(*NFS, f"--set={setting}", "--dry-run=client", verb="install").stdout
    assert "WARNING" in notes and words in notes


@pytest.mark.parametrize(
    ("options", "elastic"),
    [
        ((), True),
        (("--set=nodes=1",), False),
        (("--set=workload.kind=Job",), False),
        (("--set=elastic.enabled=false",), False),
        (("--set=elastic.enabled=true,elastic.minNodes=2,elastic.waitSeconds=300,elastic.growSeconds=9",), True),
    ],
)
def test_a_statefulset_of_several_nodes_goes_on_without_one_unless_told_otherwise(options, elastic):
    found = [word for word in container(trainer(render(*NFS, *options)))["args"] if "elastic" in word or "min-" in word]
    default = ["--min-nodes=1", "--elastic-wait=120", "--elastic-grow=60"]
    given = ["--min-nodes=2", "--elastic-wait=300", "--elastic-grow=9"]
    assert found == ((given if "300" in str(options) else default) if elastic else [])
