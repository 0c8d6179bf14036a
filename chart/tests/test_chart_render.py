"""What the chart renders, with real Helm: one test for each promise."""

import hashlib
import json
import subprocess

import kubernetes_validate
import pytest
import yaml
from chart_helpers import (
    CHART,
    FILES,
    LOCAL,
    NFS,
    component,
    container,
    helm,
    layers,
    one,
    pods,
    refused,
    render,
    run,
    trainer,
)

pytestmark = pytest.mark.helm
MINORS = [f"1.{minor}" for minor in range(27, 38)]
COMBINATIONS = [
    (*NFS, "--set=nodes=1"),
    (*NFS, "--set=nodes=4,train.global_batch=500,train.micro_batch=125,podAntiAffinity.mode=preferred"),
    (*NFS, "--set=completion.policy=scaleDown,gpu.enabled=true,gpu.perNode=1,runtimeClassName=nvidia"),
    (*NFS, "--set=workload.kind=Job,job.ttlSecondsAfterFinished=0,job.activeDeadlineSeconds=60,nodes=1"),
    (*NFS, "--set=tensorboard.enabled=false,networkPolicy.enabled=false,preflight.enabled=false,keepVolumes=false"),
    (*NFS, "--set=tensorboard.ingress.enabled=true,tensorboard.ingress.host=a.example,tensorboard.ingress.tlsSecret=s"),
    (*NFS, "--set=hostNetwork=true,rendezvous.port=29600,dataset.credentialsSecret=s,dataset.s3Endpoint=http://m:9000"),
    (*NFS, "--set=hostNetwork=true,workload.kind=Job"),
    (*LOCAL, "--set=local.hostPath=/srv/k8scifar,nodes=3,train.global_batch=720,keepVolumes=false"),
    (*LOCAL, "gpu.yaml", "--set=local.storageClassName=fast,completion.policy=scaleDown"),
    (
        "--set=dataset.existingClaim=a,checkpoints.storageClassName=fast,user.fsGroup=0,user.supplementalGroups={7,8}",
        "--set=podAnnotations.a=b,podLabels.c=d,schedulerName=volcano,priorityClassName=high,nodeSelector.x=y",
        "--set=networkPolicy.tensorboardFrom[0].ipBlock.cidr=10.0.0.0/8,extraEnv[0].name=A,extraEnv[0].value=b",
        "--set=extraVolumes[0].name=v,extraVolumes[0].emptyDir.medium=Memory,extraVolumeMounts[0].name=v",
        "--set=extraVolumeMounts[0].mountPath=/v,imagePullSecrets[0].name=p,tolerations[0].operator=Exists",
    ),
]


@pytest.fixture(scope="module")
def two_node():
    return render(*NFS)


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize("name", FILES)
def test_every_file_of_values_lints_and_renders_alike_in_both_helms(name, major):
    done = run("--strict", *layers(name), major=major, verb="lint")
    assert done.returncode == 0, done.stdout + done.stderr
    both = render(*layers(name), major=major), render(*layers(name), major=7 - major)
    for objects in both:  # the two delete the test's pod in different ways: test_chart_lifecycle.py
        one(objects, "Pod")["metadata"]["annotations"].pop("helm.sh/hook-delete-policy")
    assert both[0] == both[1]


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_values_begins_with_three_lines_of_advice(name):
    from chart_helpers import VALUES

    lines = (VALUES / name).read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:3])
    assert not lines[3].startswith("#")
    assert f"-f values/{name}" in lines[2]


def test_every_object_fits_every_supported_kubernetes():
    distinct = {}
    for options in [*map(layers, FILES), *COMBINATIONS]:
        for item in render(*options):
            distinct[json.dumps(item, sort_keys=True)] = item
    assert len(distinct) > 40
    for minor in MINORS:
        for item in distinct.values():
            kubernetes_validate.validate(item, minor, strict=True)


def test_a_kubernetes_older_than_stated_is_refused():
    oldest = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    assert oldest == f">={MINORS[0]}.0-0"
    assert "1.26" in refused(*NFS, "--kube-version=1.26.15")
    assert render(*NFS, "--kube-version=1.27.0") == render(*NFS, "--kube-version=1.37.1")


