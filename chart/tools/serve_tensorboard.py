"""Serves TensorBoard for the runs of this machine, to this machine alone unless told otherwise. `make tensorboard`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kube import ToolError, exit_code, listening

EVERYWHERE = ("0.0.0.0", "::")


def main(words: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--logdir", type=Path, default=Path("runs"))
    parser.add_argument("--host", default="localhost", help="where it listens; 0.0.0.0: on every network")
    parser.add_argument("--port", default="6006")
    args = parser.parse_args(words)
    if not args.logdir.is_dir():
        raise ToolError(f"there is no folder {args.logdir} with runs: `make train` first, or RUNS_DIR=...")
    port = listening(args.host, args.port, "make tensorboard")
    if args.host in EVERYWHERE:
        print(f"note: {args.host} shows these runs to everybody on this machine's networks")
    program = Path(sys.executable).with_name("tensorboard")
    command = [str(program), "--logdir", str(args.logdir), "--host", args.host, "--port", str(port)]
    sys.stdout.flush()
    os.execv(program, command)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
