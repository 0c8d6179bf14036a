"""The configuration: one typed model for everything tunable.

Its keys are a public interface: recipes, a user's YAML file, ``--set key=value`` and the Helm chart's ``train:``
values all use them; loading.py reads them from there. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from k8scifar.urls import is_address, local, public

DEFAULT_RECIPE = "demo"

# Keys that decide the weights. A checkpoint resumes under other values of these only if the user says so.
IDENTITY = (
    "seed", "epochs", "global_batch", "micro_batch", "last_batch", "label_smoothing", "resolution",
    "model", "optimizer", "schedule", "augment", "data", "distributed",
)  # fmt: skip
# Of these sections, these keys only.
IDENTITY_IN = {"data": ("holdout",), "distributed": ("comm", "local_sgd_steps")}
# Keys that a former release did not have, with the values by which it trained.
ADDED = {"data.holdout": 0, "optimizer.norm_bias_lr": 1.0}
COMM = "distributed.comm"
# Of those, the keys and sections without which a checkpoint makes no sense at all.
FIXED = ("seed", "global_batch", "last_batch", "model", "data", "optimizer.name", "optimizer.norm_bias_lr")
# Keys that may differ from host to host: places, log, what the hardware at hand allows.
OWN = {
    "recipe": True, "name": True, "runs_dir": True, "log": True,
    "data": {"source", "dir"}, "distributed": {"interface"}, "hardware": {"device", "threads"},
}  # fmt: skip

# In JSON's schema; here a sentence says what is wrong. No name begins with a dot: "." and ".." are other folders.
RUN_NAME = r"^([A-Za-z0-9_-][A-Za-z0-9_.-]*)?$"
SOURCE = r"^(auto|cifar10(:.+)?|synthetic(:[0-9]+:[0-9]+)?|imagefolder:.+)$"

Folder = Annotated[str, AfterValidator(lambda path: str(local(path)))]  # ~ is the home folder
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Stage(_Section):
    """Train at `pixels` until the fraction `until` of all steps is done."""

    until: float = Field(gt=0.0, le=1.0)
    """Fraction of all training steps at which this stage ends."""
    pixels: int = Field(ge=8, le=64)
    """Height and width of the training images, pixels."""


class Model(_Section):
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"] = "resnet18"
    """torchvision's name of the model."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """`cifar`: 3x3 convolution, stride 1, no max-pool (for 32-pixel images); `imagenet`: torchvision's own."""
    zero_init: bool = False
    """Start each residual branch at zero, so that a fresh block passes its input on."""
    whiten: bool = False
    """Start the first convolution with the whitening filters of the training images' 3x3 patches (cifar stem)."""


