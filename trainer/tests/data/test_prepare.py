"""`prepare`: every source, idempotence, damage, concurrency, and failures that lose nothing."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import pickle
import subprocess
import tarfile
import threading
import time

import numpy as np
import pytest
from patience import patient
from PIL import Image
from runs import cli, cli_command

from k8scifar.data import packed, synthetic
from k8scifar.data.prepare import prepare
from k8scifar.data.reading import images, remote
from k8scifar.errors import TrainingError, UserError


def paint_folder(root, classes=("cat", "dog"), train=3, test=2, size=(32, 32)):
    """A small ImageFolder of lossless pictures; returns {(split, class, index): array}."""
    made = {}
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:04}.png")
                made[split, name, index] = pixels
    return made


def test_synthetic_is_deterministic_and_the_manifest_is_true(tmp_path):
    first, fresh = prepare(tmp_path / "a", "synthetic:200:50")
    second, _ = prepare(tmp_path / "b", "synthetic:200:50")
    assert fresh
    assert first.fingerprint == second.fingerprint
    assert first.counts == {"train": 200, "test": 50}
    split = packed.read(tmp_path / "a", first, "train")
    assert split.images.shape == (200, 32, 32, 3)
    assert split.images.dtype == np.uint8
    scaled = split.images.astype(np.float64) / 255
    np.testing.assert_allclose(first.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(first.std, scaled.std((0, 1, 2)), rtol=1e-12)
    for entry in first.files.values():
        content = (tmp_path / "a" / entry["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]


def test_synthetic_splits_differ_and_hold_every_class():
    train, test = synthetic.split(100, seed=1), synthetic.split(100, seed=2)
    assert np.bincount(train.labels, minlength=10).tolist() == [10] * 10
    assert not np.array_equal(train.images, test.images)


def test_prepare_again_does_nothing(tmp_path):
    prepare(tmp_path, "synthetic:50:20")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}
    _, fresh = prepare(tmp_path, "synthetic:50:20")
    _, fresh_auto = prepare(tmp_path, "auto")
    assert (fresh, fresh_auto) == (False, False)
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npy")}


def test_another_source_replaces_and_leaves_no_strays(tmp_path):
    prepare(tmp_path, "synthetic:50:20")
    manifest, fresh = prepare(tmp_path, "synthetic:60:20")
    assert fresh
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == sorted(f["name"] for f in manifest.files.values())


@pytest.mark.parametrize("form", ["folder", "tar", "tar.gz with a parent folder"])
def test_imagefolder(tmp_path, form):
    made = paint_folder(tmp_path / "pictures")
    source = tmp_path / "pictures"
    if form != "folder":
        source = tmp_path / ("pictures.tar.gz" if "gz" in form else "pictures.tar")
        with tarfile.open(source, "w:gz" if "gz" in form else "w") as archive:
            archive.add(tmp_path / "pictures", arcname="cifar" if "gz" in form else ".")
    manifest, _ = prepare(tmp_path / "data", f"imagefolder:{source}")
    assert manifest.classes == ["cat", "dog"]
    split = packed.read(tmp_path / "data", manifest, "test")
    assert split.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(split.images[2], made["test", "dog", 0])


def test_imagefolder_resizes_other_sizes(tmp_path):
    paint_folder(tmp_path / "pictures", size=(50, 40))
    manifest, _ = prepare(tmp_path / "data", f"imagefolder:{tmp_path / 'pictures'}")
    assert packed.read(tmp_path / "data", manifest, "train").images.shape == (6, 32, 32, 3)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "train/cat/0000.png").write_bytes(b"no"), "0000.png is not an image that can be read"),
        (lambda root: (root / "test").rename(root / "other"), r"train/ with 2 classes, but no test/ .*: other/"),
        (lambda root: (root / "test/dog").rename(root / "test/doge"), r"classes dog \(only in train/\), doge"),
    ],
)
def test_imagefolder_mistakes(tmp_path, spoil, words):
    paint_folder(tmp_path / "pictures")
    spoil(tmp_path / "pictures")
    with pytest.raises(UserError, match=words):
        prepare(tmp_path / "data", f"imagefolder:{tmp_path / 'pictures'}")
    assert not (tmp_path / "data" / packed.MANIFEST).exists()


def test_archive_cut_short(tmp_path):
    paint_folder(tmp_path / "pictures")
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "pictures", arcname=".")
    whole = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole"):
        images.read_tree(tmp_path / "cut.tar.gz")


@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "manifest"])
def test_damage_is_named_and_prepare_mends_it(tmp_path, damage, capsys):
    manifest, _ = prepare(tmp_path, "synthetic:50:20")
    victim = tmp_path / (packed.MANIFEST if damage == "manifest" else manifest.files["train-images"]["name"])
    content = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    elif damage == "altered":
        content[-1] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(content[:-100])
    with pytest.raises(UserError, match=victim.name):
        found = packed.read_manifest(tmp_path)
        packed.read(tmp_path, found, "train")
    mended, fresh = prepare(tmp_path, "synthetic:50:20")
    assert fresh
    assert victim.name in capsys.readouterr().err
    assert mended.fingerprint == manifest.fingerprint
    assert packed.damage(tmp_path, mended) is None


def test_several_at_once_leave_one_good_copy(tmp_path):
    command = cli_command("prepare", "--source", "synthetic:3000:500", "--data-dir", str(tmp_path))
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0, 0], said
    assert sum("painting" in text for text in said) == 1, "one works, the others take its copy"
    manifest = packed.read_manifest(tmp_path)
    assert packed.damage(tmp_path, manifest) is None
    assert len(list(tmp_path.glob("*.npy"))) == 4
    assert not list(tmp_path.glob(".*.tmp"))


def test_killed_in_the_middle_then_prepared(tmp_path):
    command = cli_command("prepare", "--source", "synthetic:50000:10000", "--data-dir", str(tmp_path))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + patient(60)
    while not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".train*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert packed.read_manifest(tmp_path) is None, "a killed prepare leaves no manifest"
    manifest, _ = prepare(tmp_path, "synthetic:50:20")
    assert packed.damage(tmp_path, manifest) is None


def test_unknown_source_and_unwritable_folder(tmp_path):
    done = cli("prepare", "--source", "imagenet", "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert "imagenet" in done.stderr
    (tmp_path / "file").write_text("")
    done = cli("prepare", "--source", "synthetic:50:20", "--data-dir", str(tmp_path / "file" / "data"))
    assert done.returncode == 2
    assert "can't be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def cifar_server(tmp_path, monkeypatch):
    """A local server of an archive in CIFAR-10's own format; torchvision is told its address and checksums."""
    from k8scifar.compat import import_torchvision

    import_torchvision()
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    archive = io.BytesIO()
    sums = {}
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
            if name == "batches.meta":
                values = {"label_names": names}
            else:
                values = {"data": rng.integers(0, 256, (20, 3072), np.uint8), "labels": list(range(10)) * 2}
            content = pickle.dumps(values)
            sums[name] = hashlib.md5(content).hexdigest()
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    served = tmp_path / "served"
    served.mkdir()
    (served / "cifar-10-python.tar.gz").write_bytes(archive.getvalue())
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=str(served))  # noqa: E731
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    yield served
    server.shutdown()


