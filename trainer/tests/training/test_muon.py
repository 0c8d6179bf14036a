"""Muon: orthogonal directions, equal updates however the ranks divide them, the learning rates of its groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from k8scifar.config import loading
from k8scifar.exchange.cost_model import PER_NUMBER, divide_owners
from k8scifar.training import muon, optim

PRODUCTS = pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@PRODUCTS
@pytest.mark.parametrize("shape", [(16, 144), (64, 64), (48, 16)])
def test_direction_is_near_the_polar_factor(shape, products):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = muon.orthogonal(gradient, 5, products)
    assert found.dtype == torch.float32
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    singular = torch.linalg.svdvals(found) / scale
    assert singular.max() < 1.3
    assert singular.median() > 0.6, "the smallest of a square matrix grow by 3.4^5 only"
    likeness = (found * (left @ right)).sum() / found.norm() / (left @ right).norm()
    assert likeness > 0.95


@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_iteration_on_the_square_equals_the_one_on_the_matrix(iterations):
    gradient = torch.randn(24, 96, generator=torch.Generator().manual_seed(2))
    wanted = gradient / gradient.norm()
    a, b, c = muon.QUINTIC
    for _ in range(iterations):
        square = wanted @ wanted.T
        wanted = a * wanted + (b * square + c * square @ square) @ wanted
    torch.testing.assert_close(muon.orthogonal(gradient, iterations), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("iterations", [3, 5])
def test_bfloat16_is_near_float32(iterations, monkeypatch):
    """Few large singular values and many small ones, which bfloat16 mostly rounds off."""
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(128, 4, generator=generator), torch.randn(4, 512, generator=generator)
    gradient = left @ right + 0.3 * torch.randn(128, 512, generator=generator)
    wanted = muon.orthogonal(gradient, iterations)

    def error() -> float:
        return float((muon.orthogonal(gradient, iterations, torch.bfloat16) - wanted).norm() / wanted.norm())

    assert 0 < error() < 0.05
    monkeypatch.setattr(muon, "BFLOAT16_SPAN", 5)
    assert (error() > 1) is (iterations > 3), "all iterations on one square matrix"


@PRODUCTS
def test_zeros_stay_zeros(products):
    assert not muon.orthogonal(torch.zeros(4, 8), 5, products).any()


def convolutions() -> list[nn.Parameter]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(*channels, 3).to(memory_format=torch.channels_last) for channels in ((8, 16), (16, 4), (4, 32))]
    return [layer.weight for layer in layers]


def build(parameters: list[nn.Parameter]) -> muon.Muon:
    groups = [{"params": parameters, "weight_decay": 0.0, "muon": True, "scale": 0.5}]
    return muon.Muon(groups, 5, lr=0.2, momentum=0.9, nesterov=True, foreach=True)


def test_shared_among_ranks_equals_alone():
    """What `direct` leaves in the gradients is what each weight steps by: here the directions, rounded, of an owner."""
    alone, gradients = convolutions(), [torch.randn_like(parameter) for parameter in convolutions()]
    together, owner = convolutions(), convolutions()
    for parameters in (alone, together, owner):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
    owning, sharing = build(owner), build(together)
    for parameter in owner:
        owning.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def direct():
        for parameter, its in zip(together, owner, strict=True):
            rounded = owning.direction(its).bfloat16()
            parameter.grad.copy_(rounded.view_as(parameter.movedim(1, -1)).movedim(-1, 1))

    sharing.compute_directions_by(direct)
    build(alone).step()
    sharing.step()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    assert not any(sharing.state[parameter]["momentum_buffer"].any() for parameter in together), "the owner's alone"


def test_step_moves_weights_of_fixed_norm_by_the_learning_rate():
    parameters = convolutions()
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = build(parameters)
    optim.set_lr(optimizer, 0.04)
    for parameter in parameters:
        parameter.data.mul_(len(parameter) ** 0.5 / parameter.norm())
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    for parameter, old in zip(parameters, before, strict=True):
        rows, columns = muon.matrix(parameter).shape
        full = min(rows, columns) ** 0.5 * max(1.0, rows / columns) ** 0.5
        assert 0.02 * full * 0.6 < (parameter - old).norm() < 0.02 * full * 1.3


def test_work_is_divided_evenly_and_counted(resnet18):
    hidden = [layer.weight for layer in resnet18.modules() if isinstance(layer, nn.Conv2d)][1:]
    costs = [muon.flops(weight, 5) for weight in hidden]
    sizes = [weight.numel() for weight in hidden]
    for speeds in ([1.0], [1.0] * 2, [1.0] * 4, [2.0, 1.0]):
        owners = divide_owners(costs, sizes, speeds)
        assert set(owners) == set(range(len(speeds)))
        busy = [0.0] * len(speeds)
        for cost, size, owner in zip(costs, sizes, owners, strict=True):
            busy[owner] += cost / speeds[owner] + PER_NUMBER * size
        assert max(busy) < 1.35 * sum(busy) / len(busy), "computing and receiving"
    received = [size for size, owner in zip(sizes, divide_owners(costs, sizes, [1.0, 1.0]), strict=True) if owner]
    assert sum(received) == pytest.approx(sum(sizes) / 2, rel=0.1)
    from torch.utils.flop_counter import FlopCounterMode

    for products in (torch.float32, torch.bfloat16):
        with FlopCounterMode(display=False) as counter:
            muon.orthogonal(torch.ones(64, 576), 5, products)
        assert counter.get_total_flops() == muon.flops(torch.empty(64, 64, 3, 3), 5, products)


def test_groups_of_a_network(resnet18):
    sets = ["optimizer.name=muon", "optimizer.lr=0.2", "optimizer.muon_lr=0.1", "optimizer.norm_bias_lr=1"]
    config = loading.load(sets=sets)
    optimizer = optim.build(resnet18, config)
    assert optimizer.products == torch.float32
    assert optim.build(resnet18, config, "bf16").products == torch.bfloat16
    sgd, hidden = optimizer.param_groups[:2], optimizer.param_groups[2]
    assert len(hidden["params"]) == 19
    assert not any(parameter is resnet18.conv1.weight for parameter in hidden["params"])
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 11_173_962
    optim.set_lr(optimizer, 0.1)
    assert [group["lr"] for group in [*sgd, hidden]] == [0.1, 0.1, 0.05]


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_norms_biases_have_another_learning_rate(name):
    """One step of a small network with all gradients 1, with the factor and without."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)]
    whole, moved = nn.Sequential(*layers), {}
    for factor in (1.0, 8.0):
        net = copy.deepcopy(whole)
        before = {key: parameter.detach().clone() for key, parameter in net.named_parameters()}
        config = loading.load(sets=[f"optimizer.name={name}", "optimizer.lr=0.5", f"optimizer.norm_bias_lr={factor}"])
        optimizer = optim.build(net, config)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
        optim.set_lr(optimizer, 0.25)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved[factor] = {key: before[key] - parameter.detach() for key, parameter in net.named_parameters()}
    further = {
        key for key, step in moved[8.0].items() if torch.equal(step, 8 * moved[1.0][key]) and step.abs().sum() > 0
    }
    assert further == {"1.bias", "3.bias"}
    assert all(torch.equal(step, moved[1.0][key]) for key, step in moved[8.0].items() if key not in further)


def test_a_resumed_optimiser_keeps_its_momenta_and_takes_new_settings():
    def build(*sets: str) -> torch.optim.Optimizer:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 3))
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        plain = ["optimizer.name=muon", "optimizer.lr=0.2", "optimizer.norm_bias_lr=1"]
        return optim.build(net, loading.load(sets=[*plain, *sets]))

    before = build("optimizer.muon_lr=0.1", "optimizer.momentum=0.9")
    before.step()
    after = build("optimizer.muon_lr=0.05", "optimizer.momentum=0.8", "optimizer.weight_decay=0.01")
    optim.restore(after, copy.deepcopy(before.state_dict()))
    assert [group.get("scale", 1.0) for group in after.param_groups] == [1.0, 1.0, 0.25]
    assert [group["momentum"] for group in after.param_groups] == [0.8, 0.8, 0.0]
    assert after.param_groups[0]["weight_decay"] == 0.01
    for one, other in zip(before.param_groups, after.param_groups, strict=True):
        for parameter, twin in zip(one["params"], other["params"], strict=True):
            momentum = before.state[parameter]["momentum_buffer"]
            assert torch.equal(momentum, after.state[twin]["momentum_buffer"]) and momentum.abs().sum() > 0
