"""Test-time augmentation: the mean over the views that it says, on the same images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from k8scifar.compat import import_torchvision
from k8scifar.config import loading
from k8scifar.data.augment import Images
from k8scifar.ranks.world import join
from k8scifar.training.evaluation import SHIFT, evaluate


@pytest.mark.parametrize("pixels", [32, 24])
def test_accuracies_with_more_views_are_those_of_the_weighted_logits(pixels):
    """A random linear model of 500 random images: two views, and six of which the shifted four weigh half as much."""
    import_torchvision()  # before torchmetrics does, as a rank has when it builds its model
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (500, 32, 32, 3), dtype=torch.uint8)
    images = Images(pictures, torch.arange(500) % 3, [0.5] * 3, [0.2] * 3, border=SHIFT)
    net, samples = nn.Sequential(nn.Flatten(), nn.Linear(3 * pixels**2, 3)), torch.arange(500)
    with join(loading.load(sets=["hardware.device=cpu"])) as world:
        found = evaluate(net, images, world, classes=3, pixels=pixels, batch=64, tta="shifts").figures
        some = evaluate(net, images, world, classes=3, pixels=pixels, batch=64, limit=7)
    assert net.training and some.figures["images"] == 7
    assert some.samples.tolist() == [0, 71, 142, 214, 285, 357, 428], "evenly spaced"
    with torch.no_grad():
        plain, up, down = (images.plain(samples, pixels, shift) for shift in (0, -1, 1))
        mirrored = (net(plain) + net(plain.flip(3))) / 2
        views = [net(view) for part in (up, down) for view in (part, part.flip(3))]
        wanted = {
            "accuracy": net(plain),
            "accuracy_tta": mirrored,
            "accuracy_tta_shifts": (mirrored + sum(views) / 4) / 2,
        }
    accuracies = {key: (logits.argmax(1) == images.labels).float().mean().item() for key, logits in wanted.items()}
    assert {key: found[key] for key in wanted} == pytest.approx(accuracies)
    assert len({round(value, 6) for value in accuracies.values()}) == 3, "or nothing would be told apart"
