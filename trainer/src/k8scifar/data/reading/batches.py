"""CIFAR-10's own files, the batches for Python and those for C, from a folder or an archive of them.

The ones for Python are pickles, and the only pickles that are read here: by an unpickler that makes arrays, lists and
bytes, and calls nothing.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from k8scifar.console import say
from k8scifar.data.packed import Split
from k8scifar.data.reading.archive_members import WRITE
from k8scifar.data.reading.layout import class_name
from k8scifar.data.reading.tree import Place, Source
from k8scifar.errors import UserError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
TEST = "test_batch"
VALUES = 3 * 32 * 32


@dataclass(frozen=True)
class Batches:
    """Where the batches are, and of which kind."""

    place: Place
    suffix: str  # "" for Python's, ".bin" for C's


def find(root: Place, label: str) -> Batches | None:
    """The first folder of CIFAR-10's batches in a walked tree, None where there is none.

    Raises UserError where there is CIFAR-100.
    """
    for place in root.below:
        if place.path.rpartition("/")[2] in ("cifar-100-python", "cifar-100-binary"):
            raise UserError(f"{label} is CIFAR-100, whose batches are not taken; {WRITE}")
        for suffix in ("", ".bin"):
            if any(f"{name}{suffix}" in place.files for name in TRAIN) and f"{TEST}{suffix}" in place.files:
                return Batches(place, suffix)
    return None


def read(source: Source, found: Batches) -> tuple[list[str], dict[str, Split], bool]:
    """Class names, both splits, and whether all is known to be the original's bytes; says what was taken.

    Raises UserError naming the batch that is missing, damaged or something else.
    """
    place, label = found.place, source.label
    meta = "batches.meta.txt" if found.suffix else "batches.meta"
    wanted = [f"{name}{found.suffix}" for name in (*TRAIN, TEST)]
    for name in wanted:
        if name in place.lost or name not in place.files:
            reason = place.lost.get(name, "is missing")
            raise UserError(f"{label}: {place.name(name)} {reason}; unpack or fetch it again")
    names = [*wanted, *([meta] if meta in place.files else [])]
    keys = {place.name(name): name for name in names}
    contents = {
        keys[key]: content for key, content in source.contents({key: place.files[name] for key, name in keys.items()})
    }
    parse = _binary if found.suffix else _python
    classes = _classes(contents.get(meta), bool(found.suffix), f"{label}: {place.name(meta)}")
    parts = {name: _checked(parse, contents[name], len(classes), f"{label}: {place.name(name)}") for name in wanted}
    train = [parts[name] for name in wanted[:-1]]
    splits = {
        "train": Split(
            np.concatenate([part.images for part in train]), np.concatenate([part.labels for part in train])
        ),
        "test": parts[wanted[-1]],
    }
    kind = "binary" if found.suffix else "Python"
    counts = " + ".join(f"{len(split):,} {name}" for name, split in splits.items())
    say(f"took CIFAR-10's {kind} batches in {place.name()}: {counts} images")
    odd = [] if found.suffix else altered(contents)  # nobody has published check sums of the binary batches
    if odd:
        say(f"NOTICE: {label} is not the original CIFAR-10: other check sums than its own in {', '.join(odd)}")
    return classes, splits, not found.suffix and not odd


def altered(contents: dict[str, bytes]) -> list[str]:
    """The names of the Python batches whose md5 is not the original's, as torchvision has it."""
    from k8scifar.compat import import_torchvision

    import_torchvision()
    from torchvision.datasets import CIFAR10

    original = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    return [
        name for name, md5 in original.items() if hashlib.md5(contents[name], usedforsecurity=False).hexdigest() != md5
    ]


def _classes(content: bytes | None, is_text: bool, what: str) -> list[str]:
    if content is None:
        return CLASSES
    try:
        if is_text:
            names: Any = content.decode().split()
        else:
            names = [_text(name) for name in _unpickled(content)["label_names"]]
    except Exception as error:
        raise UserError(f"{what} is no list of CIFAR-10's classes ({_said(error)}); fetch it again") from None
    names = [class_name(name, f"{what}: {name}") for name in names]
    if len(set(names)) != len(names) or len(names) < 2:
        raise UserError(f"{what} names {len(names)} classes, {len(set(names))} of them different; fetch it again")
    return names


def _checked(parse: Callable[[bytes], Split], content: bytes, classes: int, what: str) -> Split:
    try:
        part = parse(content)
    except Exception as error:  # a pickle can raise whatever it likes, a damaged one MemoryError too
        raise UserError(f"{what} is no batch of CIFAR-10 ({_said(error)}); unpack or fetch it again") from None
    if not len(part) or part.labels.min() < 0 or part.labels.max() >= classes:
        raise UserError(f"{what} holds no images, or labels that are not 0 to {classes - 1}; unpack or fetch it again")
    return part


def _said(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _binary(content: bytes) -> Split:
    """Records of a label's byte and the 3 x 32 x 32 bytes of an image."""
    if len(content) % (VALUES + 1):
        raise ValueError(f"{len(content):,} bytes are no whole number of records of {VALUES + 1}")
    records = np.frombuffer(content, np.uint8).reshape(-1, VALUES + 1)
    return Split(_upright(records[:, 1:]), records[:, 0].astype(np.int64))


def _python(content: bytes) -> Split:
    values = _unpickled(content)
    data, labels = values["data"], values["labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), VALUES):
        raise ValueError(f"its data is not uint8 [{len(labels)}, {VALUES}]")
    numbers = np.asarray(labels)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError("its labels are no list of numbers")
    return Split(_upright(data), numbers.astype(np.int64))


def _upright(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _text(value: Any) -> str:
    if not isinstance(value, (bytes, str)):
        raise ValueError("a name is no text")
    return value.decode() if isinstance(value, bytes) else value


def _unpickled(content: bytes) -> dict[str, Any]:
    values = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(values, dict):
        raise ValueError("it is no mapping")
    return {_text(key): value for key, value in values.items()}


def _latin1(text: str, encoding: str = "") -> bytes:
    """What Python 3 writes for bytes in the protocols of Python 2."""
    if encoding.lower().replace("-", "") not in ("latin1", "iso88591"):
        raise pickle.UnpicklingError("an encoding other than Latin-1")
    return text.encode("latin-1")


# All that the pickles of CIFAR-10 name, by the names that numpy has had.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0] for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, as no batch of CIFAR-10 does") from None
