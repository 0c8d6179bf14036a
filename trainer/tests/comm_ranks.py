"""One rank of test_comm.py, under torchrun: several trainings one after the other, to import torch only once.

Arguments: a JSON file of trainings, each {"port", "arguments", "cut"}. With "cut": {"from", "to", "step"} rank 0 first
copies a finished run's folder as a crash would leave it after that step. Each rank's hash of its own weights at the end
of each epoch and of the run is added to hashes.RANK beside the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from k8scifar import checkpoint
from k8scifar.cli import main
from k8scifar.session import Session


def hashed(method):
    """`method` of Session, which also writes down what this rank's weights are."""

    def wrapper(session, *arguments):
        digest = hashlib.sha256()
        for parameter in session.state.net.parameters():
            digest.update(parameter.detach().contiguous().numpy().tobytes())
        with open(HASHES, "a") as file:
            file.write(f"{session.config.name} {session.state.step} {digest.hexdigest()}\n")
        return method(session, *arguments)

    return wrapper


def cut(source: Path, folder: Path, step: int) -> None:
    """Copy a run folder without its end."""
    shutil.copytree(source, folder)
    (folder / "summary.json").unlink()
    for path in checkpoint.listed(folder / "checkpoints"):
        if checkpoint.step_of(path) > step:
            path.unlink()


def run(plan: Path, rank: str) -> int:
    """This rank's part of every training."""
    for training in json.loads(plan.read_text()):
        if rank == "0" and training["cut"]:
            cut(Path(training["cut"]["from"]), Path(training["cut"]["to"]), training["cut"]["step"])
        os.environ["MASTER_PORT"] = str(training["port"])
        if code := main(["train", *training["arguments"]]):
            return code
    return 0


if __name__ == "__main__":
    HASHES = Path(sys.argv[1]).with_name(f"hashes.{os.environ['RANK']}")
    Session.finish_epoch = hashed(Session.finish_epoch)
    Session.complete = hashed(Session.complete)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    sys.exit(run(Path(sys.argv[1]), os.environ["RANK"]))
