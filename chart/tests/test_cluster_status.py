"""What `make status` tells of a release in trouble, and what it leaves out; a real kubectl asks a small server."""

from __future__ import annotations

import copy
import shutil
import subprocess

import pytest
from chart_helpers import NFS, one, render
from cluster_stage import RUNNING, event, everything_runs, installed, node, pod

pytestmark = [
    pytest.mark.helm,
    pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl on PATH"),
]


@pytest.fixture
def status(api):
    """``status(objects...)``: what is told of them."""

    def run(*items: dict, nodes: tuple[dict, ...] = (node("node-a"),)) -> str:
        api.items = [*items, *nodes]
        done = api.run("cluster", "status")
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout

    return run


def lost(found: dict, name: str) -> dict:
    """A pod as the node controller leaves it, once its machine does not answer any more: it still says running."""
    found = copy.deepcopy(found)
    found["spec"]["nodeName"] = name
    next(each for each in found["status"]["conditions"] if each["type"] == "Ready")["status"] = "False"
    return found


def test_a_pod_whose_node_is_off_is_not_told_as_running(api, status, rendered):
    pods = [pod(rendered, "cifar-0", "trainer", RUNNING), lost(pod(rendered, "cifar-1", "trainer", RUNNING), "node-b")]
    off = node("node-b", "Unknown", "Kubelet stopped posting node status.")
    told = status(*installed(rendered, *pods), nodes=(node("node-a"), off))
    assert "StatefulSet cifar in default: 1 of 2 pod(s) ready" in told
    line = next(line for line in told.splitlines() if "pod cifar-1" in line)
    assert "unknown: node node-b is NotReady since 2026-01-01T00:00:00Z: Kubelet stopped posting node status." in line
    assert line.endswith("it was trainer running, restarted 2 times before")
    # A machine taken out of the cluster, and a person who may not look at machines.
    assert "unknown: node node-b is no longer in the cluster" in status(*installed(rendered, *pods))
    api.refuse(403, "Forbidden", 'nodes is forbidden: User "me" cannot list resource "nodes"', "/nodes")
    assert "pod cifar-1 on node-b: unknown: node node-b is off" in status(*installed(rendered, *pods))
    gone = copy.deepcopy(pods)
    gone[1]["metadata"]["deletionTimestamp"] = "2026-01-01T00:05:00Z"
    assert "being deleted (since 2026-01-01T00:05:00Z)" in status(*installed(rendered, *gone))


def test_a_release_whose_node_is_off_is_not_told_as_training(stage, rendered):
    pods = [pod(rendered, "cifar-0", "trainer", RUNNING), lost(pod(rendered, "cifar-1", "trainer", RUNNING), "node-b")]
    stage.objects(installed(rendered, *pods))
    stage.nodes(node("node-a"), node("node-b", "Unknown"))
    told = stage.run("cluster", "status").stdout
    assert told.endswith("cifar: waits until cifar-1 is back; before: training, 1 epoch(s) finished\n")
    # Nor is a command sent to a pod that can't answer.
    stage.objects(installed(rendered, lost(pods[0], "node-b"), pods[1]))
    told = stage.run("cluster", "status").stdout
    assert "epoch" not in told and len(stage.said("exec")) == 1


def job(conditions: list[dict], **state: int) -> list[dict]:
    objects = render(*NFS, "job.yaml")
    one(objects, "Job")["status"] = {"conditions": conditions, **state}
    return objects


@pytest.mark.parametrize(
    ("conditions", "state", "words"),
    [
        (
            [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "too often"}],
            {"failed": 3},
            "Failed: BackoffLimitExceeded: too often",
        ),
        ([{"type": "Complete", "status": "True"}], {"succeeded": 2}, "Complete: 2 of 2 pod(s) done"),
        ([], {"active": 2, "failed": 1}, "0 of 2 pod(s) ready, 1 failed so far"),
    ],
)  # fmt: skip
def test_a_job_says_how_it_ended(status, conditions, state, words):
    told = status(*installed(job(conditions, **state)))
    assert told.splitlines()[0].endswith(f" in default: {words}"), told


