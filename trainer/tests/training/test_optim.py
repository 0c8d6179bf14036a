"""Two steps of the optimiser on a small network are those of the formulas, written out here."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from k8scifar.config import loading
from k8scifar.training import muon, optim

LR, MUON_LR, FACTOR, MOMENTUM, DECAY, ITERATIONS = 0.5, 0.2, 8.0, 0.9, 0.01, 3


def by_hand(name: str, weight: torch.Tensor, gradients: list[torch.Tensor], nesterov: bool, decays: str, is_muon: bool):
    """A weight after a step with each of these gradients. `name`: in the network below."""
    momentum, lr = torch.zeros_like(weight), LR * (FACTOR if name in ("1.bias", "3.bias") else 1.0)
    decay = DECAY if decays == "all" or weight.ndim > 1 else 0.0
    for gradient in gradients:
        if is_muon and name == "2.weight":
            momentum = MOMENTUM * momentum + gradient
            wanted = gradient + MOMENTUM * momentum if nesterov else momentum
            matrix = muon.orthogonal(muon.matrix(wanted), ITERATIONS).bfloat16().float()
            weight = weight * len(weight) ** 0.5 / weight.norm()
            weight = weight - MUON_LR * matrix.view_as(weight.movedim(1, -1)).movedim(-1, 1)
            continue
        gradient = gradient + decay * weight
        momentum = MOMENTUM * momentum + gradient
        weight = weight - lr * (gradient + MOMENTUM * momentum if nesterov else momentum)
    return weight


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("name", "decays"), [("sgd", "all"), ("sgd", "matrices"), ("muon", "matrices")])
def test_two_steps_are_those_of_the_formulas(name, decays, nesterov):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3))
    before = {key: weight.detach().clone() for key, weight in net.named_parameters()}
    gradients = [{key: torch.randn_like(weight) for key, weight in before.items()} for _ in range(2)]
    sets = [f"name={name}", f"lr={LR}", f"muon_lr={MUON_LR}", f"norm_bias_lr={FACTOR}", f"momentum={MOMENTUM}"]
    sets += [f"weight_decay={DECAY}", f"muon_iterations={ITERATIONS}", f"nesterov={nesterov}", f"decay={decays}"]
    optimizer = optim.build(net, loading.load(sets=[f"optimizer.{each}" for each in sets]))
    optim.set_lr(optimizer, LR)
    for step in gradients:
        for key, weight in net.named_parameters():
            weight.grad = copy.deepcopy(step[key])
        optimizer.step()
    for key, weight in net.named_parameters():
        wanted = by_hand(key, before[key], [step[key] for step in gradients], nesterov, decays, name == "muon")
        torch.testing.assert_close(
            weight.detach(), wanted, rtol=1e-5, atol=1e-6, msg=lambda said, key=key: f"{key}: {said}"
        )
