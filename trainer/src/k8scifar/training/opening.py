"""Open a run on this rank. The order of the steps in `open_session` decides bits: see chart/docs/design.md."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.data import holdout
from k8scifar.data.augment import Images
from k8scifar.data.packed import Manifest, Split
from k8scifar.errors import TrainingError
from k8scifar.exchange.shares import Shares, equal
from k8scifar.ranks.agree import Agreement
from k8scifar.ranks.device import Precision, resolve_precision
from k8scifar.ranks.world import World
from k8scifar.results import participants
from k8scifar.results.display import Display
from k8scifar.results.run_folder import RunFolder
from k8scifar.training import (
    calibration,
    checkpoint,
    compiling,
    headline,
    loss_scaling,
    model,
    norms,
    optim,
    rank_speeds,
    saving,
)
from k8scifar.training.clock import StepClock
from k8scifar.training.evaluation import SHIFT
from k8scifar.training.plan import Plan
from k8scifar.training.session import Session
from k8scifar.training.state import State

WHITEN_FROM = 2000  # training images, evenly spaced, whose patches give the whitening filters


class _Data(NamedTuple):
    """The images on the device; `evaluated`: the evaluation images once more, in the host's memory."""

    train: Images
    evaluation: Images
    evaluated: Split


def open_session(config: Config, manifest: Manifest, plan: Plan, world: World, found: bytes | None) -> Session:
    """Open the run at the checkpoint `found`, or at step 0; collective.

    Raises UserError where ranks, data, configuration and checkpoint do not fit each other.
    """
    precision = resolve_precision(config, world.device, world.host_group)
    data = _load(config, manifest, world.device)
    state = fresh_state(config, manifest, world, data.train, precision.name)
    payload = checkpoint.decode(found, "the checkpoint") if found is not None else None
    # Measured on fresh weights, because the measured steps change them. Before `restore`, because the mode of
    # communication decides which of the checkpoint's tensors there are to restore.
    reasons = calibration.choose(state, plan, data.train, precision.name, payload)
    changed, merged = state.restore(payload) if payload else ("", "")
    state.members = participants.joined(state.members, participants.present(state.step, world.size))
    session = _assemble(config, manifest, plan, world, data, state, precision.name)
    _show(session, reasons, changed, merged, precision)
    return session


def close(session: Session) -> None:
    """Write what is left to write; not collective. Raises Superseded where another process has the run folder."""
    saving.close_writer(session)
    session.display.close()


def _load(config: Config, manifest: Manifest, device: torch.device) -> _Data:
    train, evaluated = holdout.splits(Path(config.data.dir), manifest, config.data.holdout)

    def on_device(split: Split, border: int) -> Images:
        images, labels = (torch.from_numpy(array).to(device) for array in (split.images, split.labels))
        return Images(images, labels, manifest.mean, manifest.std, border)

    border = SHIFT if config.evaluation.tta == "shifts" else 0
    return _Data(on_device(train, config.augment.translate), on_device(evaluated, border), evaluated)


def fresh_state(config: Config, manifest: Manifest, world: World, images: Images, precision: str) -> State:
    """The state at step 0, its weights drawn from the seed. `images`: of the training split."""
    torch.manual_seed(config.seed)
    net = model.build(config.model, len(manifest.classes), config.hardware.products)
    if config.model.whiten:
        count = min(WHITEN_FROM, len(images))
        sample = torch.arange(count, device=world.device) * len(images) // count
        model.whiten(net, images.plain(sample, config.resolution[0].pixels).cpu())
    net = net.to(world.device)
    ids = [world.device.index] if world.device.type == "cuda" else None
    with warnings.catch_warnings():  # newer torch deprecates this name, older torch has no other
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        ddp = DistributedDataParallel(
            net, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
        )
    _lay_out_buckets(ddp, norms.layers(net), world.device)
    if config.hardware.compile:  # after the buckets, because their passes would be compiled as well
        ddp.module = compiling.compiled(net, config)
    statistics = norms.CompiledStatistics if config.hardware.compile else norms.Statistics
    return State(
        config,
        manifest,
        world,
        net,
        ddp,
        optim.build(net, config, precision),
        loss_scaling.scaler(world.device, precision),
        statistics(norms.layers(net)),
        sums=torch.zeros(3, dtype=torch.float64, device=world.device),
        shares=Shares(equal(config.micro_batches, world.size)),
        first_bad=torch.zeros((), dtype=torch.int64, device=world.device),
    )