def test_a_suspended_job_waits_for_its_queue(status):
    objects = job([])
    one(objects, "Job")["spec"]["suspend"] = True
    assert "suspended by a queue, or by hand" in status(*installed(objects))


def test_the_last_reason_of_a_container_stays(status, rendered):
    again = pod(rendered, "cifar-0", "trainer", RUNNING)
    ended = {"exitCode": 137, "reason": "OOMKilled", "message": ""}
    again["status"]["containerStatuses"][0]["lastState"] = {"terminated": ended}
    init = pod(rendered, "cifar-1", "trainer", RUNNING, "prepare")
    before = {"exitCode": 2, "reason": "Error", "message": "k8scifar: error: there is no such archive"}
    init["status"]["initContainerStatuses"][-1]["lastState"] = {"terminated": before}
    told = status(*installed(rendered, again, init))
    assert (
        "cifar-0 on node-a: trainer running, restarted 2 times (the last ended with exit code 137 (OOMKilled))" in told
    )
    line = next(line for line in told.splitlines() if "cifar-1" in line)
    assert "prepare running, restarted 2 times (the last ended with exit code 2: k8scifar: error: there is no" in line


def test_why_a_pod_waits(status, rendered):
    pending = pod(rendered, "cifar-0", "trainer", RUNNING)
    unfit = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/2 nodes: too little memory",
    }
    pending["status"] = {"phase": "Pending", "conditions": [unfit]}
    del pending["spec"]["nodeName"]
    image = {"waiting": {"reason": "ErrImagePull"}}
    waiting = pod(rendered, "cifar-1", "trainer", image, "preflight")
    waiting["status"]["initContainerStatuses"][-1]["state"]["waiting"]["message"] = "manifest unknown"
    evicted = pod(rendered, "cifar-2", "trainer", RUNNING)
    evicted["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    told = status(
        *installed(rendered, pending, waiting, evicted), event(pending, "FailedScheduling", "0/2 nodes: too little")
    )
    assert "pod cifar-0: not scheduled: 0/2 nodes: too little memory" in told
    assert "pod cifar-1 on node-a: preflight ErrImagePull: manifest unknown" in told
    assert "pod cifar-2 on node-a: failed: Evicted: The node was low on resource: memory." in told
    assert "warning" not in told, "the pod's line says it already"


def test_a_pod_beside_ours_is_not_taken_for_the_training(status, rendered):
    meshed = pod(rendered, "cifar-0", "trainer", {"waiting": {"reason": "CreateContainerConfigError"}})
    meshed["status"]["containerStatuses"].insert(0, {"name": "istio-proxy", "state": RUNNING, "ready": True})
    meshed["spec"]["initContainers"].append({"name": "proxy", "restartPolicy": "Always"})
    meshed["status"]["initContainerStatuses"].append({"name": "proxy", "state": RUNNING})
    assert "cifar-0 on node-a: trainer CreateContainerConfigError" in status(*installed(rendered, meshed))


def revised(found: dict, revision: str) -> dict:
    found["metadata"]["labels"]["controller-revision-hash"] = revision
    return found


def test_a_rollout_that_is_held_up_is_told_with_what_to_type(status, rendered):
    broken = {"waiting": {"reason": "ImagePullBackOff"}}
    old = revised(pod(rendered, "cifar-0", "trainer", broken, "preflight"), "cifar-1111")
    new = revised(pod(rendered, "cifar-1", "trainer", RUNNING, "prepare"), "cifar-2222")
    objects = installed(rendered, old, new)
    one(objects, "StatefulSet")["status"] = {"currentRevision": "cifar-1111", "updateRevision": "cifar-2222"}
    told = status(*objects)
    assert "cifar-0: has the former settings and is not ready, which blocks the rollout" in told
    assert "type: kubectl -n default delete pod cifar-0\n" in told
    old |= {"status": pod(rendered, "cifar-0", "trainer", RUNNING)["status"]}
    told = status(*objects[:-2], old, new)
    assert "rollout: cifar-0 still has the former settings, and is replaced once cifar-1 is ready" in told
    assert "delete pod" not in told
    revised(old, "cifar-2222")
    assert "rollout" not in status(*objects[:-2], old, new)


