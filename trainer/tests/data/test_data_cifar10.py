"""CIFAR-10 as people have it: its batches in every form, wherever they lie, and never synthetic data instead."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from data_sets import files, laid, tarred, zipped

from k8scifar.cli import main
from k8scifar.compat import import_torchvision
from k8scifar.data import packed
from k8scifar.data.prepare import prepare
from k8scifar.data.reading import cifar10, remote
from k8scifar.data.reading.batches import CLASSES
from k8scifar.errors import TrainingError, UserError

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
EACH = 20


def rows(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (EACH, 3072), dtype=np.uint8)


def python_batches(protocol: int = 2, keys: type = bytes) -> dict[str, bytes]:
    """The layout of cifar-10-batches-py, of noise, as Python 2 (bytes) or 3 (str) pickles it."""
    key = (lambda text: text.encode()) if keys is bytes else str
    content = {
        name: pickle.dumps(
            {key("data"): rows(number), key("labels"): [index % 10 for index in range(EACH)],
             key("batch_label"): key(name), key("filenames"): [key(f"{index}.png") for index in range(EACH)]},
            protocol)
        for number, name in enumerate(NAMES)
    }  # fmt: skip
    content["batches.meta"] = pickle.dumps({key("label_names"): [key(name) for name in CLASSES]}, protocol)
    return content | {"readme.html": b"<html>"}


def binary_batches() -> dict[str, bytes]:
    content = {}
    for number, name in enumerate(NAMES):
        labels = np.arange(EACH, dtype=np.uint8)[:, None] % 10
        content[f"{name}.bin"] = np.concatenate([labels, rows(number)], 1).tobytes()
    return content | {"batches.meta.txt": "\n".join([*CLASSES, ""]).encode()}


def below(content: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in content.items()}


PYTHON, BINARY = below(python_batches(), "cifar-10-batches-py"), below(binary_batches(), "cifar-10-batches-bin")
PACKED = {
    "cifar-10-python.tar.gz": gzip.compress(tarred(PYTHON)),
    "cifar-10-python.tar": tarred(PYTHON),
    "cifar-10-python.zip": zipped(PYTHON),
    "cifar-10-binary.tar.gz": gzip.compress(tarred(BINARY)),
}


def as_file_or_folder(root, name):
    """The set under one of the names that people have it under."""
    if name in PACKED:
        root.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PACKED[name])
        return root / name
    laid(root, PYTHON if "py" in name else BINARY)
    return root / name


def check(folder, manifest):
    """All that must be in the packed set."""
    assert manifest.classes == CLASSES
    assert manifest.counts == {"train": 5 * EACH, "test": EACH}
    train, test = (packed.read(folder, manifest, split) for split in ("train", "test"))
    assert train.labels.tolist() == [index % 10 for index in range(EACH)] * 5
    for number in range(5):
        assert np.array_equal(train.images[number * EACH], rows(number)[0].reshape(3, 32, 32).transpose(1, 2, 0))
    assert np.array_equal(test.images[7], rows(5)[7].reshape(3, 32, 32).transpose(1, 2, 0))


FORMS = [*PACKED, "cifar-10-batches-py", "cifar-10-batches-bin"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nobody listens, and nothing waits."""
    import_torchvision()
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setattr(remote, "PAUSES", (0.0,))


@pytest.mark.parametrize("kind", ["cifar10", "imagefolder"])
@pytest.mark.parametrize("form", FORMS)
def test_given_by_its_path(tmp_path, form, kind, capsys):
    path = as_file_or_folder(tmp_path / "downloads", form)
    manifest, _ = prepare(tmp_path / "data", f"{kind}:{path}")
    assert manifest.source == f"{kind}:{path}"
    check(tmp_path / "data", manifest)
    assert "took CIFAR-10's" in capsys.readouterr().err
    assert prepare(tmp_path / "data", f"{kind}:{path}")[1] is False
    assert prepare(tmp_path / "data", "auto")[1] is False


@pytest.mark.parametrize("source", ["cifar10", "auto"])
@pytest.mark.parametrize("form", FORMS)
def test_laid_into_the_data_folder(tmp_path, form, source, capsys):
    as_file_or_folder(tmp_path, form)
    manifest, fresh = prepare(tmp_path, source)
    assert fresh
    check(tmp_path, manifest)
    said = capsys.readouterr().err
    assert "downloading" not in said and "SYNTHETIC" not in said
    assert manifest.source == f"cifar10:{tmp_path / form}", "these are not the original's bytes, and it is kept"
    assert ("is not the original CIFAR-10: other check sums than its own in data_batch_1" in said) == ("bi" not in form)
    assert prepare(tmp_path, source)[1] is False, "the same set is not read again"
    assert (tmp_path / form).exists(), "what the user laid there stays"


