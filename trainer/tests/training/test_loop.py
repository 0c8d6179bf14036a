"""What the loop hands on, step by step, and what a checkpoint must bring back.

One rank in this process, six steps over three epochs of images of 8 pixels, four micro-batches in a step.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from runs import history, weights_hash

from k8scifar.cli import main
from k8scifar.config import loading
from k8scifar.data import packed
from k8scifar.data.augment import Images
from k8scifar.data.prepare import prepare
from k8scifar.exchange.shares import Shares
from k8scifar.training import checkpoint, loop, norms, optim
from k8scifar.training.plan import Plan

EPOCHS, STEPS, CUT_AT, PASS = 3, 6, 3, 16  # a pass of two micro-batches: two passes a step
SETS = [
    f"epochs={EPOCHS}", "global_batch=32", "micro_batch=8", "label_smoothing=0.2",
    "resolution=[{until: 1.0, pixels: 8}]",
    "optimizer.name=sgd", "optimizer.lr=0.05", "optimizer.norm_bias_lr=1", "augment.cutout=4", "augment.translate=2",
    "evaluation.every_epochs=0", "evaluation.tta=false", "checkpoint.every_epochs=9",
    f"checkpoint.every_steps={CUT_AT}",
    "hardware.device=cpu", "hardware.precision=fp32", "hardware.threads=1", "log.tensorboard=false",
]  # fmt: skip


MEAN = 5.0  # micro-batches of a rank on average: this one acts as a rank of several whose share is below that


def as_one_of_several(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(norms, "PASS", PASS)
    patch.setattr(Shares, "mean", MEAN)
    patch.setattr(Shares, "weight", lambda shares, rank: 1.0)


def train(folder: Path, name: str) -> Path:
    options = [part for value in SETS for part in ("--set", value)]
    places = ["--data-dir", str(folder / "data"), "--runs-dir", str(folder), "--name", name]
    assert main(["train", *options, *places]) == 0
    return folder / name


@pytest.fixture(scope="module")
def seen(module_path):
    """An undisturbed run, and all that was handed on in it."""
    manifest = prepare(module_path / "data", "synthetic:70:16")[0]
    config = loading.load(sets=SETS)
    found = SimpleNamespace(manifest=manifest, config=config, plan=Plan(config, 70), data=module_path / "data")
    found.passes, found.losses, found.steps, found.following = [], [], [], []
    augmented, cross_entropy, update = Images.augmented, F.cross_entropy, loop.update
    following = norms.Statistics.following

    def watched_update(session):
        grads = torch.cat([p.grad.flatten().clone() for p in session.state.net.parameters()])
        buffers = {name: value.clone() for name, value in session.state.net.named_buffers()}
        weights = {name: value.detach().clone() for name, value in session.state.net.named_parameters()}
        found.steps.append((session.state.optimizer.param_groups[0]["lr"], grads, weights, buffers))
        update(session)

    def watched_following(statistics, first, together, count):
        if not found.following:
            found.start = [tensor.clone() for tensor in statistics.running()]
        found.following.append((first, together, count))
        return following(statistics, first, together, count)

    def watched_augmented(images, samples, pixels, **settings):
        found.passes.append((samples.tolist(), pixels, settings))
        return augmented(images, samples, pixels, **settings)

    def watched_loss(logits, labels, **options):
        found.losses.append((labels.tolist(), options))
        return cross_entropy(logits, labels, **options)

    with pytest.MonkeyPatch.context() as patch:
        as_one_of_several(patch)
        patch.setattr(Images, "augmented", watched_augmented)
        patch.setattr(F, "cross_entropy", watched_loss)
        patch.setattr(loop, "update", watched_update)
        patch.setattr(norms.Statistics, "following", watched_following)
        found.folder = train(module_path, "undisturbed")
    return found


def test_each_step_takes_the_images_and_labels_that_the_order_says(seen):
    """In every epoch its own, mirrored and shifted by its own draws; to the last image of the last step."""
    order, labels = seen.plan.order, packed.read(seen.data, seen.manifest, "train").labels
    wanted = [samples for epoch in range(EPOCHS) for samples in order.epoch(epoch).reshape(-1, PASS).tolist()]
    assert [samples for samples, *_ in seen.passes] == wanted
    epochs = [epoch for epoch in range(EPOCHS) for _ in range(len(wanted) // EPOCHS)]
    settings = [{"seed": 0, "epoch": epoch, "flip": True, "translate": 2, "cutout": 4} for epoch in epochs]
    assert [(pixels, found) for _, pixels, found in seen.passes] == [(8, each) for each in settings]
    trained = [(found, options) for found, options in seen.losses if "label_smoothing" in options]
    assert trained == [(labels[samples].tolist(), {"label_smoothing": 0.2}) for samples in wanted]


def test_each_step_has_the_learning_rate_of_the_plan(seen):
    assert [lr for lr, *_ in seen.steps] == [seen.plan.lr(step) for step in range(STEPS)]
    assert len({lr for lr, *_ in seen.steps}) == STEPS


def test_running_statistics_begin_fresh_and_follow_the_four_micro_batches(seen):
    assert seen.following == [(0, 2, 4), (2, 2, 4)] * STEPS
    for mean, variance in zip(seen.start[::2], seen.start[1::2], strict=True):
        assert not mean.any() and torch.equal(variance, torch.ones_like(variance))


def test_the_gradient_is_the_sum_over_the_micro_batches_by_the_mean_share(seen):
    """Of the second step, each micro-batch alone, by a network without DistributedDataParallel."""
    from k8scifar.training import model

    config, (_, gradient, weights, buffers) = seen.config, seen.steps[1]
    net = model.build(config.model, 10, config.hardware.products)
    net.load_state_dict(weights | buffers)
    split = packed.read(seen.data, seen.manifest, "train")
    images = Images(
        *map(torch.from_numpy, (split.images, split.labels)), seen.manifest.mean, seen.manifest.std, border=2
    )
    for samples in seen.plan.order.epoch(0)[1]:
        inputs = images.augmented(samples, 8, seed=0, epoch=0, **dict(config.augment))
        (F.cross_entropy(net(inputs), images.labels[samples], label_smoothing=0.2) / MEAN).backward()
    alone = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    assert (alone - gradient).norm() < 1e-5 * alone.norm()


def test_a_run_that_is_cut_within_an_epoch_goes_on_bit_for_bit(seen, monkeypatch):
    """Weights, momenta, running statistics, sums and history come from the checkpoint."""
    as_one_of_several(monkeypatch)
    folder = seen.folder.with_name("resumed")
    shutil.copytree(seen.folder, folder)
    for path in (folder / "summary.json", folder / "model.safetensors"):
        path.unlink()
    for path in checkpoint.listed(folder / "checkpoints"):
        if checkpoint.step_of(path) > CUT_AT:
            path.unlink()
    steps = []
    monkeypatch.setattr(
        optim, "set_lr", lambda optimizer, lr, real=optim.set_lr: (steps.append(lr), real(optimizer, lr))
    )
    train(folder.parent, "resumed")
    assert len(steps) == STEPS - CUT_AT
    assert history(folder) == history(seen.folder)
    assert weights_hash(folder) == weights_hash(seen.folder)
