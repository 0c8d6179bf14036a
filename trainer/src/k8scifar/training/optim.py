"""Build the optimiser, set its learning rates, restore its momenta."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from k8scifar.config.schema import Config
from k8scifar.training import norms
from k8scifar.training.muon import Muon


def build(net: nn.Module, config: Config, precision: str = "fp32") -> torch.optim.Optimizer:
    """SGD or Muon over `net`, with weight decay on all parameters or on the matrices only.

    `precision`: of the training. In bf16 on a CPU, Muon's matrix products are in bfloat16 as well.

    Source of a higher learning rate for the biases of batch normalisations: Page, How to Train Your ResNet (2018-2019),
    part 8; Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU (2024).
    """
    settings = config.optimizer
    apart = settings.norm_bias_lr != 1.0  # else in the group of the others, as in checkpoints of earlier releases
    biases = [layer.bias for layer in norms.layers(net)] if apart else []
    kept = set(map(id, biases))
    vectors = [parameter for parameter in net.parameters() if parameter.ndim <= 1 and id(parameter) not in kept]
    hidden = [layer.weight for layer in net.modules() if isinstance(layer, nn.Conv2d)][1:]
    if settings.name == "sgd":
        hidden = []
    kept = set(map(id, hidden))
    matrices = [parameter for parameter in net.parameters() if parameter.ndim > 1 and id(parameter) not in kept]
    decay = settings.weight_decay if settings.decay == "all" else 0.0
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": decay},
    ]
    if apart:
        groups.append({"params": biases, "weight_decay": decay, "scale": settings.norm_bias_lr})
    # Not fused: on a CPU the fused form silently assumes that gradients have the memory layout of their weights.
    shared: dict[str, Any] = {"momentum": settings.momentum, "nesterov": settings.nesterov, "foreach": True}
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, **shared)
    groups.append({"params": hidden, "weight_decay": 0.0, "muon": True, "scale": settings.muon_lr / settings.lr})
    rounded = precision == "bf16" and next(net.parameters()).device.type == "cpu"  # not measured on a GPU
    products = torch.bfloat16 if rounded else torch.float32
    return Muon(groups, settings.muon_iterations, products, lr=settings.lr, **shared)


def restore(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore the momenta of a `state_dict`, and keep the present settings."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def step_flops(optimizer: torch.optim.Optimizer) -> int:
    """Floating point operations of the matrix products in one step."""
    return optimizer.step_flops() if isinstance(optimizer, Muon) else 0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group; those with a `scale` keep their proportion to it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
