"""The state of a run, and its checkpoint: what a resumed run needs to equal an uninterrupted one bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k8scifar.config.schema import COMM, FIXED, Config, flatten
from k8scifar.data.packed import Manifest
from k8scifar.errors import UserError
from k8scifar.exchange.gradients import AllReduce
from k8scifar.exchange.local_sgd import LocalSGD
from k8scifar.exchange.modes import KINDS
from k8scifar.exchange.shares import Shares, equal
from k8scifar.ranks.agree import gather, gather_json, unflatten
from k8scifar.ranks.world import World
from k8scifar.results.summary import with_todays_names
from k8scifar.training import norms, optim


@dataclass
class State:
    """Weights, optimiser and counters after `step` optimiser steps."""

    config: Config
    manifest: Manifest
    world: World
    net: nn.Module
    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # enabled in fp16 only
    statistics: norms.Statistics  # this rank's running statistics
    sums: torch.Tensor  # float64 [3]: loss, correct, images, of this rank in this epoch
    shares: Shares  # micro-batches of each rank in a step
    first_bad: torch.Tensor  # int64 []: the step of this rank's first loss that was not finite, 0: none
    exchange: AllReduce | None = None  # how the ranks combine gradients or weights; None until it is chosen
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # a record an epoch
    members: list[dict[str, Any]] = field(default_factory=list)  # nodes and ranks, from which step on
    seconds: float = 0.0  # that the run had taken at the last checkpoint, in all processes

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
        """Divide the work by `shares`, before `restore` or while the ranks' statistics are equal."""
        self.shares = shares
        by_speed = self.config.distributed.share == "auto"
        self.exchange.divide_updates(shares.relative if by_speed else [1.0] * self.world.size)

    def passes(self, count: int) -> list[int]:
        """Divide so many micro-batches of a step into passes: their number in each pass."""
        parts = norms.passes(count, self.config.micro_batch) if self.statistics.groups else count
        return equal(count, parts)

    def record_first_bad(self, loss: torch.Tensor) -> None:
        """Record the step just done if its loss is the first that is not finite. Does not wait for a GPU."""
        is_first = ~torch.isfinite(loss) & (self.first_bad == 0)
        self.first_bad = torch.where(is_first, self.step, self.first_bad)

    def local(self) -> torch.Tensor:
        """Running statistics and sums, which differ between the ranks within an epoch; float64 [n]."""
        return torch.cat([tensor.flatten().double() for tensor in [*self.statistics.running(), self.sums]])

    def _set_local(self, row: torch.Tensor) -> None:
        unflatten(row, [*self.statistics.running(), self.sums])

    def weight_sum(self) -> torch.Tensor:
        """Sum of all weights, float64 [1] on the CPU: not finite if one of them is not."""
        sums = [parameter.detach().double().sum() for parameter in self.net.parameters()]
        return torch.stack(sums).sum().view(1).cpu()

    def shared(self) -> list[torch.Tensor]:
        """The float32 tensors that are equal on all ranks now: weights and, where the ranks take equal steps, momenta.

        Momenta that only their owner holds are not among them.
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
        """A hash of `shared`, float64 [1] on the CPU.

        It adds up integers, which is exact in any order; different processors would add floats differently. It adds
        squares too, so that small differences do not cancel.
        """
        bits = [tensor.view(torch.int32) for tensor in self.shared()]
        sums = [(values * values).sum(dtype=torch.int64) + 31 * values.sum(dtype=torch.int64) for values in bits]
        total = torch.stack(sums).sum() if sums else self.first_bad.new_zeros(())
        return (total % 2**52).double().view(1).cpu()

    @torch.no_grad()
    def equalise(self) -> None:
        """Replace `shared` on all ranks by rank 0's; collective."""
        tensors = self.shared()
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.world.pulse.arrive()
        dist.broadcast(flat, 0)
        unflatten(flat, tensors)

    def snapshot(self, pixels: int) -> dict[str, Any]:
        """Copy a checkpoint's values to the CPU, on the ranks that write checkpoints; {} on the others. Collective.

        The values are rank 0's, bit for bit, on every node. `pixels`: the resolution last trained at.
        """
        local = gather(self.local(), self.world)
        communication = self.exchange.snapshot()
        config = self.config.model_dump(mode="json")
        if self.world.own_folders:
            config = gather_json(config, self.world)[0]  # rank 0's, because folders may differ between hosts
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
            "rng": torch.get_rng_state(),  # nothing draws from it during training yet
        }

    def restore(self, payload: dict[str, Any]) -> tuple[str, str]:
        """Restore a checkpoint's values; return the settings that changed since, and what was merged of its ranks.

        Both are clauses for the log, or empty. Raises UserError where a setting must not change.
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
        else:  # other ranks or shares: the mean of the statistics, and all sums on rank 0
            row = _mean(local, then)
            row[-3:] = local[:, -3:].sum(0) if self.world.is_main else 0.0
            self._set_local(row)
        torch.set_rng_state(payload["rng"])
        return changed, merged

    def _mean_statistics(self, local: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean of the ranks' running statistics, by state-dict name."""
        mean, found, at = _mean(local, self.shares), {}, 0
        for name, layer in self.net.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                for kind in ("running_mean", "running_var"):
                    count = getattr(layer, kind).numel()
                    found[f"{name}.{kind}"] = mean[at : at + count].float()
                    at += count
        return found


def check_resumable(config: Config, payload: dict[str, Any], manifest: Manifest) -> str:
    """List the settings that changed since this checkpoint; empty if none did.

    Raises UserError if a run must not resume from it, because the data set or the mathematics differ.
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
    listing = "; ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())
    if changed and not extended and (fixed or not config.checkpoint.accept_changes):
        remedy = "" if fixed else ", or set checkpoint.accept_changes=true to resume with the new values"
        raise UserError(
            f"the checkpoint of step {payload['step']} has another configuration ({listing}); "
            f"give the run another --name{remedy}"
        )
    return listing


def _mean(rows: torch.Tensor, shares: Shares) -> torch.Tensor:
    """The mean over the ranks of [world size, n] running statistics, weighted by their micro-batches."""
    weights = [shares.weight(rank) for rank in range(len(rows))]
    return (rows * torch.tensor(weights, dtype=rows.dtype).unsqueeze(1)).mean(0)


def _to_cpu(tree: Any) -> Any:
    """Copy nested containers, and their tensors to the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu().clone()
    if isinstance(tree, dict):
        return {key: _to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_to_cpu(value) for value in tree]
    return tree
