"""Choose each rank's device and the precision of all ranks."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from k8scifar import machine
from k8scifar.config.schema import Config
from k8scifar.console import say
from k8scifar.errors import RankError, UserError

AMPERE, VOLTA = (8, 0), (7, 0)  # the first GPUs with bf16, and with fp16 matrix units
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NONE, FP16, BF16 = 0, 1, 2  # the best 16-bit format that a device has in hardware


@dataclass(frozen=True)
class Precision:
    """The precision of all ranks (`bf16`, `fp16` or `fp32`), and a warning about it, or ""."""

    name: str
    note: str = ""


def choose_device(config: Config, local_rank: int) -> torch.device:
    """Return this rank's device. Raises UserError or RankError if the configured one is missing."""
    available, why = (False, "") if config.hardware.device == "cpu" else _available()
    if not available:
        if config.hardware.device == "cuda":
            cause = why or "torch sees no GPU here"
            raise UserError(f"hardware.device=cuda, but {cause}; set hardware.device=cpu, or mend the driver")
        if config.distributed.backend == "nccl":
            raise UserError("distributed.backend=nccl needs GPUs, and this rank trains on the CPU; set it to auto")
        if why and local_rank == 0:
            say(f"the GPUs of this machine can't be used, so the CPU trains: {why}")
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RankError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "lower --nproc-per-node, or set hardware.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    with warnings.catch_warnings():  # of torch about what the error below reports
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_device(device)
        capability, built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not has_code(capability, built):
        raise RankError(
            f"this torch ({torch.__version__}) has no code for {torch.cuda.get_device_name(device)}, compute "
            f"capability {capability[0]}.{capability[1]} (it has {', '.join(built)}); install a torch build that has, "
            "or set hardware.device=cpu"
        )
    return device


def prepare(config: Config, device: torch.device) -> None:
    """Set how a GPU chooses its algorithms: the fastest in a trial, or deterministic ones.

    Without `hardware.deterministic` the order of a GPU's sums may vary between runs. A CPU's order is fixed.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not config.hardware.deterministic
    if config.hardware.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)


def has_code(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether a torch built for these architectures runs on a GPU of this compute capability.

    Machine code (sm_86) runs on the same major version with the same or a higher minor version. PTX (compute_90), which
    the driver compiles, runs on all from that capability on. Code with a letter (sm_90a) runs on that one only.
    """
    entries = [match for name in built if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name))]
    for kind, major, minor, letter in (entry.groups() for entry in entries):
        one = (int(major), int(minor))
        if letter in ("a",) and one != capability:
            continue
        if kind == "sm" and one[0] == capability[0] and one <= capability:
            return True
        if kind == "compute" and one <= capability:
            return True
    return not entries  # of another vendor


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which a model computes in this precision."""
    return torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES)


def resolve_precision(config: Config, device: torch.device, group: object) -> Precision:
    """Return the precision of all ranks; collective over `group`.

    `auto` is bf16 if every rank has it in hardware, fp16 if all ranks have fp16 and none has bf16, else fp32.
    """
    wanted = config.hardware.precision
    if wanted == "fp16" and device.type == "cpu":  # a step would take minutes
        raise UserError("hardware.precision=fp16 needs a GPU, and this rank trains on the CPU; set it to auto")
    best = torch.tensor([ability(device)])
    least, most = best.clone(), best.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    mode = config.distributed.comm
    lossy = mode == "int8"
    auto = {(BF16, BF16): "bf16", (FP16, FP16): "fp32" if lossy else "fp16"}.get((least.item(), most.item()), "fp32")
    if wanted == "fp16" and lossy:
        raise UserError(
            f"hardware.precision=fp16 does not go with distributed.comm={mode}, whose remainders an overflow would "
            "spoil; set hardware.precision=auto, or distributed.comm=bf16"
        )
    if wanted == "auto":
        return Precision(auto)
    lacks = {"bf16": least.item() < BF16, "fp16": least.item() == NONE or most.item() == NONE}.get(wanted, False)
    note = f"{wanted} is only emulated on a rank here, which is far slower; hardware.precision=auto takes {auto}"
    return Precision(wanted, note if lacks else "")


def ability(device: torch.device) -> int:
    """Return the best of BF16, FP16 and NONE that a device has in hardware."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return BF16 if capability >= AMPERE else FP16 if capability >= VOLTA else NONE
    return BF16 if machine.has_bf16(machine.cpu_features()) else NONE


def _available() -> tuple[bool, str]:
    """Whether torch can use a GPU; if it cannot although there is a driver, the reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    reasons = [" ".join(str(warning.message).split()) for warning in caught if "cuda" in str(warning.message).lower()]
    return available, "" if available or not reasons else reasons[0].partition(" (Triggered internally")[0][:300]
