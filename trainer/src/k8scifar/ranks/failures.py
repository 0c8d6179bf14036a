"""Classify torch's failures: a lost peer, a mistake of the user, or a failure of this machine.

Most of them differ only in the text of a RuntimeError. The patterns match how gloo, the store and NCCL begin their
messages, so that a model's error which merely contains "timeout" or "socket" does not match.
"""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

from k8scifar.errors import RankError, TrainingError

# Pattern -> what to do. A restart mends none of these. Never seen in a real log: "invalid device ordinal", "no
# cuda-capable device", "no nvidia gpu", "no nvidia driver", "not compatible with the current pytorch", "nccl version
# mismatch", "unable to find ... interface", "no socket interface" without Bootstrap.
MISTAKES = {
    r"duplicate gpu": "two ranks were given the same GPU: lower --nproc-per-node to the GPUs there are (in the chart "
    "processesPerNode), or give each rank its own",
    r"no gpus found|invalid device ordinal|no cuda-capable device|no nvidia gpu":
    "there is no GPU for this rank: set hardware.device=cpu, lower --nproc-per-node, or mend the driver",
    r"driver version is insufficient|driver on your system is too old|no nvidia driver":
    "the NVIDIA driver is missing, or older than this torch's CUDA: renew it, or set hardware.device=cpu",
    r"no kernel image is available|named symbol not found|not compatible with the current pytorch":
    "this torch was built without code for this GPU: install a build for it, or set hardware.device=cpu",
    r"(nccl|shm|shared memory)[\s\S]*no space left on device":
    "/dev/shm is full: give it more memory (in the chart sharedMemorySize=1Gi; docker run --shm-size=1g)",
    r"mismatched nccl version|nccl version mismatch": "the ranks run different versions of NCCL: install the same "
    "torch on all machines",
    r"bootstrap : no socket interface found|unable to find .*interface|no socket interface":
    "NCCL finds no network interface: set distributed.interface to the one that reaches the others",
}  # fmt: skip
NCCL_MISTAKES = r"ncclinvalidusage|ncclinvalidargument|\binvalid usage\b"
# What torch puts before the text of an error in a hook of DDP's: all modes add up gradients in one.
IN_A_HOOK = r"^Got the following error when running the callback: ([\w.]+): "
OUT_OF_MEMORY = r"out of memory|cudnn_status_alloc_failed|cublas_status_alloc_failed"
# How gloo, the store and NCCL report a peer that ended, fell silent or was cut off. Never seen in a real log: NCCL's
# "remote process exited", "peer may have", "got completion from peer" and "connection refused".
PEER = (
    r"^(\[\S*gloo\S*\] )?(connection (closed|reset|refused|timed out)|read error|write error|socket closed"
    r"|read timeout|write timeout|connect timeout|timed out (waiting|connecting|after)|wait timeout|socket timeout"
    r"|application timeout caused pair closure|broken pipe|operation timed out|gloo connectfullmesh failed"
    r"|failed to (recv|send), (got|sent) 0 bytes|the client socket has (timed out|failed)|barrier timeout"
    r"|rank \d+ timed out in monitoredbarrier)"
    r"|^\[\S*/gloo/\S+:\d+\] "
)
NCCL_PEER = (
    r"ncclremoteerror|remote process exited|connection (reset|closed|refused|timed out)|broken pipe|timed out|timeout"
    r"|aborted|peer may have|got completion from peer|(connect|recv|send)\S* (to|from) \S+ failed|socketprogress"
)
# A GPU, its memory or its driver failed; after a restart it may work. Seen in a real log: only "uncorrectable",
# "launch timed out", "busy or unavailable" and "unknown error".
MACHINE = (
    r"uncorrectable|unspecified launch failure|launch timed out|busy or unavailable|fallen off|hardware stack error"
    r"|nvlink|initialization error|unknown error|system not yet initialized|mps"
)


def failure(error: BaseException, size: int) -> RankError | TrainingError | None:
    """Translate a torch failure; None for a lost peer (see `is_peer_failure`) and for any other error.

    Args:
        size: number of ranks.
    """
    text = _text(error)
    if not isinstance(error, RuntimeError | ValueError) or is_peer_failure(error, size):
        return None
    from_nccl = isinstance(error, dist.DistError) or _is_nccl(text)
    if not (
        from_nccl or isinstance(error, torch.cuda.OutOfMemoryError) or _found(r"cuda|cudnn|cublas|nvidia|nccl", text)
    ):
        return None
    for words, remedy in MISTAKES.items():
        if _found(words, text):
            return RankError(f"{remedy} ({brief(error)})")
    if isinstance(error, torch.cuda.OutOfMemoryError) or _found(OUT_OF_MEMORY, text):
        return RankError(
            f"the GPU's memory is full: lower micro_batch and evaluation.batch, or end what uses it ({brief(error)})"
        )
    if from_nccl and _found(NCCL_MISTAKES, text):
        return RankError(f"NCCL was used in a way that it refuses: set NCCL_DEBUG=WARN to see why ({brief(error)})")
    if from_nccl or _found(MACHINE, text):
        return TrainingError(f"this machine's GPU or its network failed: {brief(error)}")
    return None


def is_peer_failure(error: BaseException, size: int) -> bool:
    """Whether a collective failed because one of `size` ranks died, fell silent or was cut off."""
    if size == 1 or not isinstance(error, RuntimeError):
        return False
    text = _text(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or _found(OUT_OF_MEMORY, text):
        return False
    if any(_found(words, text) for words in MISTAKES):
        return False
    kind = found[1] if (found := re.match(IN_A_HOOK, str(error))) else type(error).__name__
    if kind.rpartition(".")[2] in ("DistNetworkError", "DistStoreError") or _found(PEER, text):
        return True
    return (isinstance(error, dist.DistError) or _is_nccl(text)) and _found(NCCL_PEER, text)


def brief(error: BaseException) -> str:
    """Return NCCL's last error, which follows some lines down, or else the first line."""
    lines = [line.strip() for line in _text(error).splitlines() if line.strip()] or [type(error).__name__]
    first = re.sub(r"^\[/?\S+:\d+\] ", "", lines[0]).partition(". This is typically")[0]
    if not _is_nccl(first):
        return first.partition(" Exception raised from")[0]
    name = next((line.partition(":")[0] for line in lines if line.startswith("nccl")), "NCCL")
    last = lines[lines.index("Last error:") + 1 :][:1] if "Last error:" in lines else []
    return f"{name}: {last[0]}" if last else re.sub(r" in: \S+,", ":", first)


def _text(error: BaseException) -> str:
    return re.sub(IN_A_HOOK, "", str(error))


def _is_nccl(text: str) -> bool:
    return bool(re.match(r"(NCCL |\[?(PG|Rank) .*(NCCL|watchdog)|ProcessGroupNCCL|NCCL error)", text, re.IGNORECASE))


def _found(words: str, text: str) -> bool:
    return bool(re.search(words, text, re.IGNORECASE))
