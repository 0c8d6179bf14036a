"""Volumes of the pods' own (`local.enabled`): whose they are, that no value gets stuck on them, and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml
from chart_helpers import (
    CHART,
    LOCAL,
    NFS,
    VALUES,
    component,
    container,
    helm,
    one,
    pods,
    refused,
    render,
    run,
    trainer,
)
from k8scifar.config import loading

pytestmark = pytest.mark.helm
FOLDER = (*LOCAL, "--set=local.hostPath=/srv/k8scifar")
CLASS = (*LOCAL, "--set=local.storageClassName=fast")


def claim_template(objects: list[dict]) -> dict:
    (found,) = one(objects, "StatefulSet")["spec"]["volumeClaimTemplates"]
    return found


def test_each_pod_has_one_claim_for_data_and_checkpoints_and_may_write_both():
    objects = render(*LOCAL)
    template = claim_template(objects)
    assert template["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "10Gi"}}}
    pod = trainer(objects)
    assert not any("persistentVolumeClaim" in volume for volume in pod["volumes"])
    for item in pod["containers"] + pod["initContainers"]:
        mounts = {mount["mountPath"]: mount for mount in item["volumeMounts"]}
        for path in ("/volumes/dataset", "/volumes/checkpoints"):
            assert mounts[path] == {"name": template["metadata"]["name"], "mountPath": path}, item["name"]
    kinds = [item["kind"] for item in objects]
    assert "PersistentVolume" not in kinds and "PersistentVolumeClaim" not in kinds
    assert one(objects, "StatefulSet")["spec"]["persistentVolumeClaimRetentionPolicy"] == {
        "whenDeleted": "Retain",
        "whenScaled": "Retain",
    }
    lost = one(render(*LOCAL, "--set=keepVolumes=false"), "StatefulSet")["spec"]
    assert lost["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] == "Delete"
    assert claim_template(render(*CLASS))["spec"]["storageClassName"] == "fast"


def test_a_volume_that_belongs_to_root_is_made_the_pods():
    for pod in pods(render(*LOCAL, "--set=user.gid=7")):
        assert pod["securityContext"]["fsGroup"] == 7
    assert trainer(render(*LOCAL, "--set=user.fsGroup=0"))["securityContext"]["fsGroup"] == 0


def test_folders_of_the_machines_are_kept_for_one_pods_claim_each():
    objects = render(*FOLDER, "--namespace=lab", "--set=nodes=3,train.global_batch=720")
    workload = one(objects, "StatefulSet")["metadata"]["name"]
    volumes = [item for item in objects if item["kind"] == "PersistentVolume"]
    assert [item["spec"]["claimRef"]["name"] for item in volumes] == [
        f"local-{workload}-{number}" for number in range(3)
    ]
    template = claim_template(objects)["spec"]
    for item in volumes:
        spec = item["spec"]
        assert spec["hostPath"] == {"path": "/srv/k8scifar", "type": "Directory"}
        assert spec["claimRef"]["namespace"] == item["metadata"]["labels"]["k8scifar/namespace"] == "lab"
        # What binds a claim to the volume that is kept for it.
        assert spec["storageClassName"] == template["storageClassName"] == ""
        assert spec["accessModes"] == template["accessModes"]
        assert spec["capacity"]["storage"] == template["resources"]["requests"]["storage"]
        assert item["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    for item in render(*FOLDER, "--set=keepVolumes=false"):
        assert "helm.sh/resource-policy" not in item["metadata"].get("annotations", {})


def test_what_derives_from_the_workloads_name_follows_it():
    objects = render(*LOCAL, "--set=completion.policy=scaleDown")
    name = one(objects, "StatefulSet")["metadata"]["name"]
    assert re.fullmatch("cifar-[0-9a-f]{8}", name)
    assert one(objects, "StatefulSet")["spec"]["serviceName"] == "cifar"
    assert f"--master-addr={name}-0.cifar.default.svc.cluster.local" in container(trainer(objects))["args"]
    assert {"name": "K8SCIFAR_STATEFULSET", "value": name} in container(trainer(objects))["env"]
    assert one(objects, "Role")["rules"][0]["resourceNames"] == [name]
    notes = run(*LOCAL, "--dry-run=client", verb="install").stdout.partition("NOTES:")[2]
    assert f"delete pod {name}-0\n" in notes and f"local-{name}-0 and so on" in notes
    assert "delete pods,pvc,configmaps -l" in notes and "WARNING" not in notes
    assert "sudo chown 1000:1000 /srv/k8scifar" in run(*FOLDER, "--dry-run=client", verb="install").stdout


def readers(*options: str) -> dict[str, dict]:
    """The pods beside the training that read pod 0's volume."""
    objects = render(*LOCAL, *options)
    found = {"status": component(objects, "Pod", "status")["spec"]}
    if "--set=tensorboard.enabled=false" not in options:
        found["tensorboard"] = component(objects, "Deployment", "tensorboard")["spec"]["template"]["spec"]
    for spec in found.values():
        (volume,) = (each for each in spec["volumes"] if each["name"] == "checkpoints")
        claim = f"local-{one(objects, 'StatefulSet')['metadata']['name']}-0"
        assert volume["persistentVolumeClaim"]["claimName"] == claim
    return found


