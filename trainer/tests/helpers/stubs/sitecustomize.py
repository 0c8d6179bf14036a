"""Puts a stand-in for the command line before the real one: `launch` is real, `train` does what STUB_TRAIN says.

On PYTHONPATH of the launcher's tests only. STUB_TRAIN is Python source that defines `train(arguments) -> int`.
"""

import os
import sys
import types

if source := os.environ.get("STUB_TRAIN"):

    def main(arguments=None, explain=print):
        import argparse

        from k8scifar.errors import UserError
        from k8scifar.launch import command

        arguments = sys.argv[1:] if arguments is None else arguments
        try:
            if arguments[0] == "train":
                scope = {}
                exec(source, scope)
                return scope["train"](arguments[1:])
            parser = argparse.ArgumentParser(prog="k8scifar launch")
            command.add_arguments(parser)
            return command.run(parser.parse_args(arguments[1:]))
        except UserError as error:
            print(f"k8scifar: error: {error}", file=sys.stderr)
            explain(str(error))
            return 2

    module = types.ModuleType("k8scifar.cli")
    module.main = main
    sys.modules["k8scifar.cli"] = module
