"""The order of samples and the augmentation: each sample once, and nothing depends on the world size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from k8scifar.config.schema import Config
from k8scifar.data.augment import CUT, PLACE, Images, draw, high, low
from k8scifar.data.order import Order
from k8scifar.errors import UserError
from k8scifar.training.plan import Plan

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
STORED = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pictures() -> Images:
    return Images(STORED, torch.arange(40) % 10, MEAN, STD, border=4)


def plainly(samples: torch.Tensor) -> torch.Tensor:
    """What `plain` must give at 32 pixels, computed from the stored bytes alone."""
    return (STORED[samples].permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        STD
    ).view(3, 1, 1)


@pytest.mark.parametrize("counts", [[4], [2, 2], [3, 1], [1, 1, 1, 1], [2, 1, 1]])
def test_union_of_ranks_is_the_data_set_each_once(counts):
    order = Order(1000, 100, 25, "drop", seed=3)
    seen = torch.cat([order.share(5, rank, counts).flatten() for rank in range(len(counts))])
    assert seen.sort().values.tolist() == list(range(1000))


@pytest.mark.parametrize("counts", [[2, 2], [1, 3], [1, 1, 2]])
def test_global_batches_do_not_depend_on_who_computes_them(counts):
    order = Order(1000, 100, 25, "drop", seed=3)
    shares = [order.share(1, rank, counts) for rank in range(len(counts))]
    assert [share.shape[1] for share in shares] == counts
    assert torch.equal(torch.cat(shares, dim=1), order.share(1, 0, [4]))


def test_epochs_and_seeds_differ_and_repeat():
    order = Order(1000, 100, 50, "drop", seed=0)
    assert not torch.equal(order.epoch(0), order.epoch(1))
    assert not torch.equal(order.epoch(0), Order(1000, 100, 50, "drop", seed=1).epoch(0))
    assert torch.equal(order.epoch(7), Order(1000, 100, 50, "drop", seed=0).epoch(7))


def test_drop_leaves_out_and_pad_repeats_the_first():
    drop, pad = Order(1030, 100, 50, "drop", 0), Order(1030, 100, 50, "pad", 0)
    assert (drop.steps_per_epoch, pad.steps_per_epoch) == (10, 11)
    assert len(set(drop.epoch(0).flatten().tolist())) == 1000
    padded = pad.epoch(0).flatten()
    assert torch.equal(padded[1030:], padded[:70])
    assert padded[:1030].sort().values.tolist() == list(range(1030))


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="more than the 400 training images"):
        _ = Plan(Config(), 400)


def test_draws_are_uniform_and_independent_between_streams_and_epochs():
    samples = torch.arange(50_000)
    bits = [draw(samples, seed=0, epoch=epoch, stream=stream) for epoch, stream in ((0, PLACE), (1, PLACE), (0, CUT))]
    for shifts in (low(bits[0], 9), high(bits[0], 9)):
        counts = torch.bincount(shifts, minlength=9).double()
        chi_square = ((counts - 50_000 / 9) ** 2 / (50_000 / 9)).sum().item()
        assert chi_square < 30, "8 degrees of freedom: above 30 once in 5,000"
    drawn = [part.double() for word in bits for part in (word & 1, low(word, 9), high(word, 9))]
    likeness = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn), dtype=torch.double)
    assert likeness.abs().max() < 0.02


def test_plain_pictures_are_the_stored_ones_normalised(pictures):
    samples = torch.tensor([3, 1, 17])
    batch = pictures.plain(samples, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch, plainly(samples), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pixels", [12, 20, 24])
def test_resizing_is_torchs_antialiased_bilinear(pictures, pixels):
    samples = torch.arange(8)
    wanted = F.interpolate(plainly(samples), (pixels, pixels), mode="bilinear", antialias=True)
    torch.testing.assert_close(pictures.plain(samples, pixels), wanted, atol=1e-5, rtol=1e-5)


def test_augmentation_is_a_crop_of_the_reflected_picture_mirrored_and_cut(pictures):
    samples = torch.arange(40)
    settings = {"seed": 1, "epoch": 2, "flip": True, "translate": 4, "cutout": 12}
    batch = pictures.augmented(samples, 32, **settings)
    padded = F.pad(plainly(samples), (4, 4, 4, 4), mode="reflect")
    mirrored = 0
    for index in range(40):
        cut = (batch[index].abs() < 1e-6).all(0)  # the mean is 0
        assert cut.sum() == 144
        crops = padded[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
        plain = (crops - batch[index])[:, :, ~cut].abs().amax((1, 2)) < 1e-4
        flipped = (crops.flip(3) - batch[index])[:, :, ~cut].abs().amax((1, 2)) < 1e-4
        assert plain.sum() + flipped.sum() == 1
        mirrored += int(flipped.sum())
    assert 8 < mirrored < 32


def test_shifts_reach_every_place_within_their_limit_and_none_beyond():
    """Of one image whose bytes say where they lie: its first pixel is that of the border at each of 5 x 5 places."""
    at = torch.arange(1, 33, dtype=torch.uint8)
    images = torch.stack([at[:, None].expand(32, 32), at.expand(32, 32), at.expand(32, 32)], dim=2).expand(
        2000, 32, 32, 3
    )
    images = Images(images.contiguous(), torch.zeros(2000), [0.0] * 3, [1 / 255] * 3, border=4)
    batch = images.augmented(torch.arange(2000), 32, seed=0, epoch=0, flip=False, translate=2, cutout=0)
    middle = batch[:, :2, 16, 16].round().int() - 17
    assert {tuple(each) for each in middle.tolist()} == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_augmentation_of_a_sample_does_not_depend_on_its_batch(pictures):
    settings = {"seed": 1, "epoch": 2, "flip": True, "translate": 4, "cutout": 8}
    together = pictures.augmented(torch.arange(40), 32, **settings)
    alone = torch.cat([pictures.augmented(torch.tensor([index]), 32, **settings) for index in range(39, -1, -1)])
    assert torch.equal(together, alone.flip(0))
    assert not torch.equal(together, pictures.augmented(torch.arange(40), 32, **settings | {"epoch": 3}))


def test_alternating_flip_shows_each_image_both_ways_in_two_epochs(pictures):
    samples, settings = torch.arange(40), {"seed": 1, "flip": "alternating", "translate": 0, "cutout": 0}
    plain, mirrored = pictures.plain(samples, 32), []
    for epoch in range(4):
        batch = pictures.augmented(samples, 32, epoch=epoch, **settings)
        is_mirrored = (batch == plain.flip(3)).flatten(1).all(1)
        assert torch.equal(~is_mirrored, (batch == plain).flatten(1).all(1))
        mirrored.append(is_mirrored)
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], mirrored[3])
    assert 8 < mirrored[0].sum() < 32
    part = pictures.augmented(samples[7:9], 32, epoch=0, **settings)
    assert torch.equal(part, pictures.augmented(samples, 32, epoch=0, **settings)[7:9]), "whatever the batch"
    other = pictures.augmented(samples, 32, epoch=0, **settings | {"seed": 2})
    assert not torch.equal((other == plain).flatten(1).all(1), ~mirrored[0]), "begins by the seed"


@pytest.mark.parametrize("shift", [-1, 1, 4])
def test_a_shifted_picture_is_a_crop_of_the_reflected_one(pictures, shift):
    samples, at = torch.arange(5), 4 + shift
    padded = F.pad(plainly(samples), (4, 4, 4, 4), mode="reflect")
    wanted = padded[:, :, at : at + 32, at : at + 32]
    torch.testing.assert_close(pictures.plain(samples, 32, shift), wanted, atol=1e-5, rtol=1e-5)


def test_augmentation_switched_off_is_the_picture_itself(pictures):
    batch = pictures.augmented(torch.arange(5), 32, seed=0, epoch=0, flip=False, translate=0, cutout=0)
    assert torch.equal(batch, pictures.plain(torch.arange(5), 32))


def test_learning_rate_and_resolution_follow_the_plan():
    stages = [{"until": 0.5, "pixels": 16}, {"until": 1.0, "pixels": 24}]
    schedule = {"warmup": 0.2, "start": 0.1, "end": 0.0}
    config = Config.model_validate({"epochs": 10, "resolution": stages, "schedule": schedule, "optimizer": {"lr": 2.0}})
    plan = Plan(config, 5000)
    assert plan.steps == 100
    assert plan.lr(0) == pytest.approx(0.2)
    assert plan.lr(10) == pytest.approx(1.1)
    assert plan.lr(20) == pytest.approx(2.0)
    assert plan.lr(60) == pytest.approx(1.0)
    assert plan.lr(100) == 0.0
    assert [plan.pixels(step) for step in (0, 49, 50, 99)] == [16, 16, 24, 24]
    assert plan.images_at() == {16: 25_000, 24: 25_000}