class Optimizer(_Section):
    name: Literal["sgd", "muon"] = "sgd"
    """`sgd`, or `muon`: the convolutions after the first by Muon, the rest by SGD."""
    lr: float = Field(0.2, gt=0.0, le=100.0)
    """Peak learning rate of SGD."""
    muon_lr: float = Field(0.1, gt=0.0, le=10.0)
    """Peak learning rate of Muon, of weights whose norm is the square root of their output channels."""
    muon_iterations: int = Field(5, ge=1, le=10)
    """Iterations that make a step of Muon orthogonal: more is closer, and dearer."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Momentum."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    norm_bias_lr: float = Field(1.0, ge=0.0, le=1000.0)
    """Learning rate of the batch normalisations' biases, as a multiple of SGD's."""
    weight_decay: float = Field(5e-4, ge=0.0, le=1.0)
    """L2 weight decay, added to the gradient."""
    decay: Literal["all", "matrices"] = "all"
    """What decays: `all` parameters, or only `matrices` (convolutions and the classifier; no norms, no biases)."""


class Schedule(_Section):
    """Piecewise linear: `start` x lr rising to lr at `warmup`, then falling to `end` x lr at the last step."""

    warmup: float = Field(0.2, ge=0.0, lt=1.0)
    """Fraction of all steps at which the learning rate peaks."""
    start: Fraction = 0.2
    """Learning rate of the first step, as a fraction of the peak."""
    end: Fraction = 0.0
    """Learning rate after the last step, as a fraction of the peak."""


class Augment(_Section):
    flip: Literal[True, False, "alternating"] = True
    """Mirror every other image, at random; `alternating`: each image in every other epoch, so that two epochs show it
    both ways."""
    translate: int = Field(4, ge=0, le=16)
    """Largest shift in each direction, in pixels of the stored image; the border is reflected."""
    cutout: int = Field(12, ge=0, le=32)
    """Side of the square set to the mean, in pixels of the stored image; 0: none."""


class Data(_Section):
    source: str = Field("auto", json_schema_extra={"pattern": SOURCE})
    """`auto`, `cifar10`, `cifar10:PATH` (its batches, downloaded already), `synthetic` or `imagefolder:PATH` (a folder,
    or a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip of one); a PATH may be an address."""
    dir: Folder = "data"
    """Folder of the packed data set."""
    holdout: int = Field(0, ge=0)
    """Training images that are held out, to evaluate on in place of the test images, which are not read: for choosing
    settings. Of every class as many, always the same ones. 0: none; the evaluation is that of the test images."""

    @field_validator("source")
    @classmethod
    def _without_credentials(cls, source: str) -> str:
        """config.yaml, the checkpoints and the report show it."""
        if not re.fullmatch(SOURCE, source):
            raise ValueError(
                f"data.source = {source!r} is unknown; use auto, cifar10, cifar10:PATH, synthetic or imagefolder:PATH"
            )
        kind, _, address = source.partition(":")
        return f"{kind}:{public(address)}" if is_address(address) else source


class Evaluation(_Section):
    every_epochs: int = Field(1, ge=0)
    """Epochs from one evaluation to the next; there is always one at the end. 0: only that one."""
    batch: int = Field(500, ge=1, le=10000)
    """Test images a forward pass."""
    interim_images: int = Field(0, ge=0)
    """Test images used before the end of training (evenly spaced); 0: all. The last evaluation uses all."""
    tta: Literal[True, False, "shifts"] = True
    """Report test-time augmentation at the last evaluation too: the mean over an image and its mirror image; `shifts`:
    besides, that over both of them shifted by a pixel, six views in all."""


class Checkpoint(_Section):
    every_epochs: int = Field(1, ge=1)
    """Epochs from one checkpoint to the next; there is always one at the end."""
    every_steps: int = Field(0, ge=0)
    """Also write one whenever this many steps have passed; 0: never."""
    every_seconds: float = Field(60.0, ge=0.0)
    """Also write one when the last is this many seconds old; 0: never."""
    keep: int = Field(2, ge=1, le=1000)
    """How many of the newest checkpoints to keep; the best one is kept besides."""
    adopt: bool = False
    """Go on in a run folder that another release of the chart made, as its owner from then on."""
    accept_changes: bool = False
    """Resume although keys that decide the weights (learning rate, augmentation, micro_batch, ...) have changed."""


class Distributed(_Section):
    world_size: int | None = Field(None, ge=1, le=4096)
    """Number of ranks there must be; training refuses to start with another. Empty: whatever there is."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Collectives: `auto` is NCCL on GPUs and gloo on CPUs."""
    interface: str = Field("", pattern=r"^[A-Za-z0-9_.@:-]*$")
    """Network interface of the collectives, e.g. eth0; empty: the one that this host's name resolves to."""
    timeout_seconds: float = Field(60.0, ge=5.0, le=86400.0)
    """How long a rank waits for a peer that is silent before it gives up."""
    comm: Literal["auto", "allreduce", "bf16", "int8", "local-sgd"] = "auto"
    """How gradients are combined: `allreduce` as they are (float32), rounded to `bf16` (half the bytes) or to `int8`
    with error feedback (a quarter), `local-sgd` not at all, but the weights now and then. `auto` times the wire and a
    step when the ranks meet, and takes the most exact one that keeps the wire from being the limit."""
    share: Literal["auto", "equal"] = "auto"
    """Who computes how much of a global batch: `equal`, as equal as whole micro-batches can be, or `auto`: on several
    machines by speed, measured when the ranks meet and followed from epoch to epoch. Local SGD takes equal shares."""
    local_sgd_steps: int = Field(8, ge=1, le=10000)
    """Steps between two averagings of local SGD; `auto` takes from half as many up to as many, as the wire asks."""
    storage: Literal["shared", "local"] = "shared"
    """`shared`: all machines see one data folder and one runs folder; `local`: each machine has its own: node 0 gives
    the others the data set, and the first rank of each node keeps the checkpoints."""