def beside(spec: dict) -> dict[str, str]:
    """The labels of the pod on whose machine a pod must be."""
    (term,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    return term["labelSelector"]["matchLabels"]


def test_what_reads_pod_0s_volume_is_on_pod_0s_machine():
    first = {"statefulset.kubernetes.io/pod-name": f"{one(render(*LOCAL), 'StatefulSet')['metadata']['name']}-0"}
    tainted = "--set=tolerations[0].operator=Exists,tensorboard.tolerations[0].key=a"
    for spec in readers(tainted).values():
        assert beside(spec) == first
        assert {"operator": "Exists"} in spec["tolerations"], "pod 0's machine may be tainted"
    scaled = readers("--set=completion.policy=scaleDown")
    assert beside(scaled["tensorboard"]) == first
    # There is no pod 0 any more then, but TensorBoard stays.
    assert beside(scaled["status"])["app.kubernetes.io/component"] == "tensorboard"
    alone = readers("--set=completion.policy=scaleDown", "--set=tensorboard.enabled=false")
    assert "affinity" not in alone["status"]
    assert "affinity" not in component(render(*NFS), "Deployment", "tensorboard")["spec"]["template"]["spec"]


def test_the_trainer_is_told_and_shared_volumes_keep_their_configuration(tmp_path):
    path = tmp_path / "train.yaml"
    for options, storage in ((LOCAL, "local"), ((*LOCAL, "--set=train.distributed=null"), "local"), (NFS, "shared")):
        text = one(render(*options), "ConfigMap", config_name(options))["data"]
        path.write_text(text["train.yaml"])
        assert loading.load(path).distributed.storage == storage
    assert "storage" not in path.read_text(), "a change of the configuration would restart trainings"


def config_name(options: tuple[str, ...]) -> str:
    (volume,) = (each for each in trainer(render(*options))["volumes"] if each["name"] == "config")
    return volume["configMap"]["name"]


# What the API server refuses to change in a StatefulSet.
FIXED = ("serviceName", "podManagementPolicy", "selector", "volumeClaimTemplates")
CHANGES = [
    "train.epochs=9,train.name=other",
    "image.tag=v2,image.repository=reg/k8s",
    "nodes=1,processesPerNode=2,keepVolumes=false",
    "user.uid=5,user.gid=6,user.fsGroup=7",
    "dataset.source=synthetic,dataset.folder=d,checkpoints.folder=r",
    "dataset.size=9Gi,checkpoints.size=9Gi,dataset.accessMode=ReadWriteOnce",
    "workload.labels.a=b,podLabels.c=d,workload.annotations.e=f",
    "hostNetwork=true,completion.policy=scaleDown,gpu.enabled=true",
]


def fixed(objects: list[dict]) -> tuple[str, dict]:
    workload = one(objects, "StatefulSet")
    return workload["metadata"]["name"], {key: workload["spec"].get(key) for key in FIXED}


@pytest.mark.parametrize("options", [LOCAL, FOLDER], ids=["class", "folder"])
def test_no_value_changes_what_a_statefulset_can_not_change(options, tmp_path):
    before = fixed(render(*options))
    for change in CHANGES:
        assert fixed(render(*options, f"--set={change}")) == before, change
    if options is FOLDER:
        assert fixed(render(*options, "--set=local.size=99Gi")) == before, "a folder has no size"
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    later = chart / "Chart.yaml"
    later.write_text(re.sub(r"(?m)^(version|appVersion): .*$", r"\1: 9.9.9", later.read_text()))
    assert fixed(render(*options, chart=chart)) == before, "of a new version of the chart"


def test_another_place_is_another_statefulset():
    """So an upgrade from any to any makes a new one, with claims of its own, and deletes the former."""
    places = [
        NFS,
        LOCAL,
        CLASS,
        FOLDER,
        (*LOCAL, "--set=local.hostPath=/other"),
        (*LOCAL, "--set=local.storageClassName=b"),
    ]
    names = [one(render(*options), "StatefulSet")["metadata"]["name"] for options in places]
    assert len(set(names)) == len(places) and names[0] == "cifar"
    # Its pods are found by the same service and policy, and keep clear of the former's.
    for options in places:
        objects = render(*options)
        labels = one(objects, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
        assert labels == one(render(*NFS), "StatefulSet")["spec"]["template"]["metadata"]["labels"]
        assert one(objects, "Service", "cifar")["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize("major", [3, 4])
def test_another_size_leaves_the_claims_of_a_statefulset_that_is_there(api, major):
    """Helm asks the (small) API server for it; another size would be refused there, and with it the upgrade."""
    there = one(render(*LOCAL), "StatefulSet")
    there["metadata"]["annotations"] |= {f"meta.helm.sh/release-{key}": value for key, value in OWNER.items()}

    def installed() -> tuple[str, str]:
        api.command("cluster")  # writes the kubeconfig
        words = ["install", "cifar", str(CHART), f"-f={VALUES / 'local.yaml'}", "--set=local.size=20Gi"]
        words += ["--dry-run=server", "--disable-openapi-validation"]
        done = subprocess.run([helm(major), *words], env=api.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        manifest, _, notes = done.stdout.partition("NOTES:")
        objects = [item for item in yaml.safe_load_all(manifest.partition("MANIFEST:")[2]) if item]
        return claim_template(objects)["spec"]["resources"]["requests"]["storage"], notes

    size, notes = installed()
    assert size == "20Gi" and "WARNING" not in notes
    api.items = [there]
    size, notes = installed()
    assert size == "10Gi" and "WARNING: local.size is 20Gi, but the claims were made with 10Gi" in notes
    assert '"requests":{"storage":"20Gi"}' in notes


OWNER = {"name": "cifar", "namespace": "default"}


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("two-node.yaml",),
            "or use a volume for each pod without a server: -f values/local.yaml (local.enabled=true)",
        ),
        ((*LOCAL, "--set=nfs.server=a"), "local.enabled and nfs.server are both set"),
        ((*LOCAL, "--set=dataset.storageClassName=a"), "local.enabled and dataset.storageClassName are both set"),
        ((*LOCAL, "--set=checkpoints.hostPath=/a"), "local.enabled and checkpoints.hostPath are both set"),
        ((*LOCAL, "--set=dataset.nfs.server=a,dataset.nfs.path=/a"), "local.enabled and dataset.nfs.server are both"),
        ((*LOCAL, "--set=checkpoints.existingClaim=a"), "local.enabled and checkpoints.existingClaim are both set"),
        ((*LOCAL, "job.yaml"), "is for a StatefulSet: a Job can't give each pod a claim; set workload.kind="),
        ((*FOLDER, "--set=local.storageClassName=a"), "local.storageClassName and local.hostPath are both set"),
        ((*FOLDER, "--set=podAntiAffinity.mode=preferred"), "pods on one machine would share its folder /srv/k8scifar"),
        ((*NFS, "--set=local.storageClassName=a"), "local.enabled is false: set it to true, or leave"),
        ((*NFS, "--set=local.hostPath=/a"), "local.hostPath is set, but local.enabled is false"),
        ((*LOCAL, "--set=train.distributed.storage=shared"), "storage"),
        ((*LOCAL, "--set=local.existingClaim=a"), "existingClaim"),
        ((*LOCAL, "--set=local.size=big"), "local.size"),
        ((*LOCAL, "--set=dataset.folder=runs"), "give them different names"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(options, words, major):
    said = refused(*options, major=major)
    assert words in said and not re.search("nil pointer|executing", said)
