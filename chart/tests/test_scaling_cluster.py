"""`make scaling NODES=2`: a training on each number of nodes, what is kept, and every way in which it ends."""

from __future__ import annotations

import json
import re

import pytest
from chart_helpers import NFS, VALUES, helm
from cluster_stage import RUNNING, event, node, pod
from helm_stage import Helm
from kube import Kubectl, ToolError
from kube_writes import keeping
from scaling_chart import helm as helm_tool
from scaling_cluster import fitting, main
from scaling_record import draw

pytestmark = pytest.mark.helm
HELM, DRAW = helm_tool.run, draw
OPTIONS = ("-f", str(VALUES / NFS[0]), NFS[1])
THREE = "--set=train.micro_batch=20"  # other batches than the recipe's


@pytest.fixture
def cluster(stage, monkeypatch) -> Helm:
    """Two machines, kubectl's stand-in on PATH, Helm's in place, and results in a folder of the test's."""
    stage.nodes(node("node-a"), node("node-b"))
    found = Helm(stage)
    helm()  # skips where none can be had
    monkeypatch.setattr(helm_tool, "run", found)
    monkeypatch.setattr("scaling_record.draw", lambda path, folder: True)
    monkeypatch.setenv("PATH", f"{stage.bin}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(stage.home))
    monkeypatch.chdir(stage.home)
    return found


def scale(*words: str, nodes: int = 2, options: tuple[str, ...] = OPTIONS) -> int:
    """As make calls the tool, but without patience."""
    quick = ("--poll=0.02", "--patience=0.2", "--epochs=2")
    return main([f"--nodes={nodes}", *quick, *words, "--", *options])


def record(cluster: Helm) -> dict:
    return json.loads((cluster.stage.home / "results" / "cifar-scaling" / "scaling.json").read_text())


def installs(cluster: Helm) -> list[str]:
    return [re.search(r"nodes=(\d+)", " ".join(call))[1] for call in cluster.calls if call[0] == "upgrade"]


def test_one_release_after_the_other_then_the_picture_then_nothing(cluster, capsys, monkeypatch):
    """A real Helm, and a server that keeps what it writes; a picture that is drawn."""
    monkeypatch.setattr("scaling_record.draw", DRAW)
    monkeypatch.setenv("HELM", helm())
    with keeping(cluster.stage.home) as server:
        server.command("none")
        monkeypatch.setenv("KUBECONFIG", server.environment["KUBECONFIG"])
        cluster.real, cluster.items = HELM, lambda: server.items
        assert scale("--context=here") == 0
        assert {item["kind"] for item in server.items} == {"PersistentVolume", "PersistentVolumeClaim"}
    said = capsys.readouterr().out
    assert installs(cluster) == ["1", "2"] and cluster.calls[-1] == ["uninstall", "cifar-scaling"]
    found = record(cluster)
    assert [each["images_per_second"] for each in found["measured"]] == [115.0, 207.0], "of the last epoch"
    assert found["measured"][1]["machines"] == ["node-a", "node-b"]
    assert [each["run"] for each in found["measured"]] == [f"scaling-{n}-{found['series']}" for n in (1, 2)]
    assert "  nodes=1: 115.0 images/s\n  nodes=2: 207.0 images/s\n" in said
    text = (cluster.stage.home / "results/cifar-scaling/scaling.md").read_text()
    assert "| nodes | images/s" in text and "| 2 | 207.0 | 1.80 | 0.90 |" in text
    assert "Speed-up is over one node, node-a." in text and "torch 2.13.0" in text
    assert "2 nodes (node-a, node-b): bf16; 115.0, 98.0 images/s alone at 16 pixels, 207.0 together, 0.97 of" in text
    assert (cluster.stage.home / "results/cifar-scaling/scaling.png").stat().st_size > 10_000
    claims = re.search("its claims stay, with data set and runs: (.*); to delete them:\n  (.*)", said)
    assert len(claims[1].split(", ")) == 2
    assert claims[2].startswith("kubectl -n default --context=here delete pods,pvc,configmaps -l")


def test_what_is_measured_is_not_measured_again(cluster, capsys):
    cluster.rates.pop(3)
    cluster.stage.nodes(*map(node, ("node-a", "node-b", "node-c")))
    cluster.states[3] = ({"waiting": {"reason": "ImagePullBackOff"}}, "preflight")
    with pytest.raises(ToolError, match=r"nodes=3: the training failed: .*ImagePullBackOff"):
        scale(nodes=3, options=(*OPTIONS, THREE))
    assert installs(cluster) == ["1", "2", "3"] and [each["count"] for each in record(cluster)["measured"]] == [1, 2]
    series = record(cluster)["series"]
    cluster.rates[3], cluster.states = 290.0, {}
    assert scale(nodes=3, options=(*OPTIONS, THREE)) == 0
    assert installs(cluster) == ["1", "2", "3", "3"] and record(cluster)["series"] == series
    assert "nodes=2: measured before, 207.0 images/s" in capsys.readouterr().out
    # Other values are another series; the former one is kept.
    (cluster.stage.home / "volumes").rename(cluster.stage.home / "former")
    assert scale() == 0 and installs(cluster)[-2:] == ["1", "2"]
    assert record(cluster)["series"] != series
    assert (cluster.stage.home / f"results/cifar-scaling/scaling-{series}.json").exists()
    assert "was measured with other values: kept as" in capsys.readouterr().out


def test_ours_is_laid_over_the_users_values(cluster, capsys):
    cluster.stage.nodes(node("node-a"), node("node-b"))
    job = "workload.kind=Job,completion.policy=hold,fullnameOverride=cifar,elastic.minNodes=1"
    seen = []
    cluster.during = lambda nodes: seen.append(json.loads((cluster.stage.home / "objects.json").read_text())["items"])
    assert scale("--release=mine", options=(*OPTIONS, f"--set={job},train.name=mine,tensorboard.enabled=true")) == 0
    for nodes, items in enumerate(seen, 1):
        (workload,) = (item for item in items if item["kind"] in ("StatefulSet", "Job"))
        assert workload["kind"] == "StatefulSet" and workload["metadata"]["name"] == "mine-scaling-k8scifar"
        assert workload["spec"]["replicas"] == nodes and not [item for item in items if item["kind"] == "Deployment"]
        (trainer,) = workload["spec"]["template"]["spec"]["containers"]
        assert f"--nnodes={nodes}" in trainer["args"] and "--when-done=hold" in trainer["args"]
        assert not [word for word in trainer["args"] if word.startswith("--min-nodes")]
    assert "your values, but as a StatefulSet whose pods stay" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "options", "sentence"),
    [
        (("--nodes=1",), (), "NODES=1: give 2 or more; without NODES, make scaling measures this machine"),
        (("--nodes=two",), (), "NODES=two: give 2 or more"),
        (("--epochs=0",), (), "EPOCHS=0: give 1 or more"),
        (("--release=My_",), (), "RELEASE=My_ is not a release's name"),
        (("--nodes=7",), (), "nodes=7: train.global_batch 240 is 6 micro-batches of 40, which 7 ranks"),
        (("--nodes=3",), (THREE,), r"NODES=3, but 2 of the cluster's machines take .*node-a, node-b\): NODES=2, or"),
        ((), ("--set=node=3",), "additional properties 'node' not allowed"),
        ((), ("--set-string=train.name=x",), r"HELM_ARGS overrules nodes or train.name \(--set-string"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_installed(cluster, words, options, sentence):
    with pytest.raises(ToolError, match=sentence):
        scale(*words, options=(*OPTIONS, *options))
    assert not installs(cluster) and not (cluster.stage.home / "results").exists()


def test_a_file_of_somebody_elses_is_left_alone(cluster):
    other = cluster.stage.home / "results" / "cifar-scaling" / "scaling.json"
    other.parent.mkdir(parents=True)
    other.write_text("[]")
    with pytest.raises(ToolError, match=r"make scaling did not write results/cifar-scaling/scaling.json: move it away"):
        scale()
    assert other.read_text() == "[]" and not installs(cluster)


def test_a_release_of_somebody_elses_is_left_alone(cluster):
    cluster.series = ""
    with pytest.raises(ToolError, match="make scaling did not install release cifar-scaling in namespace default"):
        scale()
    assert {call[0] for call in cluster.calls} == {"template", "get"}


def test_pods_of_other_values_are_gone_before_the_first_training(cluster):
    """They may hang, which would hold a rolling upgrade up."""
    cluster.series = "0ld"
    assert scale() == 0
    verbs = [call[0] for call in cluster.calls if call[0] in ("uninstall", "upgrade")]
    assert verbs == ["uninstall", "upgrade", "upgrade", "uninstall"]


def test_helms_own_refusal_is_told(cluster):
    cluster.refusal = "UPGRADE FAILED: another operation (install/upgrade/rollback) is in progress"
    with pytest.raises(ToolError, match=r"could not install cifar-scaling: UPGRADE FAILED: another.*the same command"):
        scale()


@pytest.mark.parametrize(
    ("state", "at", "progress", "sentence"),
    [
        ({"waiting": {"reason": "ErrImagePull"}}, "preflight", "", "preflight ErrImagePull"),
        ({"terminated": {"exitCode": 2, "message": "unknown key"}}, "", "", "ended with exit code 2: unknown key"),
        (RUNNING, "", "scaling-1-SERIES: failed: node 0: no space", "failed: node 0: no space"),
    ],
)
def test_a_training_that_fails_is_left_for_looking_at(cluster, state, at, progress, sentence):
    def told(nodes: int) -> None:
        (cluster.stage.home / "progress").write_text(progress.replace("SERIES", str(cluster.series)))

    cluster.rates, cluster.states, cluster.during = {}, {1: (state, at)}, told
    with pytest.raises(ToolError, match="nodes=1: the training failed: ") as refused:
        scale("--namespace=lab", "--context=mine")
    assert sentence in str(refused.value)
    typed = "RELEASE=cifar-scaling NAMESPACE=lab CONTEXT=mine"
    assert f"make status {typed}, make logs {typed}; the same command goes on" in str(refused.value)
    assert cluster.calls[-1][0] == "upgrade", "nothing is uninstalled"


@pytest.mark.parametrize("what", ["uninstalled", "upgraded", "silent"])
def test_what_befalls_the_release_meanwhile_is_told(cluster, what):
    def befall(nodes: int) -> None:
        items = json.loads((cluster.stage.home / "objects.json").read_text())["items"]
        if what == "uninstalled":
            cluster.stage.objects([item for item in items if item["kind"] == "PersistentVolumeClaim"])
        elif what == "upgraded":
            (workload,) = (item for item in items if item["kind"] == "StatefulSet")
            workload["metadata"]["annotations"]["k8scifar/run-dir"] = "/volumes/checkpoints/runs/other"
            cluster.stage.objects(items)
        else:
            (cluster.stage.home / "broken").write_text("Unable to connect to the server: no route to host")

    cluster.rates, cluster.during = {}, befall
    words = {"uninstalled": "uninstalled the release", "upgraded": "trains in /volumes/checkpoints/runs/other now"}
    with pytest.raises(ToolError, match=words.get(what, "no cluster answers")):
        scale()


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(cluster, capsys, how):
    def stop(nodes: int) -> None:
        if nodes == 2:
            raise how

    cluster.during = stop
    with pytest.raises(how):
        scale()
    said = capsys.readouterr().out
    assert "stopped; measured so far: 1, kept in results/cifar-scaling/scaling.json" in said
    assert "the same command waits for it again, make uninstall RELEASE=cifar-scaling ends it" in said
    assert [each["count"] for each in record(cluster)["measured"]] == [1] and cluster.series


def test_machines_that_take_a_pod(cluster):
    taint = {"key": "control-plane", "effect": "NoSchedule"}
    away, tainted, other = node("away", "False"), node("tainted"), node("cordoned")
    tainted["spec"], other["spec"] = {"taints": [taint]}, {"unschedulable": True}
    gpu = node("gpu")
    gpu["metadata"]["labels"] = {"kind": "gpu"}
    cluster.stage.nodes(away, tainted, other, gpu)
    kubectl = Kubectl("default")
    assert fitting(kubectl, {}) == ["gpu"]
    assert fitting(kubectl, {"tolerations": [{"operator": "Exists"}]}) == ["tainted", "gpu"]
    assert fitting(kubectl, {"nodeSelector": {"kind": "cpu"}}) == []
    (cluster.stage.home / "forbidden").touch()
    assert fitting(kubectl, {}) is None


def test_other_trainings_in_the_cluster_are_told_of(cluster, rendered, capsys):
    other = pod(rendered, "cifar-0", "trainer", RUNNING)
    other["metadata"]["namespace"] = "lab"
    (cluster.stage.home / "elsewhere").write_text(json.dumps({"items": [other]}))
    cluster.rates, cluster.states = {}, {1: ({"waiting": {"reason": "ErrImagePull"}}, "preflight")}
    cluster.stage.events(event(other, "Failed", "of another"))
    with pytest.raises(ToolError):
        scale()
    assert "release cifar in namespace lab has pods in this cluster: training there" in capsys.readouterr().out