class Hardware(_Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes the GPU where there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """`auto`: bf16 autocast where every rank has it in hardware, fp16 with loss scaling on GPUs that have only that
    (V100, T4), else fp32."""
    threads: int = Field(0, ge=0, le=1024)
    """Intra-op threads a rank; 0: the cores divided among the ranks of this machine."""
    compile: bool = False
    """Compile the model with torch.compile (pays on GPUs)."""
    products: bool = True
    """On a CPU, compute small micro-batches in one pass, and on an x86 one convolutions of few pixels as one matrix
    product over the batch, in float32 also with fewer multiplications: up to twice as fast a step. `false`: torch's own
    forms, which round otherwise in the last digits."""
    deterministic: bool = False
    """On GPUs, use only algorithms that give the same bits each time, which costs speed; CPUs always do."""


class Log(_Section):
    every_seconds: float = Field(5.0, gt=0.0, le=3600.0)
    """Seconds between two progress lines where there is no terminal."""
    every_steps: int = Field(10, ge=1)
    """Steps between two points of the step curves on TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard events."""


class Config(_Section):
    """Everything tunable in a training run."""

    recipe: str = DEFAULT_RECIPE
    """Recipe that the other values start from: demo, quick, standard or best."""
    name: str = Field("", max_length=63, json_schema_extra={"pattern": RUN_NAME})
    """Name of the run, and of its folder; empty: the recipe's name."""
    runs_dir: Folder = "runs"
    """Folder of the run folders."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the weights, the order of the samples and the augmentation."""
    epochs: int = Field(80, ge=1, le=100000)
    """Passes over the training images."""
    global_batch: int = Field(500, ge=1, le=65536)
    """Images an optimiser step, over all ranks."""
    micro_batch: int = Field(250, ge=1, le=65536)
    """Images that batch normalisation sees together, whatever the world size."""
    last_batch: Literal["drop", "pad"] = "drop"
    """An incomplete last global batch is dropped (other images each epoch), or padded with the epoch's first."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Label smoothing of the cross entropy."""
    resolution: list[Stage] = Field(default_factory=lambda: [Stage(until=1.0, pixels=32)], min_length=1, max_length=64)
    """Progressive resolution: the stages of training, in order; the last one ends at 1.0."""
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
        """Flat view, `a.b` -> value, of the keys that decide the weights."""
        values = self.model_dump(mode="json")
        for section, keys in IDENTITY_IN.items():
            values[section] = {key: values[section][key] for key in keys}
        return flatten({key: value for key, value in values.items() if key in IDENTITY})

    def differences(self, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Keys that decide the weights and differ from a saved flat view: key -> (saved value, value now).

        A key that an older version did not have counts as the value of ADDED, without one as no difference;
        `distributed.comm` does not differ where either side leaves it to be chosen.
        """
        saved = ADDED | dict(saved)
        return {
            key: (saved[key], value)
            for key, value in self.identity().items()
            if key in saved and saved[key] != value and not (key == COMM and "auto" in (saved[key], value))
        }

    def shared(self) -> dict[str, Any]:
        """Flat view of the keys that all ranks must have alike; the others may differ from host to host."""
        return flatten(self.model_dump(mode="json", exclude=OWN))

    def fingerprint(self) -> str:
        """sha256 (first 16 hex digits) of what decides the result: `identity` and the evaluation.

        What ADDED has at its value there is left out, so that a former release's run keeps its fingerprint.
        """
        decides = self.identity() | flatten({"evaluation": self.evaluation.model_dump(mode="json")})
        decides = {key: value for key, value in decides.items() if key not in ADDED or value != ADDED[key]}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The configuration as YAML text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def check_world_size(config: Config, world_size: int) -> None:
    """Raise ValueError unless each rank gets a micro-batch, and all as many where each steps by itself (local SGD)."""
    batch, micro_batches = config.global_batch, config.micro_batches
    told = f"global_batch {batch} is {micro_batches} micro-batches of {config.micro_batch}, which {world_size} ranks"
    if micro_batches < world_size:
        fits = _nearest_divisor(batch, max(1, batch // world_size))
        fix = f"micro_batch to {fits}" if fits > 1 else f"global_batch to {world_size * config.micro_batch}"
        raise ValueError(f"{told} can't share: each needs one; set {fix}, or start {micro_batches} ranks")
    if config.distributed.comm == "local-sgd" and micro_batches % world_size:
        unit = world_size * config.micro_batch
        raise ValueError(
            f"{told} can't share equally, as distributed.comm=local-sgd asks; set distributed.comm=auto, or "
            f"global_batch to a multiple of {unit}, e.g. {-(-batch // unit) * unit}"
        )


def _nearest_divisor(number: int, limit: int) -> int:
    """Largest divisor of `number` that is at most `limit`."""
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
