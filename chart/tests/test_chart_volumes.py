"""Where the chart's volumes come from: NFS, CSI, a storage class, a claim that is there, a folder of the machine."""

import re

import pytest
from chart_helpers import FILES, LOCAL, NFS, component, layers, one, pods, render, run, trainer

pytestmark = pytest.mark.helm


@pytest.fixture(scope="module")
def two_node():
    return render(*NFS)


def test_static_nfs_volumes_and_claims_are_bound_to_each_other_only(two_node):
    for key in ("dataset", "checkpoints"):
        volume = component(two_node, "PersistentVolume", key)
        claim = component(two_node, "PersistentVolumeClaim", key)
        assert re.fullmatch(f"default-cifar-{key}-[0-9a-f]{{8}}", volume["metadata"]["name"])
        assert re.fullmatch(f"cifar-{key}-[0-9a-f]{{8}}", claim["metadata"]["name"])
        (mounted,) = (item for item in trainer(two_node)["volumes"] if item["name"] == key)
        assert mounted["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        reference = volume["spec"]["claimRef"]
        assert (reference["namespace"], reference["name"]) == ("default", claim["metadata"]["name"])
        assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
        assert volume["spec"]["storageClassName"] == claim["spec"]["storageClassName"] == ""
        assert volume["spec"]["nfs"] == {"server": "192.0.2.1", "path": "/srv/k8scifar"}
        assert "nfsvers=4.1" in volume["spec"]["mountOptions"]
        assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
        for item in (volume, claim):
            assert item["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    for item in render(*NFS, "--set=keepVolumes=false"):
        assert "helm.sh/resource-policy" not in item["metadata"].get("annotations", {})


def test_pods_make_their_folders_themselves():
    for options in map(layers, FILES):
        for pod in pods(render(*options)):
            for item in pod["containers"] + pod.get("initContainers", []):
                assert not any("subPath" in mount for mount in item["volumeMounts"])


@pytest.mark.parametrize(
    ("setting", "volume", "claim"),
    [
        ("dataset.storageClassName=fast", None, {"storageClassName": "fast"}),
        ("dataset.hostPath=/data", {"hostPath": {"path": "/data", "type": "Directory"}}, {"storageClassName": ""}),
        ("dataset.nfs.server=b,dataset.nfs.path=/x", {"nfs": {"server": "b", "path": "/x"}}, {"storageClassName": ""}),
    ],
)
def test_other_volumes(setting, volume, claim):
    objects = render(*NFS, f"--set={setting}")
    found = [item for item in objects if item["kind"] == "PersistentVolume" and "dataset" in item["metadata"]["name"]]
    assert bool(found) == bool(volume)
    if volume:
        assert volume.items() <= found[0]["spec"].items()
    assert claim.items() <= component(objects, "PersistentVolumeClaim", "dataset")["spec"].items()


@pytest.mark.parametrize("major", [3, 4])
def test_no_options_of_a_mount(major):
    for options in ("--set=nfs.mountOptions={}", "--set-json=nfs.mountOptions=[]"):
        assert (
            "mountOptions" not in component(render(*NFS, options, major=major), "PersistentVolume", "dataset")["spec"]
        )


def test_existing_claim_makes_nothing_and_is_mounted():
    objects = render(*NFS, "--set=dataset.existingClaim=mine")
    assert not any("dataset" in item["metadata"]["name"] for item in objects)
    (volume,) = (volume for volume in trainer(objects)["volumes"] if volume["name"] == "dataset")
    assert volume["persistentVolumeClaim"]["claimName"] == "mine"


def test_csi_nfs():
    objects = render(*layers("csi-nfs.yaml"))
    drivers = [item["spec"]["csi"] for item in objects if item["kind"] == "PersistentVolume"]
    assert {item["driver"] for item in drivers} == {"nfs.csi.k8s.io"}
    assert all(item["volumeAttributes"] == {"server": "192.0.2.1", "share": "/srv/k8scifar"} for item in drivers)
    assert len({item["volumeHandle"] for item in drivers}) == 2


def stored(objects):
    """Name and spec of each volume and claim."""
    kinds = ("PersistentVolume", "PersistentVolumeClaim")
    return {(item["kind"], item["metadata"]["name"]): item["spec"] for item in objects if item["kind"] in kinds}


CORRECTIONS = [
    ((*NFS,), (*NFS, "--set=nfs.server=192.0.2.2")),
    ((*NFS,), (*NFS, "--set=nfs.path=/export")),
    ((*NFS,), (*NFS, "--set=nfs.mountOptions={nfsvers=4.2}")),
    ((*NFS,), (*NFS, "--set=nfs.csi=true")),
    ((*NFS,), (*NFS, "--set=dataset.accessMode=ReadWriteOnce,checkpoints.accessMode=ReadWriteOnce,nodes=1")),
    ((*NFS,), ("--set=dataset.storageClassName=fast,checkpoints.storageClassName=fast",)),
    (
        ("--set=dataset.storageClassName=fast,checkpoints.storageClassName=fast",),
        ("--set=dataset.storageClassName=slow,checkpoints.storageClassName=slow",),
    ),
    (("single-node.yaml",), ("single-node.yaml", "--set=dataset.hostPath=/a,checkpoints.hostPath=/a")),
    (
        ("--set=dataset.nfs.server=b,dataset.nfs.path=/x,checkpoints.nfs.server=b,checkpoints.nfs.path=/x",),
        ("--set=dataset.nfs.server=c,dataset.nfs.path=/x,checkpoints.nfs.server=c,checkpoints.nfs.path=/x",),
    ),
]


@pytest.mark.parametrize(("before", "after"), CORRECTIONS)
def test_what_can_not_be_changed_makes_another_volume_and_the_pods_follow(before, after):
    first, second = render(*before), render(*after)
    assert not set(stored(first)) & set(stored(second)), "an object that the API server refuses to change"
    claims = [
        {
            item["name"]: item["persistentVolumeClaim"]["claimName"]
            for item in trainer(objects)["volumes"]
            if "persistentVolumeClaim" in item
        }
        for objects in (first, second)
    ]
    assert claims[0].keys() == claims[1].keys() == {"dataset", "checkpoints"}
    assert all(claims[0][key] != claims[1][key] for key in claims[0])
    for objects, chosen in zip((first, second), claims, strict=True):
        assert {name for kind, name in stored(objects) if kind == "PersistentVolumeClaim"} == set(chosen.values())


@pytest.mark.parametrize("name", ["two-node.yaml", "csi-nfs.yaml", "single-node.yaml"])
def test_a_size_changes_nothing_where_it_means_nothing(name):
    before, after = render(*layers(name)), render(*layers(name), "--set=checkpoints.size=77Gi,dataset.size=78Gi")
    assert before == after
    assert not any("5Gi" in str(spec) for spec in stored(before).values())


def test_a_storage_class_is_asked_for_the_size_and_the_claim_keeps_its_name():
    classes = "--set=dataset.storageClassName=fast,checkpoints.storageClassName=fast"
    before, after = stored(render(classes)), stored(render(classes, "--set=checkpoints.size=77Gi"))
    assert before.keys() == after.keys()
    sizes = [{spec["resources"]["requests"]["storage"] for spec in found.values()} for found in (before, after)]
    assert sizes == [{"2Gi", "5Gi"}, {"2Gi", "77Gi"}]


@pytest.mark.parametrize("options", [NFS, (*LOCAL, "--set=local.hostPath=/srv/k8scifar")], ids=["shared", "local"])
def test_names_of_volumes_are_unique_in_the_whole_cluster(options):
    """Also if namespace and release, written one after the other, are the same letters, or longer than a name."""
    long, most = "n" * 63, "x" * 53
    places = [("a", "b-c"), ("a-b", "c"), ("a", "b-c-d"), ("a", "1.2")]
    places += [(long, most), (long[:-1] + "m", most), (long, most[:-1] + "y")]
    seen: dict[str, tuple[str, str]] = {}
    for namespace, release in places:
        objects = render(*options, f"--namespace={namespace}", release=release)
        assert len(one(objects, "StatefulSet")["metadata"]["name"]) + 11 <= 63
        for item in (item for item in objects if item["kind"] == "PersistentVolume"):
            name = item["metadata"]["name"]
            assert len(name) <= 63 and re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
            assert name not in seen, (name, seen[name], (namespace, release))
            assert item["metadata"]["labels"]["k8scifar/namespace"] == namespace
            seen[name] = (namespace, release)
    assert len(seen) == 2 * len(places)


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_another_source_is_another_folder_and_an_equal_one_the_same(kind):
    def folder(*more, release="cifar"):
        objects = render(*NFS, f"--set=workload.kind={kind}", *more, release=release)
        folders = set()
        for item in trainer(objects)["containers"] + trainer(objects)["initContainers"]:
            folders |= {word for word in item["args"] if word.startswith("--data-dir=")}
        (found,) = folders
        return found.partition("=")[2]

    here = folder()
    assert re.fullmatch("/volumes/dataset/data/cifar10-[0-9a-f]{8}", here)
    assert here == folder("--set=dataset.source=auto") == folder(release="another") == folder("--set=train.epochs=3")
    others = {
        folder(f"--set-string=dataset.source={source}")
        for source in (
            "synthetic",
            "synthetic:100:10",
            "imagefolder:/a",
            "imagefolder:/b",
            "imagefolder:https://h/a b.tar",
            "cifar10:/x",
        )
    }
    assert len(others) == 6 and here not in others
    for path in others:
        assert re.fullmatch("/volumes/dataset/data/(cifar10|synthetic|imagefolder)-[0-9a-f]{8}", path)
    s3 = [
        folder("--set=dataset.source=imagefolder:s3://b/k", f"--set=dataset.s3Endpoint={server}")
        for server in ("http://a", "http://b")
    ]
    assert s3[0] != s3[1], "one key of two servers is two data sets"
    assert folder("--set=dataset.s3Endpoint=http://a") == here


def test_an_upgrade_tells_what_became_of_the_volumes():
    text = run(*NFS, "--dry-run=client", "-n=lab", verb="install").stdout
    notes = " ".join(text.partition("NOTES:")[2].split())
    claims = [
        item["metadata"]["name"] for item in render(*NFS, "--namespace=lab") if item["kind"] == "PersistentVolumeClaim"
    ]
    assert len(claims) == 2
    for claim in claims:
        assert f"(claim {claim})" in notes
    assert "NFS 192.0.2.1:/srv/k8scifar" in notes and "Former volumes are kept" in notes
    # The test's pod has ended and holds its claim for all that: it goes first.
    assert "kubectl -n lab delete pods,pvc -l app.kubernetes.io/instance=cifar &&" in notes
    assert "kubectl delete pv -l app.kubernetes.io/instance=cifar,k8scifar/namespace=lab" in notes