@pytest.mark.parametrize("major", [3, 4])
def test_the_package_holds_its_readme_and_no_guides(major, tmp_path):
    import tarfile

    # `helm show` takes no name of a release, and the chart last.
    shown = subprocess.run([helm(major), "show", "readme", str(CHART)], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == (CHART / "README.md").read_text().strip()
    subprocess.run([helm(major), "package", str(CHART), f"--destination={tmp_path}"], check=True, capture_output=True)
    (package,) = tmp_path.iterdir()
    with tarfile.open(package) as archive:
        names = archive.getnames()
    assert "k8scifar/README.md" in names and "k8scifar/files/rules.json" in names
    assert not [name for name in names if "/docs/" in name]
    described = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert described["home"] in described["sources"] and described["maintainers"][0]["name"]
    assert described["icon"].startswith("data:image/svg+xml;base64,")


# What values/two-node.yaml renders: whose field, and what it is.
FIELDS = [
    ("Service cifar", "spec.clusterIP", "None"),
    ("Service cifar", "spec.publishNotReadyAddresses", True),
    ("Service cifar", "spec.ports.0.port", 29500),
    ("Service cifar-tensorboard", "spec.type", "ClusterIP"),
    ("StatefulSet cifar", "spec.replicas", 2),
    ("StatefulSet cifar", "spec.podManagementPolicy", "Parallel"),
    ("StatefulSet cifar", "spec.serviceName", "cifar"),
    ("Pod cifar-status", "metadata.annotations.helm~sh/hook", "test"),
    ("Pod cifar-status", "spec.containers.0.args", ["status", "/volumes/checkpoints/runs/cifar", "--wait=180"]),
]
MOUNTS = [
    ("trainer", "/dev/shm", "shm", False),
    ("trainer", "/tmp", "tmp", False),
    ("trainer", "/volumes/dataset", "dataset", True),
    ("tensorboard", "/volumes/checkpoints", "checkpoints", True),
    ("status", "/volumes/checkpoints", "checkpoints", True),
]
ARGUMENTS = {
    "--nnodes=2", "--nproc-per-node=1", "--master-addr=cifar-0.cifar.default.svc.cluster.local", "--master-port=29500",
    "--restart=always", "--when-done=hold", "--wait=300", "--data-wait=1800",
}  # fmt: skip


def test_two_nodes_fields_mounts_and_arguments(two_node):
    for name, path, expected in FIELDS:
        found = one(two_node, *name.split())
        for key in path.split("."):
            found = found[int(key)] if key.isdecimal() else found[key.replace("~", ".")]
        assert found == expected, (name, path)
    containers = {item["name"]: item for pod in pods(two_node) for item in pod["containers"]}
    for name, path, volume, is_read_only in MOUNTS:
        (mount,) = (item for item in containers[name]["volumeMounts"] if item["mountPath"] == path)
        assert (mount["name"], mount.get("readOnly", False)) == (volume, is_read_only), (name, path)
    assert containers["trainer"]["args"][0] == "launch" and set(containers["trainer"]["args"]) >= ARGUMENTS
    volumes = {volume["name"]: volume for volume in trainer(two_node)["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert "sizeLimit" in volumes["tmp"]["emptyDir"]
    labels = one(two_node, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert one(two_node, "Service", "cifar")["spec"]["selector"].items() <= labels.items()
    assert not any("helm.sh/chart" in key for key in labels), "a new version of the chart restarts no training"


def test_pods_are_on_different_machines(two_node):
    spec = one(two_node, "StatefulSet")["spec"]
    (term,) = trainer(two_node)["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert term["labelSelector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_anti_affinity_adds_to_the_users_own():
    term = '{"podAntiAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":[{"topologyKey":"zone"}]}}'
    own = f"--set-json=affinity={term}"
    rules = trainer(render(*NFS, own))["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [rule["topologyKey"] for rule in rules] == ["zone", "kubernetes.io/hostname"]
    preferred = trainer(render(*NFS, "--set=podAntiAffinity.mode=preferred"))["affinity"]["podAntiAffinity"]
    assert list(preferred) == ["preferredDuringSchedulingIgnoredDuringExecution"]
    assert "affinity" not in trainer(render(*NFS, "--set=podAntiAffinity.mode=none"))


def test_processes_follow_the_gpus():
    pod = trainer(render(*NFS, "gpu.yaml", "--set=gpu.perNode=2,train.global_batch=500,train.micro_batch=125"))
    assert "--nproc-per-node=2" in container(pod)["args"]
    assert container(pod)["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert pod["runtimeClassName"] == "nvidia"
    assert "device: cuda" in one(render(*NFS, "gpu.yaml"), "ConfigMap")["data"]["train.yaml"]
    assert "nvidia.com/gpu" not in container(trainer(render(*NFS)))["resources"]["limits"]


def test_configuration_is_immutable_and_named_after_its_content():
    before, after = render(*NFS), render(*NFS, "--set=train.optimizer.lr=0.1")
    names = [one(objects, "ConfigMap")["metadata"]["name"] for objects in (before, after)]
    assert names[0] != names[1]
    assert one(before, "ConfigMap")["immutable"] is True
    for objects, name in zip((before, after), names, strict=True):
        (volume,) = (volume for volume in trainer(objects)["volumes"] if volume["name"] == "config")
        assert volume["configMap"]["name"] == name
    assert one(render(*NFS, "--set=nodes=1"), "ConfigMap")["metadata"]["name"] == names[0]


def test_the_trainer_accepts_its_configuration(tmp_path):
    from k8scifar.config import loading

    text = one(render(*NFS, "--set=train.epochs=7,train.optimizer.lr=0.05"), "ConfigMap")["data"]["train.yaml"]
    path = tmp_path / "train.yaml"
    path.write_text(text)
    config = loading.load(path)
    assert config.optimizer.lr == 0.05
    assert (config.epochs, config.name, config.recipe, config.checkpoint.accept_changes) == (7, "cifar", "demo", True)


def test_one_pod_prepares_and_the_others_go_on_at_once(two_node):
    item = container(trainer(two_node), "prepare")
    assert item["command"][:4] == ["tini", "--", "sh", "-c"]
    script = item["command"][4].replace("exec k8scifar", "echo")
    folder = "/volumes/dataset/data/cifar10-" + hashlib.sha256(b"cifar10").hexdigest()[:8]
    prepares = f"prepare --data-dir={folder} --source=cifar10\n"
    for environment, expected in (
        ({"POD_NAME": "cifar-0"}, prepares),
        ({"POD_NAME": "cifar-1"}, "pod 0 prepares the data set\n"),
        ({"POD_NAME": "cifar-0"} | {"JOB_COMPLETION_INDEX": "10"}, "pod 0 prepares the data set\n"),
        ({"POD_NAME": "cifar-abc-1-x7f0"} | {"JOB_COMPLETION_INDEX": "0"}, prepares),
        ({"POD_NAME": "cifar-10"}, "pod 0 prepares the data set\n"),
    ):
        command = ["sh", "-c", script, *item["command"][5:], *item["args"]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, expected)


def test_no_probe_starts_python(two_node):
    for probe in ("startupProbe", "livenessProbe"):
        command = " ".join(container(trainer(two_node))[probe]["exec"]["command"])
        assert "python" not in command and "k8scifar" not in command
    assert "readinessProbe" not in container(trainer(two_node))  # a rolling upgrade waits for readiness, not for peers


def test_tensorboard_and_its_ingress(two_node):
    pod = one(two_node, "Deployment")["spec"]["template"]["spec"]
    (board,) = pod["containers"]
    assert "--logdir=/volumes/checkpoints/runs" in board["args"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(board)
    names = {item["metadata"]["name"] for item in render(*NFS, "--set=tensorboard.enabled=false")}
    assert "cifar-tensorboard" not in names
    ingress = one(render(*COMBINATIONS[5]), "Ingress")["spec"]
    assert ingress["rules"][0]["host"] == "a.example" and ingress["tls"][0]["secretName"] == "s"


def test_only_peers_reach_the_training_pods(two_node):
    policy = one(two_node, "NetworkPolicy", "cifar")["spec"]
    pod = one(two_node, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= pod.items()
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]
    board = one(two_node, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert not policy["podSelector"]["matchLabels"].items() <= board.items()
    assert not one(two_node, "Service", "cifar-tensorboard")["spec"]["selector"].items() <= pod.items()
    assert one(two_node, "NetworkPolicy", "cifar-tensorboard")["spec"]["ingress"] == [{"ports": [{"port": "http"}]}]
    limited = render(*NFS, "--set=networkPolicy.tensorboardFrom[0].ipBlock.cidr=10.0.0.0/8")
    (rule,) = one(limited, "NetworkPolicy", "cifar-tensorboard")["spec"]["ingress"]
    assert rule["from"] == [{"ipBlock": {"cidr": "10.0.0.0/8"}}]


def test_host_network_keeps_the_clusters_names_and_claims_its_port(two_node):
    objects = render(*NFS, "--set=hostNetwork=true,rendezvous.port=29600")
    pod = trainer(objects)
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert container(pod)["ports"] == [{"name": "rendezvous", "containerPort": 29600, "hostPort": 29600}]
    assert "--master-port=29600" in container(pod)["args"]
    assert "--master-addr=cifar-0.cifar.default.svc.cluster.local" in container(pod)["args"], "names, not addresses"
    # A policy that no network enforces would only look like one; TensorBoard stays on the pod network, and guarded.
    assert [item["metadata"]["name"] for item in objects if item["kind"] == "NetworkPolicy"] == ["cifar-tensorboard"]
    assert "hostNetwork" not in one(objects, "Deployment")["spec"]["template"]["spec"]
    assert not {"hostNetwork", "dnsPolicy"} & set(trainer(two_node))
    assert "hostPort" not in container(trainer(two_node))["ports"][0]
    assert trainer(render(*NFS, "--set=hostNetwork=true,nodes=1,podAntiAffinity.mode=none"))["hostNetwork"]


def test_credentials_reach_the_container_that_fetches_the_data_and_no_other():
    options = "--set=dataset.credentialsSecret=keys,dataset.s3Endpoint=http://minio:9000,extraEnv[0].name=A"
    pod = trainer(render(*NFS, options, "--set=extraEnv[0].value=b"))
    prepare = container(pod, "prepare")
    assert prepare["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "AWS_ENDPOINT_URL", "value": "http://minio:9000"} in prepare["env"]
    for other in pod["containers"] + pod["initContainers"]:
        if other["name"] != "prepare":
            assert "envFrom" not in other and "AWS_ENDPOINT_URL" not in str(other)


def test_what_is_left_behind_says_where_the_run_is(two_node):
    claims = component(two_node, "PersistentVolumeClaim", "checkpoints")
    for item in (one(two_node, "StatefulSet"), one(two_node, "Deployment"), claims):
        annotations = item["metadata"]["annotations"]
        assert annotations["k8scifar/run-dir"] == "/volumes/checkpoints/runs/cifar"
    assert annotations["k8scifar/user"] == "1000:1000"
    assert annotations["k8scifar/image"] == container(trainer(two_node))["image"]


def test_scale_down_may_change_one_scale_and_nothing_else(two_node):
    objects = render(*NFS, "--set=completion.policy=scaleDown")
    assert one(objects, "Role")["rules"] == [
        {"apiGroups": ["apps"], "resources": ["statefulsets/scale"], "resourceNames": ["cifar"], "verbs": ["patch"]}
    ]
    pod = trainer(objects)
    assert pod["automountServiceAccountToken"] is True
    assert pod["serviceAccountName"] == one(objects, "ServiceAccount")["metadata"]["name"]
    assert one(objects, "RoleBinding")["subjects"][0]["name"] == pod["serviceAccountName"]
    assert "--when-done=scale-down" in container(pod)["args"]
    assert {"name": "K8SCIFAR_STATEFULSET", "value": "cifar"} in container(pod)["env"]
    assert not [item for item in two_node if item["kind"] in ("Role", "RoleBinding", "ServiceAccount")]


def test_labels_are_the_recommended_ones(two_node):
    for item in two_node:
        labels = item["metadata"]["labels"]
        for key in ("name", "instance", "version", "component", "managed-by", "part-of"):
            assert labels[f"app.kubernetes.io/{key}"]
        assert item["kind"] in ("PersistentVolume",) or item["metadata"]["namespace"] == "default"


def test_grace_exceeds_shutdown_exceeds_nothing(two_node):
    pod = trainer(two_node)
    (shutdown,) = (word for word in container(pod)["args"] if word.startswith("--shutdown-timeout="))
    assert pod["terminationGracePeriodSeconds"] > int(shutdown.partition("=")[2]) + 5