def _lay_out_buckets(ddp: DistributedDataParallel, layers: list[nn.BatchNorm2d], device: torch.device) -> None:
    """Run two throw-away backward passes, which leave the weights and statistics unchanged.

    With `static_graph` DDP keeps all gradients in one bucket for two passes and lays out its buckets in the third. The
    bucket decides the order of the sums: without these passes the first step of each process would round differently
    at three or more ranks, and a resumed run would differ from the uninterrupted one. The first pass is also needed
    for gradient accumulation: a first pass under `no_sync` fails an assertion of the reducer.
    """
    for layer in layers:
        layer.momentum = 0.0
    for _ in range(2):
        ddp(torch.zeros(2, 3, 8, 8, device=device).to(memory_format=torch.channels_last)).sum().backward()
    for layer in layers:
        layer.num_batches_tracked.fill_(1)  # as after the one pass of former releases, whose checkpoints hold it
    ddp.zero_grad(set_to_none=False)


def _assemble(
    config: Config, manifest: Manifest, plan: Plan, world: World, data: _Data, state: State, precision: str
) -> Session:
    """Start the clocks and what the user sees. Last, so that a run that can't be opened shows and writes nothing."""
    has_machines = world.local_size < world.size
    clock = StepClock(world.device, running=world.is_main or has_machines)
    state.exchange.mark = clock.mark
    folder = RunFolder(config.run_dir)
    hint = headline.hint(config, world.device, precision)
    display = Display(config, manifest, plan, state.step, world.is_main, hint)
    log = display.write if world.is_main else say
    writer = None
    if world.keeps:
        writer = checkpoint.Writer(folder.checkpoints, config.checkpoint.keep, log, before=folder.check)
    now = time.monotonic()
    return Session(
        config=config,
        manifest=manifest,
        plan=plan,
        world=world,
        precision=precision,
        folder=folder,
        train_images=data.train,
        evaluation_images=data.evaluation,
        evaluated=data.evaluated,
        state=state,
        agreement=Agreement(world, ("stop", "save", "bad")),
        clock=clock,
        meter=rank_speeds.Meter(clock, world, running=has_machines),
        display=display,
        log=log,
        writer=writer,
        first_step=state.step,
        began=now - state.seconds,
        epoch_began=now,
        saved=now,
    )


def _show(session: Session, reasons: calibration.Reasons, changed: str, merged: str, precision: Precision) -> None:
    """Log what the run is and how it was opened, and write members.json."""
    world, state, log = session.world, session.state, session.display.write
    session.display.text("configuration", session.config.to_yaml())
    if world.size > 1:
        log(f"communication: {state.exchange.label}; {reasons.communication}")
    calibration.log_shares(session, reasons.shares)
    nodes = participants.present(session.first_step, world.size)["nodes"]
    if world.is_main and (len(nodes) > 1 or len(state.members) > 1):
        try:  # node 0's supervisor and `k8scifar status` read it
            session.folder.write_members(state.members)
        except TrainingError as error:  # each attempt writes it again
            log(f"{error}; training goes on")
    if changed:
        log(f"settings differ from the checkpoint's: {changed}")
    if merged:
        log(f"the checkpoint of step {session.first_step} was written by other ranks: {merged}")
    log(headline.headline(session))
    if precision.note:
        log(precision.note)