def test_warnings_of_an_ordinary_start_are_left_out(status, rendered):
    objects = everything_runs(rendered)
    starting = pod(rendered, "cifar-1", "trainer", RUNNING, "prepare")
    objects = [item for item in objects if item["metadata"]["name"] != "cifar-1"] + [starting]
    starting["metadata"]["creationTimestamp"] = event(starting, "", "", 40)["lastTimestamp"]
    for claim in (item for item in objects if item["kind"] == "PersistentVolumeClaim"):
        claim["status"] = {"phase": "Bound"}
    pods = {item["metadata"]["name"]: item for item in objects if item["kind"] == "Pod"}
    race = 'User "system:node:b" cannot get configmap: no relationship found between node "b" and this object'
    noise = [
        event(pods["cifar-tensorboard-x"], "Unhealthy", "Startup probe failed: connection refused", 20),
        event(starting, "Unhealthy", "Startup probe failed: stat: cannot statx '/tmp/heartbeat'", 10),
        event(starting, "FailedMount", race, 30),
        event(pods["cifar-0"], "FailedScheduling", "0/2 nodes are available", 200),
        event(pods["cifar-0"], "FailedMount", "MountVolume.SetUp failed: timed out", 900),
        event(pods["cifar-0"], "BackOff", "Back-off restarting failed container", 900),
        event(one(objects, "StatefulSet"), "FailedCreate", "exceeded quota", 900),
        event(next(i for i in objects if i["kind"] == "PersistentVolumeClaim"), "ProvisioningFailed", "no class", 900),
        event(pods["cifar-0"] | {"metadata": {"name": "cifar-0", "uid": "former"}}, "FailedKillPod", "gone", 900),
        event(pods["cifar-0"], "Evicted", "low on memory", 90_000),
    ]
    assert "warning" not in status(*objects, *noise)


def test_warnings_that_matter_are_told(status, rendered):
    waiting = pod(rendered, "cifar-1", "trainer", {"waiting": {"reason": "PodInitializing"}}, "preflight")
    objects = installed(rendered, waiting)
    claim = next(item for item in objects if item["kind"] == "PersistentVolumeClaim")
    claim["status"] = {"phase": "Pending"}
    replicas = {"kind": "ReplicaSet", "metadata": {"name": "cifar-tensorboard-5d"}}
    blow = event({"kind": "Pod", "metadata": {"name": "cifar-0", "uid": "former"}}, "Evicted", "low on memory", 600)
    told = status(
        *objects,
        event(waiting, "FailedMount", "MountVolume.SetUp failed: access denied by server", 700),
        event(one(objects, "StatefulSet"), "FailedCreate", "violates PodSecurity", 650),
        event(replicas, "FailedCreate", "exceeded quota", 640),
        event(claim, "ProvisioningFailed", "storageclass not found", 620),
        blow,
        event({"kind": "Pod", "metadata": {"name": "another-0"}}, "FailedMount", "not ours"),
    )
    assert [line.strip() for line in told.splitlines() if "warning" in line] == [
        "warning: cifar-1: FailedMount: MountVolume.SetUp failed: access denied by server",
        "warning: cifar: FailedCreate: violates PodSecurity",
        "warning: cifar-tensorboard-5d: FailedCreate: exceeded quota",
        f"warning: {claim['metadata']['name']}: ProvisioningFailed: storageclass not found",
        "warning: cifar-0: Evicted: low on memory (10 min ago)",
    ]


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ((401, "Unauthorized", "Unauthorized"), "does not take your credentials"),
        (
            (403, "Forbidden", 'pods is forbidden: User "me" cannot list resource "pods" in API group "" in the '
             'namespace "default"', "/namespaces/"),
            "me may not list pods in namespace default: another NAMESPACE=...",
        ),
        ((500, "InternalError", "etcd is down", "/namespaces/"), "kubectl get: Error from server"),
    ],
)  # fmt: skip
def test_what_the_cluster_refuses_is_one_line(api, rendered, refused, words):
    api.items = everything_runs(rendered)
    api.refuse(*refused)
    done = api.run("cluster", "status")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_kinds_that_may_not_be_seen_are_done_without(api, rendered):
    api.items = [*everything_runs(rendered), node("node-a")]
    api.refuse(403, "Forbidden", 'services is forbidden: User "me" cannot list resource "services"', "/services")
    done = api.run("cluster", "status")
    assert done.returncode == 0 and "StatefulSet cifar in default: 2 of 2 pod(s) ready" in done.stdout, done.stderr


