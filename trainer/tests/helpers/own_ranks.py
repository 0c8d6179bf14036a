"""One rank of test_nodes.py, under torchrun: it believes that it is alone on its node, with its own folders.

Arguments: a folder, and in it plan.json: trainings, one after the other, each {"port", "name", "arguments", "odd"}.
The ranks' folders are data-RANK and runs-RANK. `odd` is what happens: "" nothing; "piece": rank 1's disk is full at the
second piece of a file; "bit": its checkpoints differ; "lost", "lost on node 0": rank 1, rank 0 has lost its data; a
source: rank 0 prepares that one first. Exit codes are left in codes.RANK.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from k8scifar.cli import main
from k8scifar.data.prepare import prepare
from k8scifar.ranks import transfer
from k8scifar.training import checkpoint


def full_at_the_second_piece(add):
    """`_Part.add`, which fails once one piece has come."""

    def wrapper(part, piece):
        if part._open.tell() >= transfer.PIECE:
            return f"{part._path} could not be written (No space left on device); free space"
        return add(part, piece)

    return wrapper


def another_bit(encode):
    """`encode` of other values."""
    return lambda payload: encode(payload | {"odd": True})


def run(folder: Path, rank: str) -> list[int]:
    """This rank's part of every training: its exit codes."""
    codes, add, encode = [], transfer._Part.add, checkpoint.encode
    for training in json.loads((folder / "plan.json").read_text()):
        odd = training["odd"]
        if ":" in odd and rank == "0":
            prepare(folder / "data-0", odd)
        if (odd, rank) in (("lost", "1"), ("lost on node 0", "0")):
            shutil.rmtree(folder / f"data-{rank}")
        transfer._Part.add = full_at_the_second_piece(add) if (odd, rank) == ("piece", "1") else add
        checkpoint.encode = another_bit(encode) if (odd, rank) == ("bit", "1") else encode
        os.environ["MASTER_PORT"] = str(training["port"])
        own = ["--data-dir", str(folder / f"data-{rank}"), "--runs-dir", str(folder / f"runs-{rank}")]
        codes.append(main(["train", *own, "--name", training["name"], *training["arguments"]]))
    return codes


if __name__ == "__main__":
    os.environ |= {"GROUP_RANK": os.environ["RANK"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    place, me = Path(sys.argv[1]), os.environ["RANK"]
    (place / f"codes.{me}").write_text(json.dumps(run(place, me)))
