"""The original CIFAR-10 (Krizhevsky, 2009) by torchvision's download, its checksums verified."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import urllib.request
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import numpy as np

from k8scifar.compat import import_torchvision
from k8scifar.data.packed import Split
from k8scifar.errors import UserError

PROBE_SECONDS = 12.0
STALL_SECONDS = 30.0


class DownloadError(UserError):
    """CIFAR-10 could not be downloaded."""


def download(folder: Path) -> tuple[list[str], dict[str, Split]]:
    """Download, verify and read CIFAR-10, using a temporary folder in `folder`; class names and both splits.

    Raises DownloadError, within about 15 seconds where the server can't be reached.
    """
    import_torchvision()
    from torchvision.datasets import CIFAR10

    _probe(CIFAR10.url)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                train = CIFAR10(temporary, train=True, download=True)
            test = CIFAR10(temporary, train=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadError(f"the download of CIFAR-10 failed ({reason}); try again, or use another --source") from None
    finally:
        socket.setdefaulttimeout(before)
    splits = {
        name: Split(np.asarray(part.data), np.asarray(part.targets, np.int64))
        for name, part in (("train", train), ("test", test))
    }
    return list(train.classes), splits


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
        host = urlsplit(url).hostname
        raise DownloadError(
            f"CIFAR-10 can't be downloaded: {host} is out of reach ({error}); check the network"
        ) from None
