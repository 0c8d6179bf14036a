"""The command line: each command is a module, imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable

import k8scifar
from k8scifar.errors import TrainingError, UserError

# command -> (module, function that adds its options, function that runs it, help)
COMMANDS = {
    "prepare": ("data.prepare", "add_arguments", "run", "bring a data set into its packed form"),
    "train": ("training.loop", "add_arguments", "run", "train: one rank, under torchrun or alone"),
    "launch": ("launch.command", "add_arguments", "run", "run torchrun on this machine, supervised"),
    "preflight": ("launch.preflight", "add_arguments", "run", "check this machine before training"),
    "status": ("results.status", "add_arguments", "run", "say from its run folder what a training is doing"),
    "evaluate": ("inference.evaluate", "add_arguments", "run", "evaluate a trained model on the test images"),
    "report": ("results.report", "add_arguments", "run", "write the report of a finished run again"),
    "predict": ("inference.predict", "add_arguments", "run", "classify images"),
    "config": (
        "config.loading",
        "add_config_arguments",
        "run_config",
        "print the resolved configuration, or its schema",
    ),
}


def main(argv: list[str] | None = None, explain: Callable[[str], None] = lambda line: None) -> int:
    """Run one command and return its exit code. A user's mistake is one line and exit code 2.

    `explain` is called with that line, and with that of a failed run.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name of any script, whatever the terminal's encoding
    try:
        if sys.platform == "win32":
            raise UserError(
                "K8sCIFAR does not run on Windows itself; run it in WSL2: type wsl --install, then work there"
            )
        parser, module, run = _parser(argv[0] if argv else "")
        args = parser.parse_args(argv)
        return getattr(module, run)(args) if module else 0
    except (UserError, TrainingError) as error:
        _log(error, explain)
        return error.code
    except KeyboardInterrupt:
        return 130


def _parser(chosen: str) -> tuple[argparse.ArgumentParser, object | None, str]:
    """The parser, with the options of the chosen command only: the others' modules stay unimported."""
    parser = argparse.ArgumentParser(prog="k8scifar", description="Train one image classifier on two machines at once.")
    parser.add_argument("--version", action="version", version=f"k8scifar {k8scifar.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    module, run = None, ""
    for name, (path, add, function, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            module, run = importlib.import_module(f"k8scifar.{path}"), function
            getattr(module, add)(command)
    return parser, module, run


def _log(error: UserError | TrainingError, explain: Callable[[str], None]) -> None:
    """Log the error's line, once a machine unless it concerns this rank only."""
    line = " ".join(str(error).split())
    if not error.shared or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"k8scifar: error: {line}", file=sys.stderr, flush=True)
        explain(line)


if __name__ == "__main__":
    raise SystemExit(main())