def test_its_files_laid_into_the_data_folder_themselves(tmp_path):
    laid(tmp_path, python_batches())
    check(tmp_path, prepare(tmp_path, "cifar10")[0])
    check(tmp_path, prepare(tmp_path, "auto")[0])


def test_the_originals_check_sums_make_it_cifar10(tmp_path, monkeypatch, capsys):
    from torchvision.datasets import CIFAR10

    sums = {name: hashlib.md5(data).hexdigest() for name, data in python_batches().items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in NAMES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name in NAMES[5:]])
    as_file_or_folder(tmp_path, "cifar-10-python.tar.gz")
    manifest, _ = prepare(tmp_path, "auto")
    assert manifest.source == "cifar10"
    assert "NOTICE" not in capsys.readouterr().err
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", "0" * 32]])
    prepare(tmp_path / "other", f"cifar10:{tmp_path / 'cifar-10-python.tar.gz'}")
    assert "other check sums than its own in test_batch\n" in capsys.readouterr().err


def test_synthetic_data_gives_way_to_the_real_set_and_never_the_reverse(tmp_path, capsys):
    prepare(tmp_path, "synthetic:60:20")
    as_file_or_folder(tmp_path, "cifar-10-batches-py")
    check(tmp_path, prepare(tmp_path, "auto")[0])
    assert "holds synthetic:60:20, and cifar-10-batches-py too; replacing it" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["auto", "cifar10"])
def test_a_partial_download_in_the_data_folder_is_told_not_passed_over(tmp_path, source):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(PACKED["cifar-10-python.tar.gz"][:-5000])
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is not a whole archive"):
        prepare(tmp_path, source)
    assert packed.read_manifest(tmp_path) is None


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("keys", [bytes, str])
def test_pickles_of_every_age(tmp_path, protocol, keys):
    laid(tmp_path / "set", python_batches(protocol, keys))
    check(tmp_path / "data", prepare(tmp_path / "data", f"cifar10:{tmp_path / 'set'}")[0])


def test_a_pickle_of_python_2(tmp_path):
    """As cPickle of Python 2.7 wrote the original: byte strings, an array by numpy.core.multiarray._reconstruct."""

    def text(data: bytes) -> bytes:
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<I", len(data)) + data

    def batch(number: int) -> bytes:
        labels = b"]" + b"(" + b"".join(b"K" + bytes([index % 10]) for index in range(EACH)) + b"e"
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + text(b"b") + b"\x87R"
            + b"(K\x01" + b"K" + bytes([EACH]) + b"M" + struct.pack("<H", 3072) + b"\x86"
            + b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + b"\x89" + text(rows(number).tobytes()) + b"tb"
        )  # fmt: skip
        return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."

    content = {name: batch(number) for number, name in enumerate(NAMES)}
    laid(tmp_path / "set", content)
    check(tmp_path / "data", prepare(tmp_path / "data", f"cifar10:{tmp_path / 'set'}")[0])


