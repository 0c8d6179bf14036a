"""The sections of the configuration: keys, types, limits, descriptions; schema.py combines them."""

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
    """Name of the model in torchvision."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """`cifar`: 3x3 convolution, stride 1, no max-pool (for 32-pixel images); `imagenet`: torchvision's own."""
    zero_init: bool = False
    """Start each residual branch at zero, so that a fresh block is the identity."""
    whiten: bool = False
    """Start the first convolution with the whitening filters of the training images' 3x3 patches (cifar stem)."""


class Optimizer(Section):
    name: Literal["sgd", "muon"] = "sgd"
    """`sgd`, or `muon`: the convolutions after the first by Muon, the rest by SGD."""
    lr: float = Field(0.2, gt=0.0, le=100.0)
    """Peak learning rate of SGD."""
    muon_lr: float = Field(0.1, gt=0.0, le=10.0)
    """Peak learning rate of Muon (only with `name` muon). The norm of a weight is the square root of its output
    channels."""
    muon_iterations: int = Field(5, ge=1, le=10)
    """Newton-Schulz iterations (only with `name` muon). More of them give a more orthogonal update and cost more
    time."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Momentum."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    norm_bias_lr: float = Field(1.0, ge=0.0, le=1000.0)
    """Learning rate of the biases of batch normalisations, as a multiple of SGD's."""
    weight_decay: float = Field(5e-4, ge=0.0, le=1.0)
    """L2 weight decay, added to the gradient. Convolutions that Muon updates keep a fixed norm and do not decay."""
    decay: Literal["all", "matrices"] = "all"
    """Parameters that decay: `all`, or only `matrices` (convolutions and the classifier; no norms, no biases)."""


class Schedule(Section):
    """Piecewise linear: `start` x lr rising to lr at `warmup`, then falling to `end` x lr at the last step."""

    warmup: float = Field(0.2, ge=0.0, lt=1.0)
    """Fraction of all steps at which the learning rate peaks."""
    start: Fraction = 0.2
    """Learning rate of the first step, as a fraction of the peak. Has no effect with `warmup` 0, where the first step
    is the peak."""
    end: Fraction = 0.0
    """Learning rate after the last step, as a fraction of the peak."""


class Augment(Section):
    flip: Literal[True, False, "alternating"] = True
    """Mirror half of the images, at random. `alternating`: mirror each image in every other epoch, so that two epochs
    show it both ways."""
    translate: int = Field(4, ge=0, le=16)
    """Largest shift in each direction, in pixels of the stored image. The border is reflected."""
    cutout: int = Field(12, ge=0, le=32)
    """Side of the square set to the mean, in pixels of the stored image; 0: none."""


class Data(Section):
    dir: Folder = "data"
    """Folder of the packed data set."""
    holdout: int = Field(0, ge=0)
    """Training images to hold out for the choice of settings: always the same ones, equally many of each class. The run
    evaluates on them and does not read the test images. 0: evaluate on the test images."""


class Evaluation(Section):
    every_epochs: int = Field(1, ge=0)
    """Epochs between two evaluations. There is always one at the end. 0: only that one."""
    batch: int = Field(500, ge=1, le=10000)
    """Test images in a forward pass."""
    interim_images: int = Field(0, ge=0)
    """Test images of each evaluation before the last, evenly spaced; 0: all. The last one uses all. Has no effect with
    `every_epochs` 0."""
    tta: Literal[True, False, "shifts"] = True
    """At the last evaluation, also report the accuracy with test-time augmentation: the mean over an image and its
    mirror image. `shifts`: also the mean over these and both shifted by a pixel, six views."""


class Checkpoint(Section):
    every_epochs: int = Field(1, ge=1)
    """Epochs between two checkpoints. There is always one at the end."""
    every_steps: int = Field(0, ge=0)
    """Also write one every so many steps; 0: never."""
    every_seconds: float = Field(60.0, ge=0.0)
    """Also write one when the last one is older than this, in seconds; 0: never."""
    keep: int = Field(2, ge=1, le=1000)
    """Number of the newest checkpoints to keep. The best one that has a checkpoint is also kept."""
    adopt: bool = False
    """Take over a run folder that another release of the chart owns."""
    accept_changes: bool = False
    """Resume even if keys that decide the weights (learning rate, augmentation, micro_batch, ...) have changed."""


class Distributed(Section):
    world_size: int | None = Field(None, ge=1, le=4096)
    """Required number of ranks; training refuses to start with another number. Empty: any number."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Backend of the collectives. `auto`: NCCL on GPUs, gloo on CPUs."""
    interface: str = Field("", pattern=r"^[A-Za-z0-9_.@:-]*$")
    """Network interface of the collectives, e.g. eth0. Empty: that of the address to which this host's name
    resolves."""
    timeout_seconds: float = Field(60.0, ge=5.0, le=86400.0)
    """Time-out in seconds: how long a rank waits for a silent peer before it gives up."""
    comm: Literal["auto", "allreduce", "bf16", "int8", "local-sgd"] = "auto"
    """How the ranks combine what they compute. `allreduce`: gradients in float32; `bf16`: gradients in bfloat16, half
    the bytes; `int8`: gradients in int8 with error feedback, a quarter; `local-sgd`: weights, every few steps.
    `auto` times the wire and a step when the ranks meet, and chooses the most exact mode that is nearly as fast as
    the fastest."""
    share: Literal["auto", "equal"] = "auto"
    """Shares of a global batch. `equal`: as equal as whole micro-batches allow; `auto`: on several machines by their
    speeds, which are measured when the ranks meet and followed from epoch to epoch. Local SGD needs equal
    shares."""
    local_sgd_steps: int = Field(8, ge=1, le=10000)
    """Steps between two averagings of the weights in local SGD. `auto` chooses from half this number up to this number,
    by the speed of the wire. Has no effect in other modes."""
    storage: Literal["shared", "local"] = "shared"
    """`shared`: all machines share one data folder and one runs folder. `local`: each machine has its own; node 0 sends
    the data set to the others, and the first rank of each node writes checkpoints."""


class Hardware(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. `auto`: the GPU, if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """`auto`: bf16 autocast if every rank has it in hardware, fp16 with loss scaling on GPUs without bf16 (V100, T4),
    else fp32."""
    threads: int = Field(0, ge=0, le=1024)
    """Intra-op threads of a rank; 0: the cores, divided among the ranks of this machine."""
    compile: bool = False
    """Compile the model with torch.compile (faster on GPUs)."""
    products: bool = True
    """On a CPU, compute small micro-batches in one pass. On an x86 CPU, also compute convolutions of few pixels as
    matrix products over the batch, in float32 with fewer multiplications. A step is up to twice as fast. `false`,
    or `compile`: torch's own convolutions, which round differently in the last digits."""
    deterministic: bool = False
    """On GPUs, use only algorithms that give the same bits each time, which is slower. CPUs always do so."""


class Log(Section):
    every_seconds: float = Field(5.0, gt=0.0, le=3600.0)
    """Seconds between two progress lines if the output is not a terminal."""
    every_steps: int = Field(10, ge=1)
    """Steps between two points of the step curves on TensorBoard. On GPUs also the steps between two checks that the
    loss is finite."""
    tensorboard: bool = True
    """Write TensorBoard events."""
