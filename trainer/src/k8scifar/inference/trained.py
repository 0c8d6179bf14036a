"""Open a trained model: a run folder, exported weights or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from k8scifar.config.loading import validate
from k8scifar.config.sections import Model
from k8scifar.errors import UserError
from k8scifar.results import weights
from k8scifar.training import checkpoint, model


@dataclass(frozen=True)
class Trained:
    """A model with its weights, its classes, and the normalisation and resolution of its inputs."""

    net: nn.Module
    config: Model
    classes: list[str]
    mean: list[float]
    std: list[float]
    pixels: int


def open_model(path: Path) -> Trained:
    """Open a run folder, a file of exported weights or a checkpoint. Raises UserError."""
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
    if (folder / weights.WEIGHTS).exists():
        return folder / weights.WEIGHTS
    files = checkpoint.listed(folder / "checkpoints")
    if not files:
        raise UserError(f"{folder} holds no trained model yet; train first")
    return files[0]


def _from_weights(path: Path) -> Trained:
    try:
        return _assemble(*weights.read(path))
    except (KeyError, ValueError, TypeError, RuntimeError, UserError):
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