class Evil:
    """Runs a command when it is unpickled by an unpickler that lets it."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    "call", [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (exec, "open('{}', 'w')"), (getattr, 1, "x")]
)
def test_a_pickle_calls_nothing(tmp_path, call):
    mark = tmp_path / "mark"
    function, *arguments = call
    arguments = [text.format(mark) if isinstance(text, str) else text for text in arguments]
    content = python_batches() | {"data_batch_3": pickle.dumps(Evil(function, *arguments))}
    with pytest.raises(
        UserError, match=r"data_batch_3 is no batch of CIFAR-10 \(it calls .*, as no batch of CIFAR-10 does"
    ):
        prepare(tmp_path / "data", f"cifar10:{laid(tmp_path / 'set', content)}")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_batch_4": None}, "data_batch_4 is missing; unpack or fetch it again"),
        ({"data_batch_4": b""}, "data_batch_4 is no batch of CIFAR-10"),
        ({"data_batch_4": b"<html>"}, "data_batch_4 is no batch of CIFAR-10"),
        ({"data_batch_4": python_batches()["data_batch_4"][:-2000]}, "data_batch_4 is no batch of CIFAR-10"),
        ({"data_batch_4": pickle.dumps([1])}, "data_batch_4 is no batch of CIFAR-10"),
        ({"data_batch_4": pickle.dumps({b"data": rows(0), b"labels": [1]})}, "its data is not uint8"),
        ({"data_batch_4": pickle.dumps({b"data": rows(0), b"labels": [10] * EACH})}, "labels that are not 0 to 9"),
        ({"data_batch_4": pickle.dumps({b"data": rows(0), b"labels": ["a"] * EACH})}, "no list of numbers"),
        ({"data_batch_4": pickle.dumps({b"data": rows(0)[:0], b"labels": []})}, "no list of numbers"),
        ({"batches.meta": b"x"}, "batches.meta is no list of CIFAR-10's classes"),
        ({"batches.meta": pickle.dumps({b"label_names": [b"a", b"a"]})}, "names 2 classes, 1 of them different"),
    ],
)  # fmt: skip
def test_damaged_batches_are_named(tmp_path, change, words):
    content = {name: data for name, data in (python_batches() | change).items() if data is not None}
    with pytest.raises(UserError, match=words) as caught:
        prepare(tmp_path / "data", f"cifar10:{laid(tmp_path / 'set', content)}")
    assert "\n" not in str(caught.value)


def test_a_damaged_binary_batch_is_named(tmp_path):
    content = binary_batches()
    content["data_batch_2.bin"] = content["data_batch_2.bin"][:-1]
    with pytest.raises(
        UserError, match=r"data_batch_2\.bin is no batch of CIFAR-10 .* no whole number of records of 3073"
    ):
        prepare(tmp_path / "data", f"cifar10:{laid(tmp_path / 'set', content)}")


def test_without_the_list_of_classes_they_are_cifar10s(tmp_path):
    for number, content in enumerate((python_batches(), binary_batches())):
        bare = {name: data for name, data in content.items() if "meta" not in name}
        check(
            tmp_path / str(number), prepare(tmp_path / str(number), f"cifar10:{laid(tmp_path / f's{number}', bare)}")[0]
        )


def test_a_fuzz_of_pickles_ends_in_a_batch_or_a_line(tmp_path):
    """400 damaged pickles, with a fixed seed."""
    import random

    from k8scifar.data.reading.batches import _checked, _python

    rng, whole = random.Random(0), python_batches()["data_batch_1"]
    taken = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3))):
            content[rng.randrange(min(len(content), rng.choice((200, 1 << 20))))] = rng.randrange(256)
        try:
            taken += len(_checked(_python, bytes(content), 10, "x")) == EACH
        except UserError as error:
            assert str(error).startswith("x ")
    assert taken > 0, "a changed pixel is a changed pixel: a pickle has no check sum"


def test_a_folder_of_images_given_as_cifar10_says_the_way(tmp_path):
    with pytest.raises(UserError, match=r"holds no batches of CIFAR-10 .* use imagefolder:PATH"):
        prepare(tmp_path / "data", f"cifar10:{laid(tmp_path / 'set', files())}")


def test_by_name_without_a_network_it_is_tried_again_and_the_way_is_said(tmp_path, capsys):
    assert main(["prepare", "--source", "cifar10", "--data-dir", str(tmp_path)]) == 1, "a restart may mend it"
    said = capsys.readouterr().err
    assert said.count("trying again") == remote.STILL - 1
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "CIFAR-10 can't be downloaded" in line and "--source cifar10:PATH" in line and "dataset.source" in line
    assert packed.read_manifest(tmp_path) is None
    assert not list(tmp_path.glob(".archive-*"))


def test_auto_without_a_network_falls_back_at_once(tmp_path, monkeypatch, capsys):
    from k8scifar.data import prepare as module

    monkeypatch.setattr(module, "SYNTHETIC_COUNTS", (50, 20))
    assert prepare(tmp_path, "auto")[0].source == "synthetic"
    said = capsys.readouterr().err
    assert "trying again" not in said and said.count("NOTICE") == 2


def test_local_finds_the_names_that_are_there(tmp_path):
    assert cifar10.local(tmp_path) is None
    (tmp_path / "manifest.json").write_text("{}")
    assert cifar10.local(tmp_path) is None
    assert cifar10.local(tmp_path / "none") is None
    with tarfile.open(tmp_path / "cifar-10-batches-py.tar.gz", "w"):
        pass
    assert cifar10.local(tmp_path).name == "cifar-10-batches-py.tar.gz", "as Keras keeps it"


def test_an_address_may_hold_the_batches(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.filesystem("memory").open("/cifar-10-python.tar.gz", "wb") as file:
        file.write(PACKED["cifar-10-python.tar.gz"])
    manifest, _ = prepare(tmp_path, "cifar10:memory://cifar-10-python.tar.gz")
    check(tmp_path, manifest)
    assert manifest.source == "cifar10:memory://cifar-10-python.tar.gz"


def test_a_download_that_does_not_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.filesystem("memory").open("/large.tar.gz", "wb") as file:
        file.write(b"x" * 5000)
    free = type("usage", (), {"free": 4000})
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: free)
    with pytest.raises(
        UserError, match=r"large\.tar\.gz needs 0 MB, and the data folder .* has 0 MB free; free some space"
    ):
        prepare(tmp_path, "imagefolder:memory://large.tar.gz")
    monkeypatch.undo()
    with pytest.raises(UserError, match="is no archive that is known"):
        prepare(tmp_path, "imagefolder:memory://large.tar.gz")


def test_errors_of_the_download_are_a_failure_that_a_restart_may_mend():
    assert issubclass(cifar10.DownloadError, TrainingError)
