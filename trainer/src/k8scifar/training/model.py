"""The model: torchvision's ResNets with a stem for small images."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from k8scifar.compat import import_torchvision
from k8scifar.config.sections import Model
from k8scifar.training import norms
from k8scifar.training.cpu import convolution


def build(config: Model, classes: int, products: bool = True) -> nn.Module:
    """A torchvision ResNet with fresh weights, drawn from torch's global generator, channels last.

    With the `cifar` stem, resnet18 has 11,173,962 parameters for 10 classes and needs 0.555 GMAC for a 32-pixel
    image. `products`: with cpu/convolution.py's convolutions and norms.py's batch normalisations.

    Source: He et al., Deep Residual Learning (2015), section 4.2, for the stem without pooling.
    """
    import_torchvision()
    from torchvision import models

    net = models.get_model(config.name, weights=None, num_classes=classes, zero_init_residual=config.zero_init)
    if config.stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    if products:
        convolution.fit(net)
        norms.fit(net)
    return net.to(memory_format=torch.channels_last)


@torch.no_grad()
def whiten(net: nn.Module, images: torch.Tensor) -> None:
    """Set the first convolution, 3x3, to the whitening filters of the patches of `images`, and their negatives.

    Args:
        images: normalised, float32 [n, 3, height, width].

    Source: Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU (2024), section 3.1; here the filters stay
    trainable and have equal norms, because batch normalisation follows.
    """
    weight = net.conv1.weight
    patches = F.unfold(images, 3).permute(0, 2, 1).reshape(-1, 27).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.to(weight.dtype)
    filters = F.normalize(filters, dim=1).view(27, 3, 3, 3) / 2
    weight[:27], weight[27:54] = filters, -filters
    weight[54:] = F.normalize(weight[54:].flatten(1), dim=1).view_as(weight[54:]) / 2


def parameters(net: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def training_flops(net: nn.Module, pixels: int) -> int:
    """Floating point operations of one image, forward and backward, counted by torch (2 for a multiply-add)."""
    twin = copy.deepcopy(net).to("meta")
    with FlopCounterMode(display=False) as counter:
        twin(torch.empty(2, 3, pixels, pixels, device="meta")).sum().backward()
    return counter.get_total_flops() // 2
