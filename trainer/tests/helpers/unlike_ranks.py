"""One rank of test_drift.py, under torchrun: arguments FILE ENVIRONMENTS OPTIONS..., a JSON list of one a rank.

Starts again with this rank's environment, under which its torch computes as on another processor, then trains. What
the weights are at the end of each epoch is added to FILE.RANK.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

RANK = int(os.environ["RANK"])


def main() -> int:
    """Train, noting the weights as they are before and after each epoch's end."""
    from k8scifar.cli import main as command
    from k8scifar.training import epochs

    finish = epochs.finish

    def noted(session, *arguments):
        note(session.state, "before")
        finish(session, *arguments)
        note(session.state, "after")

    epochs.finish = noted
    return command(["train", *sys.argv[3:]])


def note(state, label: str) -> None:
    """Write down a hash of the weights."""
    digest = hashlib.sha256()
    for parameter in state.net.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    with open(f"{sys.argv[1]}.{RANK}", "a") as file:
        file.write(f"{label} {state.step} {digest.hexdigest()}\n")


if __name__ == "__main__":
    own = json.loads(sys.argv[2])[RANK]
    if any(os.environ.get(name) != value for name, value in own.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | own)
    sys.exit(main())
