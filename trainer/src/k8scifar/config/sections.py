"""The sections of the configuration: keys, types, limits, and a sentence for each; schema.py puts them together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from k8scifar.urls import local

Folder = Annotated[str, AfterValidator(lambda path: str(local(path)))]  # ~ is the home folder
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Stage(Section):
    """Train at `pixels` until the fraction `until` of all steps is done."""

    until: float = Field(gt=0.0, le=1.0)
    """Fraction of all training steps at which this stage ends."""
    pixels: int = Field(ge=8, le=64)
    """Height and width of the training images, pixels."""


class Model(Section):
    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"] = "resnet18"
    """torchvision's name of the model."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """`cifar`: 3x3 convolution, stride 1, no max-pool (for 32-pixel images); `imagenet`: torchvision's own."""
    zero_init: bool = False
    """Start each residual branch at zero, so that a fresh block passes its input on."""
    whiten: bool = False
    """Start the first convolution with the whitening filters of the training images' 3x3 patches (cifar stem)."""


class Optimizer(Section):
    name: Literal["sgd", "muon"] = "sgd"
    """`sgd`, or `muon`: the convolutions after the first by Muon, the rest by SGD."""
    lr: float = Field(0.2, gt=0.0, le=100.0)
    """Peak learning rate of SGD."""
    muon_lr: float = Field(0.1, gt=0.0, le=10.0)
    """Peak learning rate of Muon (`name` muon only), of weights whose norm is the square root of their output
    channels."""
    muon_iterations: int = Field(5, ge=1, le=10)
    """Iterations that make a step of Muon orthogonal (`name` muon only): more is closer, and dearer."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Momentum."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    norm_bias_lr: float = Field(1.0, ge=0.0, le=1000.0)
    """Learning rate of the batch normalisations' biases, as a multiple of SGD's."""
    weight_decay: float = Field(5e-4, ge=0.0, le=1.0)
    """L2 weight decay, added to the gradient. The convolutions that Muon steps keep a fixed norm and do not decay."""
    decay: Literal["all", "matrices"] = "all"
    """What decays: `all` parameters, or only `matrices` (convolutions and the classifier; no norms, no biases)."""


class Schedule(Section):
    """Piecewise linear: `start` x lr rising to lr at `warmup`, then falling to `end` x lr at the last step."""

    warmup: float = Field(0.2, ge=0.0, lt=1.0)
    """Fraction of all steps at which the learning rate peaks."""
    start: Fraction = 0.2
    """Learning rate of the first step, as a fraction of the peak. Not read with `warmup` 0: the first step is the
    peak."""
    end: Fraction = 0.0
    """Learning rate after the last step, as a fraction of the peak."""


class Augment(Section):
    flip: Literal[True, False, "alternating"] = True
    """Mirror every other image, at random; `alternating`: each image in every other epoch, so that two epochs show it
    both ways."""
    translate: int = Field(4, ge=0, le=16)
    """Largest shift in each direction, in pixels of the stored image; the border is reflected."""
    cutout: int = Field(12, ge=0, le=32)
    """Side of the square set to the mean, in pixels of the stored image; 0: none."""


class Data(Section):
    dir: Folder = "data"
    """Folder of the packed data set."""
    holdout: int = Field(0, ge=0)
    """Training images that are held out, to evaluate on in place of the test images, which are not read: for choosing
    settings. Of every class as many, always the same ones. 0: none; the evaluation is that of the test images."""


class Evaluation(Section):
    every_epochs: int = Field(1, ge=0)
    """Epochs from one evaluation to the next; there is always one at the end. 0: only that one."""
    batch: int = Field(500, ge=1, le=10000)
    """Test images a forward pass."""
    interim_images: int = Field(0, ge=0)
    """Test images of each evaluation before the last (evenly spaced); 0: all. The last one uses all. Not read with
    `every_epochs` 0."""
    tta: Literal[True, False, "shifts"] = True
    """Report test-time augmentation at the last evaluation too: the mean over an image and its mirror image; `shifts`:
    besides, that over both of them shifted by a pixel, six views in all."""


class Checkpoint(Section):
    every_epochs: int = Field(1, ge=1)
    """Epochs from one checkpoint to the next; there is always one at the end."""
    every_steps: int = Field(0, ge=0)
    """Also write one whenever this many steps have passed; 0: never."""
    every_seconds: float = Field(60.0, ge=0.0)
    """Also write one when the last is this many seconds old; 0: never."""
    keep: int = Field(2, ge=1, le=1000)
    """How many of the newest checkpoints to keep; the best one that has a checkpoint is kept
    besides."""
    adopt: bool = False
    """Go on in a run folder that another release of the chart made, as its owner from then on."""
    accept_changes: bool = False
    """Resume although keys that decide the weights (learning rate, augmentation, micro_batch, ...) have changed."""


class Distributed(Section):
    world_size: int | None = Field(None, ge=1, le=4096)
    """Number of ranks there must be; training refuses to start with another. Empty: whatever there is."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Collectives: `auto` is NCCL on GPUs and gloo on CPUs."""
    interface: str = Field("", pattern=r"^[A-Za-z0-9_.@:-]*$")
    """Network interface of the collectives, e.g. eth0; empty: the one that this host's name resolves to."""
    timeout_seconds: float = Field(60.0, ge=5.0, le=86400.0)
    """How long a rank waits for a peer that is silent before it gives up."""
    comm: Literal["auto", "allreduce", "bf16", "int8", "local-sgd"] = "auto"
    """How several ranks' gradients are combined: `allreduce` as they are (float32), rounded to `bf16` (half the bytes)
    or to `int8` with error feedback (a quarter), `local-sgd` not at all, but the weights now and then. `auto` times the
    wire and a step when the ranks meet, and takes the most exact one that keeps the wire from being the limit."""
    share: Literal["auto", "equal"] = "auto"
    """Who computes how much of a global batch: `equal`, as equal as whole micro-batches can be, or `auto`: on several
    machines by speed, measured when the ranks meet and followed from epoch to epoch. Local SGD takes equal shares."""
    local_sgd_steps: int = Field(8, ge=1, le=10000)
    """Steps between two averagings of local SGD; `auto` takes from half as many up to as many, as the wire asks. The
    other modes do not read it."""
    storage: Literal["shared", "local"] = "shared"
    """`shared`: all machines see one data folder and one runs folder; `local`: each machine has its own: node 0 gives
    the others the data set, and the first rank of each node keeps the checkpoints."""


class Hardware(Section):
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
    forms, which round otherwise in the last digits; `compile` takes those, too."""
    deterministic: bool = False
    """On GPUs, use only algorithms that give the same bits each time, which costs speed; CPUs always do."""


class Log(Section):
    every_seconds: float = Field(5.0, gt=0.0, le=3600.0)
    """Seconds between two progress lines where there is no terminal."""
    every_steps: int = Field(10, ge=1)
    """Steps between two points of the step curves on TensorBoard; on GPUs also between two looks at whether the loss is
    finite."""
    tensorboard: bool = True
    """Write TensorBoard events."""