def test_cifar10_download(tmp_path, cifar_server):
    manifest, _ = prepare(tmp_path / "data", "auto")
    assert manifest.source == "cifar10"
    assert manifest.counts == {"train": 100, "test": 20}
    assert manifest.classes[3] == "cat"
    assert not list((tmp_path / "data").glob(".download-*")), "the archive is not kept"


def test_cifar10_with_a_wrong_checksum_is_refused(tmp_path, cifar_server):
    path = cifar_server / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(TrainingError, match=r"127\.0\.0\.1 sent another file .*cifar10:PATH"):
        prepare(tmp_path / "data", "cifar10")
    assert packed.read_manifest(tmp_path / "data") is None


def test_auto_without_a_network_is_synthetic_with_a_notice(tmp_path, monkeypatch, capsys):
    from k8scifar.compat import import_torchvision
    from k8scifar.data import prepare as module

    import_torchvision()
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens
    monkeypatch.setattr(module, "SYNTHETIC_COUNTS", (50, 20))
    manifest, _ = prepare(tmp_path, "auto")
    assert manifest.source == "synthetic"
    notice = [line for line in capsys.readouterr().err.splitlines() if line.startswith("NOTICE")]
    assert len(notice) == 2
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    with pytest.raises(TrainingError, match=r"failed 5 times .*cifar10:PATH"):
        prepare(tmp_path / "other", "cifar10")
    assert capsys.readouterr().err.count("trying again") == 4, "asked for by name, it is not given up at once"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        done = cli("prepare", "--source", "synthetic:1000:100", "--data-dir", str(small))
        assert done.returncode == 2
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(small.glob(".*.tmp"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
