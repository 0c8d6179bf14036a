"""Check that this machine can compile the model, and compile it: one graph for each resolution."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from k8scifar.config.schema import Config
from k8scifar.errors import RankError

DEFAULT = "inductor"
COMPILERS = {"cuda": ("CC", ("cc", "gcc", "clang")), "cpu": ("CXX", ("g++", "clang++", "c++"))}
MANY = 6  # resolutions; above that one graph for all compiles faster than one graph each


def backend() -> str:
    """torch.compile's backend; tests set another in K8SCIFAR_COMPILE_BACKEND."""
    return os.environ.get("K8SCIFAR_COMPILE_BACKEND", DEFAULT)


def check(config: Config, device: torch.device, which: Callable[[str], str | None] = shutil.which) -> None:
    """Raise RankError if hardware.compile is set and this machine lacks a compiler.

    torch compiles generated code on the machine: with Triton and a C compiler for a GPU, a C++ compiler for a CPU.
    """
    if not config.hardware.compile or backend() != DEFAULT:
        return
    try:
        torch.compile(nn.Identity())
    except RuntimeError as error:  # this torch is older than this Python
        raise RankError(f"hardware.compile=true: {str(error).splitlines()[0]}; set hardware.compile=false") from None
    variable, names = COMPILERS[device.type]
    language = "C" if variable == "CC" else "C++"
    lacks = []
    if not any(which(name) for name in ([os.environ[variable]] if os.environ.get(variable) else names)):
        lacks.append(f"a {language} compiler ({', '.join(names)}, or what {variable} names)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacks.append("Python's headers (Python.h)")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        lacks.append("the package triton")
    if lacks:
        raise RankError(
            f"hardware.compile=true needs {' and '.join(lacks)} on this machine; set hardware.compile=false, or "
            "install them (Debian: gcc g++ python3-dev), in a cluster in an image of your own"
        )


def compiled(net: nn.Module, config: Config) -> nn.Module:
    """Return `net` so that its first call compiles it; its parameters stay the same objects."""
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)  # training in fp32 must not use TF32
    sizes = len({stage.pixels for stage in config.resolution})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.compile(net, backend=backend(), dynamic=sizes > MANY)
