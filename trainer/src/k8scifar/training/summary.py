"""Summarise a finished run."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from k8scifar import versions
from k8scifar.config.schema import COMM
from k8scifar.results import evaluated, participants, speedup
from k8scifar.results.outcome import Outcome
from k8scifar.training import model, optim
from k8scifar.training.plan import Plan
from k8scifar.training.state import State


def summarise(state: State, plan: Plan, outcome: Outcome, precision: str, weights: str) -> dict[str, Any]:
    """The content of summary.json, without the mistakes.

    Args:
        outcome: the last evaluation's.
        weights: sha256 of the exported weights.
    """
    figures, last = outcome.figures, state.history[-1]
    flops = sum(count * model.training_flops(state.net, pixels) for pixels, count in plan.images_at().items())
    flops += plan.steps * optim.step_flops(state.optimizer)
    machines = speedup.gathered(state.history)
    return {
        "accuracy": figures["accuracy"],
        "accuracy_tta": figures.get("accuracy_tta"),
        **{key: value for key, value in figures.items() if key == "accuracy_tta_shifts"},
        "top5": figures["top5"],
        "loss": figures["loss"],
        "per_class": dict(zip(state.manifest.classes, figures["per_class"], strict=True)),
        "confusion": outcome.confusion.tolist(),
        f"{evaluated.PREFIXES[evaluated.word(plan.config.data.holdout)]}images": figures["images"],
        "epochs": plan.config.epochs,
        "steps": plan.steps,
        "world_size": state.world.size,
        **_members(state, plan),
        "device": device_name(state.world.device),
        "precision": precision,
        "global_batch": plan.config.global_batch,
        "images_per_second": statistics.median(record["images_per_second"] for record in state.history),
        "seconds": last["seconds"],
        "parameters": model.parameters(state.net),
        "training_flops": flops,
        "data": {"source": state.manifest.source, "fingerprint": state.manifest.fingerprint},
        "weights_sha256": weights,
        "config_fingerprint": plan.config.fingerprint(),
        "identity": plan.config.identity() | {COMM: state.exchange.name if state.world.size > 1 else "auto"},
        "versions": versions.versions(),
    } | ({"machines": machines} if machines else {})


def _members(state: State, plan: Plan) -> dict[str, Any]:
    """Nodes and ranks, from which step to which, if they changed during the run."""
    return {"members": participants.within(state.members, 0, plan.steps)} if len(state.members) > 1 else {}


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the CPU with its threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
