"""Serve TensorBoard for the runs of this machine, on localhost by default. `make tensorboard` calls it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kube import ToolError, exit_code, listening

EVERYWHERE = ("0.0.0.0", "::")


def main(words: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--logdir", type=Path, default=Path("runs"))
    parser.add_argument("--host", default="localhost", help="address to listen at; 0.0.0.0: every network")
    parser.add_argument("--port", default="6006")
    args = parser.parse_args(words)
    if not args.logdir.is_dir():
        raise ToolError(f"there is no folder {args.logdir} with runs: `make train` first, or RUNS_DIR=...")
    port = listening(args.host, args.port, "make tensorboard")
    if args.host in EVERYWHERE:
        print(f"note: at {args.host} everybody on this machine's networks can see these runs")
    program = Path(sys.executable).with_name("tensorboard")
    command = [str(program), "--logdir", str(args.logdir), "--host", args.host, "--port", str(port)]
    sys.stdout.flush()
    os.execv(program, command)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
