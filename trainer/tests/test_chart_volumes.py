"""Where the chart's volumes come from: NFS, CSI, a storage class, a claim that is there, a folder of the machine."""

import pytest
from chart_helpers import FILES, NFS, layers, one, pods, render, trainer

pytestmark = pytest.mark.helm


@pytest.fixture(scope="module")
def two_node():
    return render(*NFS)


def test_static_nfs_volumes_and_claims_are_bound_to_each_other_only(two_node):
    for key in ("dataset", "checkpoints"):
        volume = one(two_node, "PersistentVolume", f"default-cifar-{key}")
        claim = one(two_node, "PersistentVolumeClaim", f"cifar-{key}")
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
    assert claim.items() <= one(objects, "PersistentVolumeClaim", "cifar-dataset")["spec"].items()


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
