"""The network: size, whitening, weight decay."""

from __future__ import annotations

import pytest
import torch

from k8scifar.config.schema import Config
from k8scifar.config.sections import Model
from k8scifar.training import model, optim


def test_resnet18_has_the_published_size_and_cost(resnet18):
    assert model.parameters(resnet18) == 11_173_962
    forward_and_backward = model.training_flops(resnet18, 32)
    # 0.555 GMAC forward; backward is twice that, less the gradient of the input pictures.
    assert forward_and_backward == pytest.approx(3 * 2 * 0.555e9, rel=0.01)


def test_other_resnets_by_name():
    assert model.build(Model(name="resnet34"), 7).fc.out_features == 7
    assert model.build(Model(stem="imagenet"), 10).conv1.kernel_size == (7, 7)


def test_blocks_that_start_at_zero_are_the_identity():
    net = model.build(Model(zero_init=True), 10).eval()
    inputs = torch.rand(2, 64, 8, 8)
    assert torch.equal(net.layer1(inputs), inputs)


def test_whitening_filters_decorrelate_patches():
    torch.manual_seed(0)
    net = model.build(Model(), 10)
    pictures = torch.nn.functional.interpolate(torch.randn(64, 3, 6, 6), (24, 24), mode="bicubic")
    model.whiten(net, pictures)
    out = torch.nn.functional.conv2d(pictures, net.conv1.weight)[:, :27].transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(out[-10:])  # the strongest directions; the weakest are damped
    assert (correlation - torch.eye(10)).abs().max() < 0.05
    assert torch.equal(net.conv1.weight[:27], -net.conv1.weight[27:54])


@pytest.mark.parametrize(("decay", "vectors"), [("all", 5e-4), ("matrices", 0.0)])
def test_weight_decay_groups(resnet18, decay, vectors):
    config = Config.model_validate({"optimizer": {"decay": decay}})
    groups = optim.build(resnet18, config).param_groups
    assert [group["weight_decay"] for group in groups] == [5e-4, vectors]
    assert all(parameter.ndim > 1 for parameter in groups[0]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(resnet18.parameters()))