def test_wrong_contexts_releases_and_credentials_are_one_line(api, rendered):
    api.items = [dict(item, metadata=item["metadata"] | {"namespace": "lab"}) for item in everything_runs(rendered)]
    api.config["users"] = [
        {
            "name": "cloud",
            "user": {
                "exec": {
                    "apiVersion": "client.authentication.k8s.io/v1",
                    "command": "no-such-login",
                    "interactiveMode": "Never",
                }
            },
        }
    ]
    api.config["contexts"].append({"name": "cloud", "context": {"cluster": "off", "user": "cloud"}})
    off = {"name": "off", "cluster": {"server": "https://127.0.0.1:1"}}
    api.config["clusters"].append(off)
    api.config["contexts"].append({"name": "off", "context": {"cluster": "off", "user": ""}})
    expected = {
        "--context=nowhere": "error: kubectl knows no such context; `kubectl config get-contexts` lists those it knows",
        "--context=cloud": "error: the cluster does not take your credentials",
        "--context=off": "error: no cluster answers: start it, or choose another",
        "--namespace=other": "error: there is no release cifar in namespace other (there is cifar in namespace lab);",
    }  # fmt: skip
    for option, words in expected.items():
        done = api.run("cluster", "status", option)
        assert done.returncode == 2 and done.stderr.startswith(words), (option, done.stderr)
        assert len(done.stderr.splitlines()) == 1


def test_logs_of_pods_that_have_not_come_so_far(api, rendered):
    waiting = pod(rendered, "cifar-1", "trainer", RUNNING, "prepare")
    early = pod(rendered, "cifar-0", "trainer", {"waiting": {"reason": "ImagePullBackOff"}}, "preflight")
    api.items = installed(rendered, early, waiting)
    done = api.run("cluster", "logs")
    assert done.returncode == 0, done.stderr
    assert "log of preflight" in done.stdout and "log of prepare" in done.stdout


def test_a_silent_cluster_is_one_line(stage):
    said = (
        "Unable to connect to the server: net/http: request canceled (Client.Timeout exceeded while awaiting headers)"
    )
    (stage.home / "broken").write_text(said)
    done = stage.run("cluster", "status")
    assert done.returncode == 2 and "the cluster does not answer in time: is it on" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_had_enough_is_no_fault(api, rendered):
    """As `make status | head -1`, with so much to tell that the pipe is full."""
    first = pod(rendered, "cifar-0", "trainer", RUNNING)
    pods = [first | {"metadata": first["metadata"] | {"name": f"cifar-{number}"}} for number in range(2000)]
    api.items = [*installed(rendered, *pods), node("node-a")]
    piped = subprocess.Popen(api.command("cluster", "status"), env=api.environment, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert piped.stdout.readline().startswith("StatefulSet cifar")
    piped.stdout.close()
    assert piped.stderr.read() == "" and piped.wait(timeout=60) == 0
