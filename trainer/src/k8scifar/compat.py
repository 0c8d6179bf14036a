"""The one place for what torchvision's import needs where its compiled operators are missing.

Beside a torch build of another index (a CPU torch with the registry's CUDA torchvision, say), torchvision's C++
operators do not load and ``import torchvision`` fails with "operator torchvision::nms does not exist". Models, data
sets and transforms need none of them, so their schemas alone make the import work. Where torchvision is whole this
module does nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep: list[torch.library.Library] = []  # a Library takes its definitions with it when it is collected


def _operators_load() -> bool:
    """Whether torchvision's compiled operators load beside this torch."""
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    for library in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(library)
        except (OSError, RuntimeError):
            continue
    return hasattr(torch.ops.torchvision, "nms")


def import_torchvision() -> None:
    """Make ``import torchvision`` work; does nothing where it already does. Idempotent."""
    if _keep or _operators_load():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _keep.append(library)
