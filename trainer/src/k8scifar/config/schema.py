"""The configuration: one typed model of all settings, from the sections in sections.py.

Its keys are a public interface: recipes, a user's YAML file, ``--set key=value`` and the Helm chart's ``train:``
values use them. loading.py loads them. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from k8scifar.config.sections import (
    Augment,
    Checkpoint,
    Data,
    Distributed,
    Evaluation,
    Folder,
    Hardware,
    Log,
    Model,
    Optimizer,
    Schedule,
    Section,
    Stage,
)

DEFAULT_RECIPE = "demo"

# Keys that decide the weights. A checkpoint resumes with other values of these only with checkpoint.accept_changes.
IDENTITY = (
    "seed", "epochs", "global_batch", "micro_batch", "last_batch", "label_smoothing", "resolution",
    "model", "optimizer", "schedule", "augment", "data", "distributed",
)  # fmt: skip
# Of these sections, these keys only.
IDENTITY_IN = {"data": ("holdout",), "distributed": ("comm", "local_sgd_steps")}
# Keys that an earlier release did not have, with the values that it used.
ADDED = {"data.holdout": 0, "optimizer.norm_bias_lr": 1.0}
COMM = "distributed.comm"
# Of those, the keys and sections that must not change: a checkpoint is meaningless without them.
FIXED = ("seed", "global_batch", "last_batch", "model", "data", "optimizer.name", "optimizer.norm_bias_lr")
# Keys that may differ between hosts: folders, log, hardware.
OWN = {
    "recipe": True, "name": True, "runs_dir": True, "log": True,
    "data": {"dir"}, "distributed": {"interface"}, "hardware": {"device", "threads"},
}  # fmt: skip

# For the JSON schema; here a validator gives a clearer error. No leading dot: "." and ".." are other folders.
RUN_NAME = r"^([A-Za-z0-9_-][A-Za-z0-9_.-]*)?$"


class Config(Section):
    """The settings of a training run."""

    recipe: str = DEFAULT_RECIPE
    """Recipe with the default values of the other keys: demo, quick, standard or best."""
    name: str = Field("", max_length=63, json_schema_extra={"pattern": RUN_NAME})
    """Name of the run and of its folder. Empty: the recipe's name."""
    runs_dir: Folder = "runs"
    """Folder of the run folders."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the weights, the order of the samples and the augmentation."""
    epochs: int = Field(80, ge=1, le=100000)
    """Passes over the training images."""
    global_batch: int = Field(500, ge=1, le=65536)
    """Images in an optimiser step, over all ranks."""
    micro_batch: int = Field(250, ge=1, le=65536)
    """Images that batch normalisation normalises together, for every world size."""
    last_batch: Literal["drop", "pad"] = "drop"
    """Drop an incomplete last global batch (other images in each epoch), or pad it with the epoch's first images."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Label smoothing of the cross-entropy loss."""
    resolution: list[Stage] = Field(default_factory=lambda: [Stage(until=1.0, pixels=32)], min_length=1, max_length=64)
    """Progressive resolution: the stages of training, in order. The last one ends at 1.0."""
    model: Model = Field(default_factory=Model)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    augment: Augment = Field(default_factory=Augment)
    data: Data = Field(default_factory=Data)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    distributed: Distributed = Field(default_factory=Distributed)
    hardware: Hardware = Field(default_factory=Hardware)
    log: Log = Field(default_factory=Log)

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(RUN_NAME, name):
            raise ValueError(
                f"name = {name!r} can't name a run's folder; use letters, digits, `_`, `-` and `.`, no `.` at the start"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}; "
                f"set micro_batch to {_nearest_divisor(self.global_batch, self.micro_batch)}"
            )
        if self.distributed.world_size:
            check_world_size(self, self.distributed.world_size)
        ends = [stage.until for stage in self.resolution]
        if ends != sorted(set(ends)) or ends[-1] != 1.0:
            raise ValueError(f"resolution: the stages' `until` must rise and end at 1.0, not {ends}")
        if self.model.whiten and self.model.stem != "cifar":
            raise ValueError("model.whiten needs model.stem=cifar")
        if self.micro_batch == 1:
            raise ValueError("micro_batch must be at least 2: batch normalisation needs more than one image")
        if self.optimizer.nesterov and self.optimizer.momentum == 0.0:
            raise ValueError("optimizer.nesterov needs a momentum above 0; set optimizer.nesterov=false")
        return self

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.runs_dir) / (self.name or self.recipe)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a global batch."""
        return self.global_batch // self.micro_batch

    def identity(self) -> dict[str, Any]:
        """The keys that decide the weights, flat: `a.b` -> value."""
        values = self.model_dump(mode="json")
        for section, keys in IDENTITY_IN.items():
            values[section] = {key: values[section][key] for key in keys}
        return flatten({key: value for key, value in values.items() if key in IDENTITY})

    def differences(self, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Keys that decide the weights and differ from `saved`, a flat view: key -> (saved value, value now).

        A key that an earlier release did not have has its value in ADDED, or does not count as a difference.
        `distributed.comm` does not differ if either value is `auto`.
        """
        saved = ADDED | dict(saved)
        return {
            key: (saved[key], value)
            for key, value in self.identity().items()
            if key in saved and saved[key] != value and not (key == COMM and "auto" in (saved[key], value))
        }

    def shared(self) -> dict[str, Any]:
        """The keys that must be equal on all ranks, flat; the others may differ between hosts."""
        return flatten(self.model_dump(mode="json", exclude=OWN))

    def fingerprint(self) -> str:
        """sha256 (first 16 hex digits) of what decides the result: `identity` and the evaluation.

        Keys with their value in ADDED do not count, so that an earlier release's run keeps its fingerprint.
        """
        decides = self.identity() | flatten({"evaluation": self.evaluation.model_dump(mode="json")})
        decides = {key: value for key, value in decides.items() if key not in ADDED or value != ADDED[key]}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The configuration as YAML text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def check_world_size(config: Config, world_size: int) -> None:
    """Raise ValueError unless each rank gets a micro-batch and, in local SGD, all ranks get equally many."""
    batch, micro_batches = config.global_batch, config.micro_batches
    problem = f"global_batch {batch} is {micro_batches} micro-batches of {config.micro_batch}, which {world_size} ranks"
    if micro_batches < world_size:
        fits = _nearest_divisor(batch, max(1, batch // world_size))
        fix = f"micro_batch to {fits}" if fits > 1 else f"global_batch to {world_size * config.micro_batch}"
        raise ValueError(f"{problem} can't share: each needs one; set {fix}, or start {micro_batches} ranks")
    if config.distributed.comm == "local-sgd" and micro_batches % world_size:
        unit = world_size * config.micro_batch
        raise ValueError(
            f"{problem} can't share equally, as distributed.comm=local-sgd requires; set distributed.comm=auto, or "
            f"global_batch to a multiple of {unit}, e.g. {-(-batch // unit) * unit}"
        )


def _nearest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, with keys joined by dots; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
