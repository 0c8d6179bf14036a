"""3x3 convolutions on a CPU: with fewer multiplications, or as one matrix product over the whole batch.

In float32, stride 1 uses winograd.py. Else oneDNN convolves image by image, and reads all weights for each image. With
few pixels and many weights (the last stages of a ResNet at 32 pixels and below) it mostly waits for memory. There the
patches of all images become the rows of one matrix (im2col), so that the weights are read once. The choice depends on
shapes, precision and the kind of processor (vendor, instructions, ONEDNN_MAX_CPU_ISA), never on a measurement: a run
that resumes on the same kind of processor computes the same bits. Another kind may compute another form, which rounds
differently.

Source: Chellapilla, Puri, Simard, High Performance Convolutional Neural Networks for Document Processing
(2006).
"""

from __future__ import annotations

import functools
import math
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from k8scifar import machine
from k8scifar.training.cpu import winograd

MEASURED = platform.machine() in ("x86_64", "AMD64")  # other processors use torch's convolution: not measured
# Output channels for each pixel of an output image, from which products are faster: for all three (output and both
# gradients), and for the gradient of the weights alone. Measured for batches of 125 (`make bench ROWS=products`).
FEW = {"fp32": (32, 32), "slow bf16": (128, 32), "fast bf16": (32, 7)}
# Channels, in and out, from which winograd.py is faster (the same row).
WINOGRAD = {"fp32": 64, "slow bf16": 256, "fast bf16": math.inf}


class Convolution(nn.Conv2d):
    """A 3x3 convolution with padding 1 and no bias; a drop-in replacement of nn.Conv2d."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__(inner.in_channels, inner.out_channels, 3, inner.stride, 1, bias=False, device="meta")
        self.weight = inner.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`images` [n, in channels, height, width] -> [n, out channels, height / stride, width / stride]."""
        if images.device.type != "cpu" or not MEASURED or torch.compiler.is_compiling():
            return super().forward(images)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        height, width = (-(-size // step) for size, step in zip(images.shape[2:], self.stride, strict=True))
        channels = min(self.in_channels, self.out_channels)
        fewer = self.stride == (1, 1) and min(height, width) > 1 and channels >= WINOGRAD[kind(dtype)]
        everywhere, of_weights = (self.out_channels >= few * height * width for few in FEW[kind(dtype)])
        if not (fewer or everywhere or of_weights):
            return super().forward(images)
        images = images.to(dtype).contiguous(memory_format=torch.channels_last)
        if fewer:
            return winograd.convolve(images, self.weight)
        return _Products.apply(images, self.weight.to(dtype), self.stride[0], everywhere)


def fit(net: nn.Module) -> None:
    """Replace the 3x3 convolutions of `net` by Convolution; the weights stay the same tensors."""
    for module in list(net.modules()):
        for name, inner in list(module.named_children()):
            if type(inner) is nn.Conv2d and _fits(inner):
                setattr(module, name, Convolution(inner))


def _fits(inner: nn.Conv2d) -> bool:
    square = inner.stride[0] == inner.stride[1]
    plain = inner.dilation == (1, 1) and inner.groups == 1 and inner.bias is None and inner.padding_mode == "zeros"
    return inner.kernel_size == (3, 3) and inner.padding == (1, 1) and square and plain


class _Products(torch.autograd.Function):
    """The convolution and its gradients as products; only the gradient of the weights, unless `everywhere`."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor, stride: int, everywhere: bool) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.everywhere = stride, everywhere
        if not everywhere:
            return F.conv2d(images, weight, None, stride, 1)
        rows, (n, height, width, taps) = patches(images, stride)
        return (rows @ _matrix(weight, taps).T).view(n, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        of_images = of_weight = None
        if ctx.needs_input_grad[0]:
            of_images = _of_images(gradient, images, weight, ctx.stride, ctx.everywhere)
        if ctx.needs_input_grad[1]:
            # Computed again, because patches kept from the forward pass would take nine times the images' memory.
            rows, (*_, taps) = patches(images, ctx.stride)
            product = _rows(gradient).T @ rows
            inner = product.view(len(weight), *(len(_range(tap)) for tap in taps), -1).permute(0, 3, 1, 2)
            whole = inner.shape == weight.shape
            of_weight = inner if whole else torch.zeros_like(weight)
            if not whole:
                of_weight[:, :, taps[0], taps[1]] = inner
        return of_images, of_weight, None, None


def patches(images: torch.Tensor, stride: int) -> tuple[torch.Tensor, tuple[int, int, int, tuple[slice, slice]]]:
    """The patch behind each output pixel as a row, and the shape of the rows.

    Args:
        images: [n, channels, height, width], channels last.

    Returns:
        rows [n x height x width of the output, taps x channels], (n, output height, output width, taps): `taps` are the
        rows and columns of the kernel that meet an image's pixel; for a single pixel, only the middle.
    """
    n, channels, *sizes = images.shape
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    height, width = (-(-size // stride) for size in sizes)
    taps = tuple(slice(int(out == 1), 2 if size == 1 else 3) for out, size in zip((height, width), sizes, strict=True))
    of_image, of_row, of_column, of_channel = padded.stride()
    windows = padded[:, taps[0].start :, taps[1].start :].as_strided(
        (n, height, width, *(len(_range(tap)) for tap in taps), channels),
        (of_image, of_row * stride, of_column * stride, of_row, of_column, of_channel),
    )
    return windows.reshape(n * height * width, -1), (n, height, width, taps)


def _of_images(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, stride: int, everywhere: bool
) -> torch.Tensor:
    """The gradient of the images."""
    if not everywhere:
        return torch.nn.grad.conv2d_input(images.shape, weight, gradient, stride, 1)
    n, channels, height, width = images.shape
    if stride == 1:  # the gradient, convolved with the kernel turned around
        rows, (*_, taps) = patches(gradient.contiguous(memory_format=torch.channels_last), 1)
        places = [(2 - row, 2 - column) for row in _range(taps[0]) for column in _range(taps[1])]
        turned = torch.cat([weight[:, :, row, column] for row, column in places])
        return (rows @ turned).view(n, height, width, channels).permute(0, 3, 1, 2)
    product = (_rows(gradient) @ _matrix(weight, (slice(0, 3), slice(0, 3)))).view(n, *gradient.shape[2:], 3, 3, -1)
    padded = gradient.new_zeros(n, height + 2, width + 2, channels)
    down, right = (stride * size for size in gradient.shape[2:])
    for row in range(3):
        for column in range(3):
            padded[:, row : row + down : stride, column : column + right : stride] += product[:, :, :, row, column]
    return padded[:, 1:-1, 1:-1].contiguous().permute(0, 3, 1, 2)


def _matrix(weight: torch.Tensor, taps: tuple[slice, slice]) -> torch.Tensor:
    """Weights [out, in, 3, 3] as [out, taps x in]; a view if they are channels last."""
    return weight[:, :, taps[0], taps[1]].permute(0, 2, 3, 1).reshape(len(weight), -1)


def _rows(gradient: torch.Tensor) -> torch.Tensor:
    """[n, channels, height, width] as [n x height x width, channels]."""
    return gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])


def _range(taps: slice) -> range:
    return range(taps.start, taps.stop)


def kind(dtype: torch.dtype) -> str:
    """The key of FEW for matrices of this type on this processor."""
    if dtype != torch.bfloat16:
        return "fp32"
    return "fast bf16" if _fast_bf16() else "slow bf16"


@functools.cache
def _fast_bf16() -> bool:
    """Whether bf16 is several times faster than float32 on this processor."""
    return machine.fast_bf16()
