"""The file of trained weights: safetensors, with all that is needed to use them in its metadata."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from k8scifar.files import write_atomically

WEIGHTS = "model.safetensors"


def write(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> str:
    """Write the weights and what is to be known about them; returns the file's sha256. Raises OSError.

    Args:
        tensors: a model's state_dict.
        about: model (its configuration), classes, mean, std, pixels.
    """
    from safetensors.torch import save

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(kept, metadata={"k8scifar": json.dumps(about)})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `write` was given: (about, tensors). Raises ValueError where the file is no such thing, and OSError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["k8scifar"])
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from None
