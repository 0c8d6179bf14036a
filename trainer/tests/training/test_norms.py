"""Batch normalisation over micro-batches."""

import pytest
import torch

from k8scifar.config.sections import Model
from k8scifar.training import model, norms


@pytest.mark.parametrize("kind", [norms.Statistics, norms.CompiledStatistics])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_running_statistics_weigh_micro_batches_equally(count, kind):
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(3)
    statistics = kind([layer])
    layer.running_mean.uniform_()
    before = layer.running_mean.clone()
    batches = [torch.randn(8, 3, 4, 4) + index for index in range(count)]
    for index, batch in enumerate(batches):
        with statistics.following(index, 1, count):
            layer(batch)
            assert layer.momentum == 1.0 or kind is norms.Statistics, "a compiled graph has it as a constant"
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variances = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, 0.9 * before + 0.1 * means)
    torch.testing.assert_close(layer.running_var, 0.9 * torch.ones(3) + 0.1 * variances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_in_one_pass_are_what_they_are_one_by_one(dtype):
    """Outputs, gradients, running statistics."""
    torch.manual_seed(0)
    images = (torch.randn(12, 8, 5, 5) + torch.arange(12.0).view(12, 1, 1, 1)).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    found = []
    for cuts in ([1, 1, 1], [2, 1], [3]):
        layer = norms.Norm(8)
        statistics, parts, done = norms.Statistics([layer]), [], 0
        inputs = images.clone().requires_grad_()
        for together, part in zip(cuts, inputs.split([4 * cut for cut in cuts]), strict=True):
            with statistics.following(done, together, 3):
                parts.append(layer(part))
            (parts[-1].float() * torch.linspace(-1, 1, 5)).pow(2).sum().backward()
            done += together
        assert statistics.groups and parts[0].dtype == dtype
        buffers = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
        found.append([torch.cat(parts).detach(), inputs.grad, layer.weight.grad, layer.bias.grad, *buffers])
    for other in found[1:]:
        for values, same in zip(other, found[0], strict=True):
            torch.testing.assert_close(values, same)
    assert not torch.equal(found[0][0], norms.Norm(8)(images)), "one normalisation over all images is another"


def test_a_whole_model_takes_micro_batches_in_one_pass():
    """Logits of three micro-batches; in evaluation the last pass has left no trace."""
    torch.manual_seed(0)
    net = model.build(Model(), 10)
    statistics, images = norms.Statistics(norms.layers(net)), torch.randn(24, 3, 16, 16)
    with statistics.following(0, 3, 3):
        together = net(images)
    apart = []
    for index, part in enumerate(images.split(8)):
        with statistics.following(index, 1, 3):
            apart.append(net(part))
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-3, atol=1e-4)
    with statistics.following(0, 3, 3):
        net.eval()
        torch.testing.assert_close(net(images), net(images.flip(0)).flip(0))


@pytest.mark.parametrize(
    ("micro_batches", "images", "count"), [(1, 125, 1), (2, 125, 2), (5, 25, 1), (3, 40, 1), (7, 25, 2), (4, 250, 4)]
)
def test_small_micro_batches_share_a_pass(micro_batches, images, count):
    assert norms.passes(micro_batches, images) == count


def test_a_model_with_torchs_own_forms_takes_micro_batches_one_by_one():
    assert norms.Statistics(norms.layers(model.build(Model(), 10))).groups
    assert not norms.Statistics(norms.layers(model.build(Model(), 10, products=False))).groups
    assert not norms.CompiledStatistics(norms.layers(model.build(Model(), 10))).groups
