"""Batch normalisation of micro-batches: each is normalised by its own statistics, several of them in one pass.

The result does not depend on which micro-batches a rank computes, or on how many of them in one pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

MOMENTUM = 0.1  # of BatchNorm's running statistics, in a step
PASS = 128  # images in a pass of several micro-batches; with more of them an image takes longer


class Norm(nn.BatchNorm2d):
    """BatchNorm2d that normalises each micro-batch of a pass alone; its parameters have BatchNorm2d's names."""

    momenta: Sequence[float] = (MOMENTUM,)  # for each micro-batch of the next pass, set by Statistics

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`images` [micro-batches x n, channels, height, width], micro-batch by micro-batch; the same shape."""
        if not self.training or len(self.momenta) == 1:
            return super().forward(images)
        self.num_batches_tracked.add_(len(self.momenta))
        return _Groups.apply(
            images, self.weight, self.bias, self.running_mean, self.running_var, self.momenta, self.eps
        )


class _Groups(torch.autograd.Function):
    """torch's batch normalisation of each micro-batch, in views of one tensor: no image is copied."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        momenta: Sequence[float],
        eps: float,
    ) -> torch.Tensor:
        out, saved = torch.empty_like(images), []
        groups = zip(images.chunk(len(momenta)), out.chunk(len(momenta)), momenta, strict=True)
        for group, place, momentum in groups:
            found = {"save_mean": weight.new_empty(0), "save_invstd": weight.new_empty(0)}
            torch.ops.aten.native_batch_norm.out(
                group, weight, bias, mean, variance, True, momentum, eps, out=place, **found
            )
            saved += found.values()
        ctx.save_for_backward(images, weight, *saved)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight, *saved = ctx.saved_tensors
        count = len(saved) // 2
        of_images, of_weight, of_bias = torch.empty_like(images), torch.zeros_like(weight), torch.zeros_like(weight)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        groups = zip(gradient.chunk(count), images.chunk(count), of_images.chunk(count), strict=True)
        for (above, group, place), mean, deviation in zip(groups, saved[::2], saved[1::2], strict=True):
            found = torch.ops.aten.native_batch_norm_backward(
                above, group, weight, None, None, mean, deviation, True, ctx.eps, [True, True, True]
            )
            place.copy_(found[0])
            of_weight += found[1]
            of_bias += found[2]
        return of_images, of_weight, of_bias, None, None, None, None


def fit(net: nn.Module) -> None:
    """Replace the batch normalisations of `net` by Norm; parameters and statistics stay the same tensors."""
    for module in list(net.modules()):
        for name, inner in list(module.named_children()):
            if type(inner) is nn.BatchNorm2d:
                layer = Norm(inner.num_features, inner.eps, inner.momentum, device="meta")
                layer._parameters, layer._buffers = inner._parameters, inner._buffers
                setattr(module, name, layer)


def passes(micro_batches: int, micro_batch: int) -> int:
    """Number of passes in which so many micro-batches are computed."""
    together = max(1, PASS // micro_batch)
    return -(-micro_batches // together)


def layers(net: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch normalisations of `net`, in order."""
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def momentum(index: int, count: int) -> float:
    """The momentum of micro-batch `index` of a rank's `count` in a step, so that all count equally.

    With m the momentum of a step and s_i a micro-batch's statistics (their variance unbiased), the micro-batches
    0..count-1 in turn leave R <- (1 - m) R + m mean(s_i), if micro-batch `index` takes the momentum
    m / (count - (count - 1 - index) m).
    This is linear in the statistics. So the mean over the ranks of their running statistics is what one rank would hold
    after all micro-batches; `agree.average` takes that mean at the end of each epoch. The running variance is therefore
    the mean of the micro-batches' variances, not the variance of the global batch.
    """
    return MOMENTUM / (count - (count - 1 - index) * MOMENTUM)


class Statistics:
    """The running statistics of a model's batch normalisations, which follow the micro-batches of each step."""

    def __init__(self, layers: list[nn.BatchNorm2d]) -> None:
        self.layers = layers

    @property
    def groups(self) -> bool:
        """Whether a pass may hold several micro-batches."""
        return all(layer.weight.device.type == "cpu" and isinstance(layer, Norm) for layer in self.layers)

    def running(self) -> list[torch.Tensor]:
        """The running means and variances, float32 [channels] each."""
        return [buffer for layer in self.layers for buffer in (layer.running_mean, layer.running_var)]

    @contextlib.contextmanager
    def following(self, first: int, together: int, count: int) -> Iterator[None]:
        """Update the statistics by the forward pass within: of `together` micro-batches of a step's `count`.

        `first`: micro-batches of the step before this pass. `together` is 1 unless `groups`.
        """
        momenta = [momentum(index, count) for index in range(first, first + together)]
        for layer in self.layers:
            layer.momentum, layer.momenta = momenta[0], momenta
        yield
        for layer in self.layers:
            layer.momenta = momenta[:1]


class CompiledStatistics(Statistics):
    """Statistics of a compiled model, whose layers keep the momentum 1.0.

    The momentum is a constant of the compiled graph: each other value of it would be another graph. With 1.0 the layers
    replace the running statistics by the micro-batch's, and `following` mixes the two.
    """

    groups = False

    def __init__(self, layers: list[nn.BatchNorm2d]) -> None:
        super().__init__(layers)
        for layer in layers:
            layer.momentum = 1.0

    @contextlib.contextmanager
    def following(self, first: int, together: int, count: int) -> Iterator[None]:
        """As in Statistics; one micro-batch a pass."""
        weight, running = momentum(first, count), self.running()
        before = torch._foreach_mul(running, 1.0 - weight)
        yield
        with torch.no_grad():
            torch._foreach_mul_(running, weight)
            torch._foreach_add_(running, before)
