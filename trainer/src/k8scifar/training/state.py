"""The state of a training run: all that a checkpoint must hold for the resumed run to equal the uninterrupted one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k8scifar.config.schema import COMM, FIXED, Config, flatten
from k8scifar.data.augment import Images
from k8scifar.data.packed import Manifest
from k8scifar.errors import UserError
from k8scifar.ranks.agree import gather, gather_json, unflatten
from k8scifar.ranks.exchange import AllReduce
from k8scifar.ranks.local_sgd import LocalSGD
from k8scifar.ranks.modes import KINDS
from k8scifar.ranks.shares import Shares, equal
from k8scifar.ranks.world import World
from k8scifar.results.summary import with_todays_names
from k8scifar.training import compiling, model, norms, optim, scaling

WHITEN_FROM = 2000  # training images, evenly spaced, whose patches give the whitening filters


@dataclass
class State:
    """Weights, optimiser, counters; `step` optimiser steps are done."""

    config: Config
    manifest: Manifest
    world: World
    net: nn.Module
    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing but in fp16
    statistics: norms.Statistics  # each rank's own running statistics
    sums: torch.Tensor  # float64 [3]: loss, correct, images, of this rank in this epoch
    exchange: AllReduce | None  # how the ranks combine what they learnt, once it is chosen
    shares: Shares  # who computes how much of a step
    first_bad: torch.Tensor  # int64 []: the step of this rank's first loss that was not finite, 0: none
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # a record an epoch
    members: list[dict[str, Any]] = field(default_factory=list)  # who took part from which step on
    seconds: float = 0.0  # of all processes up to the last checkpoint

    @classmethod
    def fresh(cls, config: Config, manifest: Manifest, world: World, images: Images, precision: str) -> State:
        """Step 0, the weights drawn from the seed; `images` are the training split's."""
        torch.manual_seed(config.seed)
        net = model.build(config.model, len(manifest.classes), config.hardware.products)
        if config.model.whiten:
            count = min(WHITEN_FROM, len(images))
            sample = torch.arange(count, device=world.device) * len(images) // count
            model.whiten(net, images.plain(sample, config.resolution[0].pixels).cpu())
        net = net.to(world.device)
        ids = [world.device.index] if world.device.type == "cuda" else None
        with warnings.catch_warnings():  # newer torch wants a name that older ones lack
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            ddp = DistributedDataParallel(
                net, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
            )
        _settle_buckets(ddp, norms.layers(net), world.device)
        if config.hardware.compile:  # only now: the settling pass would be compiled as well
            ddp.module = compiling.compiled(net, config)
        statistics = norms.Statistics(norms.layers(net), constant=config.hardware.compile)
        sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        optimizer = optim.build(net, config, precision)
        scaler = scaling.scaler(world.device, precision)
        return cls(
            config,
            manifest,
            world,
            net,
            ddp,
            optimizer,
            scaler,
            statistics,
            sums,
            None,
            Shares(equal(config.micro_batches, world.size)),
            sums.new_zeros((), dtype=torch.int64),
        )

    def communicate(self, mode: str, every: int) -> None:
        """Choose how the ranks communicate, before the first step and before `restore`; at most once.

        `every`: steps between two averagings of local SGD.
        """
        parts = self.config, self.world, self.ddp, self.optimizer
        if self.world.size == 1:
            self.exchange = AllReduce(*parts)
        elif mode == LocalSGD.name:
            self.exchange = LocalSGD(*parts, every=every)
        else:
            self.exchange = KINDS[mode](*parts)
        self.exchange.at_once = self.scaler.is_enabled()  # which looks for an overflow in all gradients

    def take_shares(self, shares: Shares) -> None:
        """Divide the work so from now on: before `restore`, or when the ranks' statistics are equal."""
        self.shares = shares
        by_speed = self.config.distributed.share == "auto"
        self.exchange.divide_updates(shares.relative if by_speed else [1.0] * self.world.size)

    def passes(self, count: int) -> list[int]:
        """Of so many micro-batches of a step, those of each pass."""
        parts = norms.passes(count, self.config.micro_batch) if self.statistics.groups else count
        return equal(count, parts)

    def note_loss(self, loss: torch.Tensor) -> None:
        """Remember the step just done if its loss is the first that is not finite; nothing waits for a GPU here."""
        is_first = ~torch.isfinite(loss) & (self.first_bad == 0)
        self.first_bad = torch.where(is_first, self.step, self.first_bad)

    def local(self) -> torch.Tensor:
        """What differs between the ranks within an epoch, float64 [n]: running statistics and sums."""
        return torch.cat([tensor.flatten().double() for tensor in [*self.statistics.running(), self.sums]])

    def _set_local(self, row: torch.Tensor) -> None:
        unflatten(row, [*self.statistics.running(), self.sums])

    def weight_sum(self) -> torch.Tensor:
        """Sum of all weights, float64 [1] on the CPU: not finite if any of them is not."""
        sums = [parameter.detach().double().sum() for parameter in self.net.parameters()]
        return torch.stack(sums).sum().view(1).cpu()

    def shared(self) -> list[torch.Tensor]:
        """What all ranks hold alike now: the weights and, where the ranks take equal steps, the momenta; float32.

        Not the momenta that their owner alone has.
        """
        if not self.exchange.equal:
            return []
        weights = [weight.detach() for weight in self.net.parameters()]
        if not self.exchange.equal_steps:
            return weights
        owned = self.exchange.owned
        alike = [weight for weight in self.net.parameters() if weight not in owned]
        momenta = [self.optimizer.state.get(weight, {}).get("momentum_buffer") for weight in alike]
        return weights + [momentum for momentum in momenta if momentum is not None]

    def digest(self) -> torch.Tensor:
        """A number that tells `shared` of one rank from that of another if a bit differs, float64 [1] on the CPU.

        Sums of integers, which are exact in any order: unlike processors would add floats differently. Squares, so that
        small differences do not cancel.
        """
        bits = [tensor.view(torch.int32) for tensor in self.shared()]
        sums = [(values * values).sum(dtype=torch.int64) + 31 * values.sum(dtype=torch.int64) for values in bits]
        total = torch.stack(sums).sum() if sums else self.first_bad.new_zeros(())
        return (total % 2**52).double().view(1).cpu()

    @torch.no_grad()
    def equalise(self) -> None:
        """Give all ranks what rank 0 holds of `shared`; collective."""
        tensors = self.shared()
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.world.pulse.arrive()
        dist.broadcast(flat, 0)
        unflatten(flat, tensors)

    def snapshot(self, pixels: int) -> dict[str, Any]:
        """A checkpoint's values, copied to the CPU; collective: all ranks call it, those that keep it use it.

        These are rank 0's, and the same to the last bit on every node. `pixels` is the resolution last trained at.
        """
        local = gather(self.local(), self.world)
        communication = self.exchange.snapshot()
        config = self.config.model_dump(mode="json")
        if self.world.own_folders:
            config = gather_json(config, self.world)[0]  # folders and logs may differ from host to host
        if not self.world.keeps:
            return {}
        with self.exchange.as_rank_0(communication["own"]):
            return self._payload(pixels, config, local, communication)

    def _payload(
        self, pixels: int, config: dict[str, Any], local: torch.Tensor, communication: dict[str, Any]
    ) -> dict[str, Any]:
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.net.state_dict().items()}
        weights |= self._mean_statistics(local)
        return {
            "step": self.step,
            "pixels": pixels,
            "world_size": self.world.size,
            "config": config,
            "classes": list(self.manifest.classes),
            "mean": list(self.manifest.mean),
            "std": list(self.manifest.std),
            "data": self.manifest.fingerprint,
            "model": weights,
            "optimizer": _to_cpu(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "local": local,
            "share": self.shares.saved(),
            "comm": communication,
            "history": [dict(record) for record in self.history],
            "members": self.members,
            "seconds": self.seconds,
            "rng": torch.get_rng_state(),  # nothing draws from it while training; kept for what may come
        }

    def restore(self, payload: dict[str, Any]) -> tuple[str, str]:
        """Take over a checkpoint's values; returns what has changed since, and what of several ranks is merged.

        Raises UserError where a change may not be.
        """
        changed = check_resumable(self.config, payload, self.manifest)
        self.net.load_state_dict(payload["model"])
        optim.restore(self.optimizer, payload["optimizer"])
        if self.scaler.is_enabled() and payload.get("scaler"):
            self.scaler.load_state_dict(payload["scaler"])
        merged, saved = "", payload.get("comm") or {}
        if not self.exchange.restore(saved) and saved:
            merged = KINDS[saved["mode"]].merge(saved, self.ddp, self.optimizer)
            self.exchange.begin()
        self.step, self.history = payload["step"], [with_todays_names(record) for record in payload["history"]]
        self.seconds = payload.get("seconds", self.history[-1]["seconds"] if self.history else 0.0)  # not in 0.1.0
        former = {"from": 0, "world_size": payload["world_size"]}
        self.members = payload.get("members", [former])
        local = payload["local"]
        then = Shares.from_saved(payload.get("share"), sum(self.shares.counts), len(local))
        if then.counts == self.shares.counts:
            self._set_local(local[self.world.rank])
        else:  # another division: the means of the statistics, the sums on rank 0
            row = _mean(local, then)
            row[-3:] = local[:, -3:].sum(0) if self.world.is_main else 0.0
            self._set_local(row)
        torch.set_rng_state(payload["rng"])
        return changed, merged

    def _mean_statistics(self, local: torch.Tensor) -> dict[str, torch.Tensor]:
        """The running statistics that the ranks' average would leave, by state-dict name."""
        mean, found, at = _mean(local, self.shares), {}, 0
        for name, layer in self.net.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                for kind in ("running_mean", "running_var"):
                    count = getattr(layer, kind).numel()
                    found[f"{name}.{kind}"] = mean[at : at + count].float()
                    at += count
        return found


def _settle_buckets(ddp: DistributedDataParallel, layers: list[nn.BatchNorm2d], device: torch.device) -> None:
    """Two throw-away backward passes, which leave the weights and statistics unchanged.

    With `static_graph` DDP keeps all gradients in one bucket for two passes and lays out its buckets in the third. The
    bucket decides the order of the sums: without these passes the first step of each process would round differently
    at three or more ranks, and a resumed run would differ from the uninterrupted one. The first pass is needed anyway:
    one under `no_sync` (the first of several micro-batches) would end in an assertion of the reducer.
    """
    for layer in layers:
        layer.momentum = 0.0
    for _ in range(2):
        ddp(torch.zeros(2, 3, 8, 8, device=device).to(memory_format=torch.channels_last)).sum().backward()
    for layer in layers:
        layer.num_batches_tracked.fill_(1)  # as after the one pass of former releases, whose checkpoints hold it
    ddp.zero_grad(set_to_none=False)


def check_resumable(config: Config, payload: dict[str, Any], manifest: Manifest) -> str:
    """What has changed since this checkpoint, in words; empty where nothing has.

    Raises UserError where a run must not go on from it: another data set or other mathematics.
    """
    if payload["data"] != manifest.fingerprint:
        raise UserError(
            f"the checkpoint of step {payload['step']} was trained on data {payload['data']}, and this is "
            f"{manifest.fingerprint}; give the run another --name, or bring back the data"
        )
    saved = flatten(payload["config"])
    if payload.get("average"):
        raise UserError(
            f"the checkpoint of step {payload['step']} keeps a moving average of the weights (ema.decay), which this "
            "version has no more; give the run another --name, or train it to its end with version 0.1"
        )
    if used := payload.get("comm"):
        if used["mode"] not in KINDS:
            raise UserError(
                f"the checkpoint of step {payload['step']} is of a run that communicates by {used['mode']}, which this "
                "version has no more; give the run another --name, or train it to its end with version 0.1"
            )
        saved[COMM] = used["mode"] if payload["world_size"] > 1 else "auto"  # one rank communicates in no mode
        if "every" in used and config.distributed.comm == used["mode"]:  # `auto` may have stretched it
            saved["distributed.local_sgd_steps"] = used["every"]
    changed = config.differences(saved)
    fixed = [key for key in changed if {key, key.split(".")[0]} & set(FIXED)]
    extended = set(changed) <= {"epochs"} and config.epochs > payload["config"]["epochs"]
    told = "; ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
    if changed and not extended and (fixed or not config.checkpoint.accept_changes):
        remedy = "" if fixed else ", or set checkpoint.accept_changes=true to go on with the new values"
        raise UserError(
            f"the checkpoint of step {payload['step']} has another configuration ({told}); "
            f"give the run another --name{remedy}"
        )
    return told


def _mean(rows: torch.Tensor, shares: Shares) -> torch.Tensor:
    """The mean over the ranks of [world size, n] running statistics, each as its micro-batches count."""
    weights = [shares.weight(rank) for rank in range(len(rows))]
    return (rows * torch.tensor(weights, dtype=rows.dtype).unsqueeze(1)).mean(0)


def _to_cpu(tree: Any) -> Any:
    """A copy of nested containers, their tensors copied to the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu().clone()
    if isinstance(tree, dict):
        return {key: _to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_to_cpu(value) for value in tree]
    return tree
