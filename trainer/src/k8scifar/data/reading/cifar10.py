"""The original CIFAR-10 (Krizhevsky, 2009): where it lies in the data folder already, or else downloaded."""

from __future__ import annotations

import hashlib
import os
import threading
import urllib.request
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from k8scifar.data.packed import Split
from k8scifar.data.reading import batches, remote
from k8scifar.data.reading.archives import opened
from k8scifar.data.reading.tree import walk
from k8scifar.errors import TrainingError, UserError

PROBE_SECONDS = 12.0
WAY = (
    "lay cifar-10-python.tar.gz into the data folder, name it with --source cifar10:PATH, or use another --source "
    "(in the chart: dataset.source)"
)
# What people lay into a data folder, as its servers, torchvision, Keras and Kaggle name it.
NAMES = [
    *(f"cifar-10-{kind}{suffix}" for kind in ("python", "binary") for suffix in (".tar.gz", ".tgz", ".tar", ".zip")),
    *("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-batches-py.tar.gz", "cifar10-python.zip"),
    *("cifar-10.zip", "cifar10.zip"),
]


class DownloadError(TrainingError):
    """CIFAR-10 could not be downloaded."""

    shared = True


def local(folder: Path) -> Path | None:
    """CIFAR-10 as it was downloaded or unpacked by hand into `folder`; None where it is not there."""
    for name in NAMES:
        if os.path.exists(folder / name):
            return folder / name
    for suffix in ("", ".bin"):
        if os.path.exists(folder / f"{batches.TEST}{suffix}"):
            return folder
    return None


def read(path: Path, label: str) -> tuple[list[str], dict[str, Split], bool]:
    """Class names and both splits of CIFAR-10's batches at `path`, and whether they are known to be the original.

    Raises UserError, beginning with `label`, where there are none, or they are damaged.
    """
    with opened(path, label) as source:
        root = walk(source)
        found = batches.find(root, label)
        if found is None:
            raise UserError(
                f"{label} holds no batches of CIFAR-10 (data_batch_1 ... and test_batch, or the same as .bin); for "
                "images in train/<class>/ and test/<class>/ use imagefolder:PATH"
            )
        return batches.read(source, found)


def download(folder: Path, alone: bool = True, patient: bool = True) -> tuple[list[str], dict[str, Split]]:
    """Download, verify and read CIFAR-10, using a temporary file in `folder`; class names and both splits.

    `patient`: try again, with pauses, also while the server can't be reached at all.

    Raises DownloadError; where not `patient`, within about 15 seconds if the server can't be reached.
    """
    from k8scifar.compat import import_torchvision

    import_torchvision()
    from torchvision.datasets import CIFAR10

    if not patient:
        _probe(CIFAR10.url)
    try:
        with remote.fetched(CIFAR10.url, folder, alone) as archive:
            if (md5 := _md5(archive)) != CIFAR10.tgz_md5:
                host = urlsplit(CIFAR10.url).hostname
                raise DownloadError(f"CIFAR-10 can't be downloaded: {host} sent another file (md5 {md5}); {WAY}")
            return read(archive, "cifar10")[:2]
    except DownloadError:
        raise
    except (TrainingError, UserError) as error:
        reason = str(error).partition(";")[0]  # the advice is another one here
        raise DownloadError(f"CIFAR-10 can't be downloaded: {reason}; {WAY}") from None


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _probe(url: str) -> None:
    """Raise DownloadError unless the server answers soon: a lookup or connection without a network can hang."""
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
        except HTTPError:
            outcome.append(None)  # a server that refuses HEAD is there all the same
        except Exception as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    error = outcome[0] if outcome else TimeoutError(f"no answer within {PROBE_SECONDS:.0f} s")
    if error is not None:
        raise DownloadError(f"CIFAR-10 can't be downloaded: {urlsplit(url).hostname} is out of reach ({error}); {WAY}")
