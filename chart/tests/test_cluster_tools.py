"""`make status`, `logs`, `results`, `tensorboard-cluster`: kubectl is a stand-in.

The objects are the chart's own, rendered by Helm; every command line that kubectl was given is shown to a real kubectl.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import kubernetes_validate
import pytest
from chart_helpers import NFS, ROOT, one, render
from cluster_stage import RUNNING, event, everything_runs, installed, pod

pytestmark = pytest.mark.helm


@pytest.mark.parametrize("tool", ["status", "logs", "results", "tensorboard", "diagnose"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no kubectl", "kubectl is not on PATH"),
        (
            "no cluster",
            "no cluster answers: start it, or choose another of `kubectl config get-contexts` by CONTEXT=...",
        ),
        ("no release", "there is no release cifar in namespace default; install it"),
    ],
)
def test_what_is_missing_is_one_line_and_exit_code_2(stage, tool, what, words):
    if what == "no cluster":
        refused = "The connection to the server localhost:8080 was refused - did you specify the right host?"
        (stage.home / "broken").write_text(refused)
    name, action = ("diagnose", ()) if tool == "diagnose" else ("cluster", (tool,))
    done = stage.run(name, *action, **({"kubectl": "none"} if what == "no kubectl" else {}))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words}") and len(done.stderr.splitlines()) == 1
    assert not (stage.home / "results").exists()


def test_status_tells_pods_volumes_warnings_and_progress(stage, rendered):
    broken = {"waiting": {"reason": "CrashLoopBackOff", "message": "k8scifar: preflight: user 1000:1000 can't write"}}
    trainers = [pod(rendered, "cifar-0", "trainer", RUNNING), pod(rendered, "cifar-1", "trainer", broken, "preflight")]
    stage.objects(installed(rendered, *trainers, pod(rendered, "cifar-tensorboard-x", "tensorboard", RUNNING)))
    warning = event(trainers[1], "FailedKillPod", "can't be\nkilled")
    stage.events(warning, warning | {"involvedObject": {"kind": "Pod", "name": "another"}})
    done = stage.run("cluster", "status")
    assert done.returncode == 0, done.stderr
    assert "StatefulSet cifar in default: 1 of 2 pod(s) ready" in done.stdout
    assert "pod cifar-0 on node-a: trainer running, restarted 2 times" in done.stdout
    assert (
        "pod cifar-1 on node-a: preflight CrashLoopBackOff: ended with exit code 14: k8scifar: preflight: user"
        in done.stdout
    )
    assert re.search("volume cifar-checkpoints-[0-9a-f]{8}: unknown", done.stdout)
    assert "warning: cifar-1: FailedKillPod: can't be killed" in done.stdout and "another" not in done.stdout
    assert "cifar: training, 1 epoch(s) finished" in done.stdout
    (asked,) = stage.said("exec")
    assert asked.startswith("exec cifar-tensorboard-x --container=tensorboard -- k8scifar status ")
    assert asked.endswith(" /volumes/checkpoints/runs/cifar")


def test_logs_follow_the_trainers_once_all_have_started(stage, rendered):
    stage.objects(everything_runs(rendered))
    assert stage.run("cluster", "logs").returncode == 0
    (asked,) = stage.said("logs")
    assert "--selector=app.kubernetes.io/instance=cifar,app.kubernetes.io/component=trainer" in asked
    assert "--container=trainer --prefix" in asked and "--follow" in asked
    stage.run("cluster", "logs", "--previous", "--tail=7")
    assert stage.said("logs")[1].endswith("--previous --tail=7") and "--follow" not in stage.said("logs")[1]


def test_logs_show_the_container_a_pod_is_at(stage, rendered):
    waiting = pod(rendered, "cifar-1", "trainer", RUNNING, "prepare")
    stage.objects(installed(rendered, pod(rendered, "cifar-0", "trainer", RUNNING), waiting))
    done = stage.run("cluster", "logs")
    assert "cifar-1 is at prepare: running" in done.stdout
    assert [line.split(" --tail")[0] for line in stage.said("logs")] == [
        "logs cifar-1 --container=prepare",
        "logs cifar-0 --container=trainer",
    ]


def test_logs_of_a_job_that_is_done(stage):
    objects = render(*NFS, "job.yaml")
    ended = {"terminated": {"exitCode": 0}}
    stage.objects(installed(objects, *(pod(objects, f"cifar-{index}-x", "trainer", ended) for index in (0, 1))))
    assert "pod cifar-0-x on node-a: trainer done" in stage.run("cluster", "status").stdout
    assert stage.run("cluster", "logs").returncode == 0
    (asked,) = stage.said("logs")
    assert "--container=trainer" in asked


def test_tensorboard_is_forwarded(stage, rendered):
    stage.objects(everything_runs(rendered))
    done = stage.run("cluster", "tensorboard", "--port=7007")
    assert done.returncode == 0 and "http://localhost:7007/" in done.stdout
    assert stage.said("port-forward") == ["port-forward --address=localhost service/cifar-tensorboard 7007:6006"]
    stage.objects(installed(render(*NFS, "--set=tensorboard.enabled=false")))
    assert "tensorboard.enabled=true" in stage.run("cluster", "tensorboard").stderr


@pytest.mark.parametrize("cut", [False, True])
def test_results_come_through_a_pod_that_runs(stage, rendered, run_folder, cut):
    stage.objects(everything_runs(rendered))
    if cut:  # the stream ends at the border of a block, as tar alone would not notice
        (stage.home / "cut").touch()
    done = stage.run("cluster", "results")
    assert done.returncode == 0, done.stderr
    target = stage.home / "results" / "cifar"
    assert sorted(path.name for path in target.iterdir() if path.name[0] != ".") == [
        "model.safetensors",
        "report.html",
        "summary.json",
    ]
    assert (target / "model.safetensors").read_bytes() == (run_folder / "model.safetensors").read_bytes()
    assert "test accuracy 90.00% after 3 epochs" in done.stdout
    assert ("trying again" in done.stderr) is cut
    assert [path.name for path in target.parent.iterdir()] == ["cifar"], "nothing temporary stays"
    stage.run("cluster", "results", "--checkpoints")
    assert (target / "checkpoints" / "step-1.pt").exists()
    assert not stage.said("create")


def test_results_without_pods_come_through_one_made_for_it(stage, rendered, run_folder):
    stage.objects(installed(rendered))
    done = stage.run("cluster", "results", "--release=cifar")
    assert done.returncode == 0, done.stderr
    assert (stage.home / "results" / "cifar" / "summary.json").exists()
    made = json.loads(next(call["given"] for call in stage.calls if call["given"]))
    check_reader(made)
    assert made["spec"]["containers"][0]["image"] == one(rendered, "Deployment")["spec"]["template"]["spec"][
        "containers"
    ][0]["image"]  # fmt: skip
    assert [line.split()[2] for line in stage.said("delete")] == [made["metadata"]["name"]]
    (stage.home / "never").touch()
    (stage.home / "pod.json").write_text(json.dumps({"status": {"phase": "Pending", "containerStatuses": [
        {"name": "reader", "state": {"waiting": {"reason": "ErrImagePull"}}}]}}))  # fmt: skip
    failed = stage.run("cluster", "results")
    assert failed.returncode == 2 and "did not start in 180 s (ErrImagePull)" in failed.stderr
    assert len(stage.said("delete")) == 2, "the pod goes whatever happens"


def test_results_after_helm_uninstall(stage, rendered, run_folder):
    kept = [item for item in copy.deepcopy(rendered) if item["kind"] == "PersistentVolumeClaim"]
    stage.objects(kept)
    assert "not installed any more" in stage.run("cluster", "status").stdout
    done = stage.run("cluster", "results", "--image=busybox:1.36")
    assert done.returncode == 0, done.stderr
    made = json.loads(next(call["given"] for call in stage.calls if call["given"]))
    check_reader(made)
    assert made["spec"]["containers"][0]["image"] == "busybox:1.36"
    assert made["spec"]["securityContext"]["runAsUser"] == 1000


def check_reader(made: dict) -> None:
    """It may read the checkpoints and nothing else, ends by itself, and fits restricted Pod Security."""
    for minor in ("1.27", "1.37"):
        kubernetes_validate.validate(made, minor, strict=True)
    spec = made["spec"]
    (container,) = spec["containers"]
    (volume,) = spec["volumes"]
    assert re.fullmatch("cifar-checkpoints-[0-9a-f]{8}", volume["persistentVolumeClaim"]["claimName"])
    assert container["volumeMounts"][0]["readOnly"] is True
    assert spec["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["activeDeadlineSeconds"] == 3600 and spec["restartPolicy"] == "Never"


def test_results_of_no_run_and_of_a_hostile_one(stage, rendered, run_folder):
    stage.objects(everything_runs(rendered))
    done = stage.run("cluster", "results", "--run-dir=/volumes/checkpoints/runs/other")
    assert done.returncode == 2 and "there is no run folder /volumes/checkpoints/runs/other" in done.stderr
    (run_folder / "link").symlink_to("/etc/passwd")
    done = stage.run("cluster", "results")
    assert done.returncode == 2 and "link, which is not a plain file" in done.stderr
    assert not list((stage.home / "results").iterdir())


def test_a_real_kubectl_takes_every_command_line(stage, rendered, run_folder, tmp_path):
    """Shown to kubectl with a server that refuses connections: a wrong verb or option is refused before that."""
    real = shutil.which("kubectl")
    if not real:
        pytest.skip("needs kubectl on PATH")
    stage.objects(everything_runs(rendered))
    for words in (("status",), ("logs",), ("results",), ("tensorboard",)):
        stage.run("cluster", *words)
    stage.run("diagnose")
    early = pod(rendered, "cifar-1", "trainer", RUNNING, "prepare")
    stage.objects(installed(rendered, early))
    stage.run("cluster", "logs")
    stage.run("cluster", "results", "--context=here")
    config = tmp_path / "kubeconfig"
    cluster = {"name": "here", "cluster": {"server": "http://127.0.0.1:1"}}
    context = {"name": "here", "context": {"cluster": "here", "user": ""}}
    config.write_text(json.dumps({"clusters": [cluster], "contexts": [context], "current-context": "here"}))
    distinct = {}
    for call in stage.calls:
        options = sorted(word.partition("=")[0] for word in call["words"] if word.startswith("--"))
        distinct[tuple([*call["words"][:2], *options])] = call

    def shown(call: dict) -> str:
        return subprocess.run(
            [real, *call["words"]], input=call["given"] or "", text=True, capture_output=True, timeout=60,
            env={"KUBECONFIG": str(config), "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        ).stderr  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        for call, said in zip(distinct.values(), pool.map(shown, distinct.values()), strict=True):
            assert "127.0.0.1:1" in said and "refused" in said, (call["words"], said)
    verbs = {call["words"][1] if call["words"][1][:2] != "--" else call["words"][2] for call in stage.calls}
    assert {"get", "describe", "logs", "exec", "create", "wait", "delete", "port-forward"} <= verbs


def test_make_calls_the_tools_with_the_choices_of_a_person(stage, rendered, run_folder):
    stage.objects(everything_runs(rendered))
    command = ["make", "--no-print-directory", "-C", str(ROOT), "logs", "RELEASE=other", "NAMESPACE=lab", "CONTEXT=far"]
    environment = os.environ | {"PATH": f"{stage.bin}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {"--namespace=lab", "--context=far"} <= set(stage.calls[-1]["words"])
    assert "instance=other" in " ".join(stage.calls[-1]["words"])
