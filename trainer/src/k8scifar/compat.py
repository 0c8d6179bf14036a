"""Make ``import torchvision`` work where its compiled operators do not load.

They do not load with a torch build of another index, for example a CPU torch with a CUDA torchvision. The import then
fails with "operator torchvision::nms does not exist". Models, data sets and transforms need none of these operators,
so defining their schemas is enough.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep: list[torch.library.Library] = []  # garbage collection of a Library removes its definitions


def _operators_load() -> bool:
    """Return whether torchvision's compiled operators load with this torch."""
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    for library in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except (OSError, RuntimeError):
            continue
    return hasattr(torch.ops.torchvision, "nms")


def import_torchvision() -> None:
    """Make ``import torchvision`` work; does nothing where it works already. May be called again."""
    if _keep or _operators_load():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _keep.append(library)
