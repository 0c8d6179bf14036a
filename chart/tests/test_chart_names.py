"""Any legal name of a release makes legal names of objects, its own ones; and what is added takes nothing's place."""

import re
from concurrent.futures import ThreadPoolExecutor

import kubernetes_validate
import pytest
import yaml
from chart_helpers import NFS, container, one, pods, refused, render, trainer

pytestmark = pytest.mark.helm
LONG = "experiment-resnet18-cifar10-learning-rate-0-1-batch-5"
SHORT = """
cifar k8scifar my-k8scifar my k8scifar-tensorboard tensorboard k8scifar-status cifar-status cifar.v2 cifar-v2 2node
r2node 123 1e3 0x1f 007 null true no y n on e 8 k a.b.c a-b.c a.b-c x--y k8scifar.k8scifar my-k8scifar-my
k8scifar-0a1b2c3d
"""
RELEASES = [
    *SHORT.split(),
    *(LONG, LONG[:-1] + "6", "a" * 53, "a" * 52 + "b", "9" * 53, ("a." * 27)[:53], "a" * 44 + "-k8scifar"),
]
DNS_1035 = re.compile("[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# Of these kinds the API server asks for a DNS-1035 label, of the others for less.
STRICT = ("Service", "StatefulSet", "Job", "Deployment")


def test_the_releases_are_legal_and_many():
    legal = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
    assert len(set(RELEASES)) == len(RELEASES) > 35
    assert all(legal.fullmatch(name) and len(name) <= 53 for name in RELEASES)


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_every_legal_release_has_legal_names_of_its_own(major, kind):
    seen: dict[tuple[str, str], str] = {}
    options = f"--set=workload.kind={kind},completion.policy={'hold' if kind == 'Job' else 'scaleDown'}"
    with ThreadPoolExecutor(4) as pool:
        rendered = pool.map(lambda release: render(*NFS, options, major=major, release=release), RELEASES)
        everything = dict(zip(RELEASES, rendered, strict=True))
    for release, objects in everything.items():
        for item in objects:
            name, labels = item["metadata"]["name"], item["metadata"]["labels"]
            assert (isinstance(name, str) and DNS_1035.fullmatch(name)) or item["kind"] not in STRICT, name
            assert re.fullmatch("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name), name
            assert labels["app.kubernetes.io/instance"] == release
            assert (item["kind"], name) not in seen, f"{release} and {seen[item['kind'], name]} both have {name}"
            seen[item["kind"], name] = release
        workload = one(objects, kind)
        # What the controllers write behind a name has room in a label: -5f6b7c8d9f, or -999 and -abcde.
        assert len(workload["metadata"]["name"]) + 11 <= 63
        assert workload["spec"]["template"]["spec"].get("subdomain", workload["spec"].get("serviceName")) in {
            item["metadata"]["name"] for item in objects if item["kind"] == "Service"
        }
        config = yaml.safe_load(one(objects, "ConfigMap")["data"]["train.yaml"])
        assert config["name"] == release, "the run is named after the release, as a text"
        assert f"/volumes/checkpoints/runs/{release}" in one(objects, "Pod")["spec"]["containers"][0]["args"]
        if major == 4 and release in ("null", "1e3", "a.b.c", LONG):  # a second each
            for item in objects:
                kubernetes_validate.validate(item, "1.37", strict=True)


def test_ordinary_names_stay_what_they_are():
    for release, expected in (("cifar", "cifar"), ("k8scifar", "k8scifar"), ("mine", "mine-k8scifar")):
        assert one(render(*NFS, release=release), "StatefulSet")["metadata"]["name"] == expected
    for release, start in (("2node", "r2node-k8scifar-"), ("cifar.v2", "cifar-v2-k8scifar-"), (LONG, LONG[:20])):
        assert one(render(*NFS, release=release), "StatefulSet")["metadata"]["name"].startswith(start)


@pytest.mark.parametrize("major", [3, 4])
def test_names_that_the_user_chooses(major):
    def name(*options):
        return one(render(*NFS, *options, major=major), "StatefulSet")["metadata"]["name"]

    assert name("--set=fullnameOverride=mine") == "mine"
    assert name("--set-string=fullnameOverride=null") == "null"
    assert name("--set=nameOverride=other") == "cifar-other"
    assert name("--set-string=nameOverride=123") == "cifar-123"
    both = [name(f"--set=fullnameOverride={'a' * 45}{letter}") for letter in "bc"]
    assert both[0] != both[1] and all(len(each) == 40 and DNS_1035.fullmatch(each) for each in both)
    for value in ("1x", "A", "a.b", "-a", "a-", "a_b", "a" * 64):
        assert "fullnameOverride" in refused(*NFS, f"--set-string=fullnameOverride={value}", major=major)
    for value in ("A", "a.b", "-a", "a-", "a_b"):
        assert "nameOverride" in refused(*NFS, f"--set-string=nameOverride={value}", major=major)


MAPS = [
    ("podLabels", r"app\.kubernetes\.io/name", "app.kubernetes.io/name"),
    ("podLabels", r"app\.kubernetes\.io/component", "app.kubernetes.io/component"),
    ("workload.labels", r"app\.kubernetes\.io/instance", "app.kubernetes.io/instance"),
    ("workload.annotations", "k8scifar/run-dir", "k8scifar/run-dir"),
    ("podAnnotations", r"kubectl\.kubernetes\.io/default-container", "kubectl.kubernetes.io/default-container"),
]


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize(("path", "key", "name"), MAPS)
def test_the_charts_own_keys_are_not_the_users(major, path, key, name):
    said = refused(*NFS, f"--set-string={path}.{key}=mine", major=major)
    assert f"{path}.{name} is a key that the chart sets" in said and "executing" not in said


class OneKey(yaml.SafeLoader):
    """Refuses a map that names a key twice, as Flux, kustomize and Argo CD do."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"twice: {keys}"
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("major", [3, 4])
def test_no_map_names_a_key_twice(major):
    from chart_helpers import run

    options = (
        "--set=podLabels.team=a,podAnnotations.team=b,workload.labels.team=c,workload.annotations.team=d",
        "--set=nodeSelector.zone=e,tensorboard.nodeSelector.zone=f,tensorboard.ingress.enabled=true",
        "--set=tensorboard.ingress.host=a.example,tensorboard.ingress.annotations.team=g",
        r"--set-string=podLabels.app\.kubernetes\.io/name=k8scifar",  # the same as the chart's: no harm
        "--set=resources.limits.cpu=3,gpu.enabled=true",
    )
    done = run(*NFS, *options, major=major)
    assert done.returncode == 0, done.stderr
    objects = [item for item in yaml.load_all(done.stdout, OneKey) if item]
    workload = one(objects, "StatefulSet")
    assert workload["metadata"]["labels"]["team"] == "c" and workload["metadata"]["annotations"]["team"] == "d"
    template = workload["spec"]["template"]["metadata"]
    assert template["labels"]["team"] == "a" and template["annotations"]["team"] == "b"
    assert workload["spec"]["selector"]["matchLabels"].items() <= template["labels"].items()
    assert one(objects, "Ingress")["metadata"]["annotations"] == {"team": "g"}
    limits = container(trainer(objects))["resources"]["limits"]
    assert limits == {"cpu": "3", "memory": "6Gi", "nvidia.com/gpu": "1"}


EXTRAS = [
    (["extraEnv[0].name=POD_NAME", "extraEnv[0].value=x"], "extraEnv[0].name POD_NAME is a variable that the chart"),
    (["extraEnv[0].name=K8SCIFAR_RELEASE"], "extraEnv[0].name K8SCIFAR_RELEASE is a variable that the chart sets"),
    (["extraEnv[0].name=A", "extraEnv[1].name=A"], "extraEnv has A twice"),
    (["extraEnv[0].name=1A"], "extraEnv[0].name"),
    (["dataset.s3Endpoint=http://m", "extraEnv[0].name=AWS_ENDPOINT_URL"], "AWS_ENDPOINT_URL is a variable"),
    (["extraVolumes[0].name=tmp"], "extraVolumes[0].name tmp is a volume of the chart"),
    (["extraVolumes[0].name=v", "extraVolumes[1].name=v"], "extraVolumes has v twice"),
    (["extraVolumeMounts[0].name=v", "extraVolumeMounts[0].mountPath=/v"], "v is not a volume of extraVolumes"),
    (["extraVolumeMounts[0].name=tmp", "extraVolumeMounts[0].mountPath=/tmp/"], "would hide /tmp, which the chart"),
    (["extraVolumeMounts[0].name=tmp", "extraVolumeMounts[0].mountPath=/volumes"], "would hide /volumes/checkpoints"),
    (["extraVolumeMounts[0].name=tmp", "extraVolumeMounts[0].mountPath=/"], "would hide /etc/k8scifar"),
    (["extraVolumeMounts[0].name=tmp", "extraVolumeMounts[0].mountPath=v"], "extraVolumeMounts[0].mountPath"),
    (
        [f"extraVolumeMounts[{index}].{key}" for index in (0, 1) for key in ("name=tmp", f"mountPath=/v{'/' * index}")],
        "mounts /v twice",
    ),
    (["gpu.enabled=true", r"resources.limits.nvidia\.com/gpu=4"], "nvidia.com/gpu, which gpu.perNode sets"),
]


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize(("settings", "words"), EXTRAS)
def test_what_is_added_takes_nothings_place(major, settings, words):
    said = refused(*NFS, f"--set={','.join(settings)}", major=major)
    assert words in said and "executing" not in said


def test_what_is_added_beside_the_charts_own_is_there():
    volume = "--set=extraVolumes[0].name=v,extraVolumes[0].emptyDir.medium=Memory"
    mount = "--set=extraVolumeMounts[0].name=v,extraVolumeMounts[0].mountPath=/tmp/v"
    variable = "--set=extraEnv[0].name=HTTPS_PROXY,extraEnv[0].value=http://p:3128"
    pod = trainer(render(*NFS, volume, mount, variable))
    assert {"name": "v", "mountPath": "/tmp/v"} in container(pod)["volumeMounts"]
    for item in pod["containers"] + pod["initContainers"]:
        assert {"name": "HTTPS_PROXY", "value": "http://p:3128"} in item["env"]


# Values with texts that are refused, or taken, one after the other with " | " between them.
WRONG = {
    "image.repository": "reg.example/me/k8scifar:v1 | k8scifar:v1 | reg/k8s@sha256:0 | https://reg/k8s | Reg/K8s",
    "image.tag": f":v1 | a/b | .a | {'a' * 129}",
    "image.digest": f"sha256:1 | {'0' * 64}",
    "nfs.server": "192.168.1.10:/srv/x | nfs://a | a/b | [fd00::1] | a:2049 | 192.168.1 | 1.2.3.400 | a b | a,b",
    "nfs.path": "srv | /a/../b | srv/x | ~/x | /.. | a:/b",
    "dataset.hostPath": "data | /a/.. | C:/x",
    "dataset.nfs.server": "a:/b",
    "clusterDomain": ".local | cluster.local. | Cluster.Local | a..b | http://a",
    "dataset.s3Endpoint": "minio:9000 | ftp://a | http:// | http://a b | http://a:9000:1",
    "dataset.source": "cifar | imagefolder: | synthetic:5 | synthetic:0:0 | CIFAR10 | imagenet",
    "dataset.folder": "/data | ../x | a/../b | a//b | a/ | . | a b",
    "checkpoints.size": "5 | 5GB | Gi | 5gi | -5Gi | 0Gi | 5 Gi | 500m",
    "scratchSize": "2GB | 0",
    "dataset.existingClaim": "a/b | A | -a | a_b",
    "dataset.storageClassName": "Fast | a b",
    "dataset.credentialsSecret": "a/b | A",
    "imagePullSecrets[0].name": "A | a/b",
    "nfs.mountOptions[0]": "-o | nfsvers=4.1 hard | a;b",
    "gpu.resourceName": "gpu | nvidia.com/",
    "podAntiAffinity.topologyKey": "a b | /x | x/",
    "runtimeClassName": "Nvidia",
    "priorityClassName": "a b",
    "schedulerName": "a b",
    "serviceAccountName": "a/b",
    "podLabels.team": f"a b | -a | {'a' * 64}",
    "resources.requests.cpu": "1 core | -1 | 1CPU",
    "resources.requests.memory": "6GB | 6 Gi | 6gi",
    "resources.limits.memroy": "6Gi",
}
RIGHT = {
    "image.repository": "k8scifar | reg.example/me/k8scifar | localhost:5000/k8 | 10.0.0.1:5000/a/b | [fd00::1]:5000/a",
    "image.tag": "0.1.0 | v1 | sha-0123abc | A_b",
    "nfs.server": "192.168.1.10 | nas | nas.local | fd00::1 | fe80::1:2:3 | 2node.lan | NAS-1 | ::1 | a_b.lan",
    "nfs.path": "/ | /srv/k8scifar | /srv/my data | /srv/.hidden | /mnt/pool0/a..b | /srv/x/ | /srv/ünï",
    "clusterDomain": " | cluster.local | k8s | a-b.c1",
    "dataset.s3Endpoint": "http://minio.storage:9000 | https://s3.eu-west-1.amazonaws.com | http://10.0.0.1:9000/x | "
    "http://[fd00::1]:1",
    "dataset.source": "auto | cifar10 | synthetic | synthetic:200:50 | imagefolder:/data/a b | imagefolder:s3://b/k | "
    "cifar10:/x",
    "dataset.folder": "data | a/b | a.b | _x",
    "scratchSize": "2Gi | 512Mi | 0.5Gi | 1000000000 | 2G | 100k",
    "nfs.mountOptions[0]": "nfsvers=4.1 | ro | sec=krb5p | proto=tcp6 | clientaddr=fd00::1",
    "podAntiAffinity.topologyKey": "zone | topology.kubernetes.io/zone",
    "podLabels.team": " | a | A.b_c-d | 7",
    "resources.requests.cpu": "250m | 2 | 0.5 | 1.5",
    "resources.requests.memory": "512Mi | 1G | 1e9 | 8589934592",
}


def given(path: str, value: str) -> str:
    return f"--set-string={path}={value}".replace(",", r"\,")


@pytest.mark.parametrize("path", WRONG)
def test_text_that_would_fail_in_the_cluster_is_refused_by_name(path):
    for value in WRONG[path].split(" | "):
        said = refused(*NFS, given(path, value))
        name = re.split(r"\[|\.team|\.memroy", path)[0]
        assert name in said, (value, said)
        assert not re.search(r"executing|pattern|nil pointer|%!", said), (value, said)


@pytest.mark.parametrize("path", RIGHT)
def test_text_that_people_have_is_taken_as_it_is(path):
    for value in RIGHT[path].split(" | "):
        objects = render(*NFS, given(path, value))
        assert len(pods(objects)) == 3
        if value and path not in ("dataset.source", "image.tag", "dataset.s3Endpoint"):
            assert value in str(objects) or value.encode("unicode_escape").decode() in str(objects)
