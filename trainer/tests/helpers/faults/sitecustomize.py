"""Faults at chosen points of a training, for tests: on PYTHONPATH of theirs only, so that no user's process has them.

K8SCIFAR_FAULTS is a list like ``rename:step-:kill  call:k8scifar.training.optim.set_lr:stall=8:1``: where, what, and
for which rank (any if left out). Each strikes once: it leaves a mark in the folder K8SCIFAR_FAULTS_DIR.

Where: ``write:TEXT`` before a file whose name holds TEXT is renamed into place (its content is then under a temporary
name), ``rename:TEXT`` just after, ``call:MODULE.FUNCTION`` before a call.
What: ``kill``, ``kill-soon`` (in 50 ms), ``term`` (SIGTERM), ``freeze`` (SIGSTOP), ``stall=SECONDS``, or an OSError by
its name, such as ``ESTALE``.

K8SCIFAR_NO_LOCKS=1: no file can be locked, as on some NFS mounts.
"""

import errno
import importlib.abc
import importlib.util
import os
import signal
import sys
import threading
import time


def strike(number: int, what: str, rank: str) -> None:
    """Do it, unless it was done before or is for another rank."""
    if rank and os.environ.get("RANK", "0") != rank:
        return
    try:
        os.close(os.open(os.path.join(os.environ["K8SCIFAR_FAULTS_DIR"], str(number)), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "kill-soon":
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif what == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what.startswith("stall="):
        time.sleep(float(what.partition("=")[2]))
    else:
        raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)))


def watch_renames(points: list) -> None:
    """Strike around os.replace."""
    real = os.replace

    def replace(source, target, **options):
        name = os.path.basename(os.fspath(target))
        for kind, text, what, rank, number in points:
            if kind == "write" and text in name:
                strike(number, what, rank)
        real(source, target, **options)
        for kind, text, what, rank, number in points:
            if kind == "rename" and text in name:
                strike(number, what, rank)

    os.replace = replace


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Wraps functions of modules as they are imported."""

    def __init__(self, points: list) -> None:
        self.points = points
        self.real: dict[str, importlib.abc.Loader] = {}

    def find_spec(self, name, path=None, target=None):
        if not any(text.rpartition(".")[0] == name for _, text, *_ in self.points):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        self.real[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.real[module.__name__].exec_module(module)
        for _, text, what, rank, number in self.points:
            place, _, function = text.rpartition(".")
            if place == module.__name__:
                setattr(module, function, self.wrapped(getattr(module, function), what, rank, number))

    @staticmethod
    def wrapped(function, what, rank, number):
        def call(*arguments, **options):
            strike(number, what, rank)
            return function(*arguments, **options)

        return call


def without_locks() -> None:
    """Have flock fail."""
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock


if os.environ.get("K8SCIFAR_NO_LOCKS"):
    without_locks()
if faults := os.environ.get("K8SCIFAR_FAULTS"):
    parsed = []
    for number, item in enumerate(faults.split()):
        kind, text, what, *rank = item.split(":")
        parsed.append((kind, text, what, rank[0] if rank else "", number))
    watch_renames([point for point in parsed if point[0] != "call"])
    sys.meta_path.insert(0, Loader([point for point in parsed if point[0] == "call"]))
