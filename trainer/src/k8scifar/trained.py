"""Trained networks: exported to a file of weights, and opened again for evaluation and prediction."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from k8scifar import checkpoint, model
from k8scifar.config import Model
from k8scifar.errors import UserError
from k8scifar.files import write_atomically
from k8scifar.settings import validate

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Trained:
    """A network with its weights and what its inputs must look like."""

    net: nn.Module
    config: Model
    classes: list[str]
    mean: list[float]
    std: list[float]
    pixels: int


def export(path: Path, trained: Trained) -> str:
    """Write the weights as safetensors, all that is needed to use them in its metadata; returns the file's sha256.

    Raises OSError.
    """
    from safetensors.torch import save

    about = {
        "model": trained.config.model_dump(mode="json"),
        "classes": trained.classes,
        "mean": trained.mean,
        "std": trained.std,
        "pixels": trained.pixels,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.net.state_dict().items()}
    content = save(tensors, metadata={"k8scifar": json.dumps(about)})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def open_model(path: Path) -> Trained:
    """Open a run folder, a file of exported weights or a checkpoint. Raises UserError where it is none of them."""
    if path.is_dir():
        path = _best_of(path)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}; give a run folder, a .pt or a .safetensors file")
    try:
        trained = _from_weights(path) if path.suffix == ".safetensors" else _from_checkpoint(path)
    except checkpoint.Damaged as damage:
        raise UserError(f"{damage}; use another checkpoint") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    trained.net.eval()
    return trained


def _best_of(folder: Path) -> Path:
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    files = checkpoint.listed(folder / "checkpoints")
    if not files:
        raise UserError(f"{folder} holds no trained model yet; train first")
    return files[0]


def _from_weights(path: Path) -> Trained:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["k8scifar"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        return _assemble(about, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, UserError):
        raise checkpoint.Damaged(f"{path} is damaged, or was not exported by K8sCIFAR") from None


def _from_checkpoint(path: Path) -> Trained:
    payload = checkpoint.load(path)
    try:
        return _assemble(payload | {"model": payload["config"]["model"]}, payload["model"])
    except (KeyError, TypeError, RuntimeError, UserError):
        raise checkpoint.Damaged(f"{path} lacks parts of a checkpoint") from None


def _assemble(about: dict, tensors: dict[str, torch.Tensor]) -> Trained:
    config = validate({"model": about["model"]}).model
    net = model.build(config, len(about["classes"]))
    net.load_state_dict(tensors)
    return Trained(net, config, about["classes"], about["mean"], about["std"], about["pixels"])
