"""What torch's failures mean: a lost peer, a person's mistake, this machine's fault, or none of these.

Shows how a text is judged. Not that torch or NCCL raises it: no NCCL has run here. Behind each text stands where its
words are from: `torch` (in libtorch 2.13's CPU build), `source` (NCCL's or torch's source), `log` (a published log,
some as a line of NCCL's and not in an exception), `memory` (never seen in a real log).
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from k8scifar.errors import RankError, TrainingError
from k8scifar.ranks import failures

NCCL = "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, {}, NCCL version 2.20.5\n{}\nLast error:\n{}"
USAGE = (
    "invalid usage (run with NCCL_DEBUG=WARN for details)",
    "ncclInvalidUsage: This usually reflects invalid usage.",
)
CUDA = ("unhandled cuda error (run with NCCL_DEBUG=INFO for details)", "ncclUnhandledCudaError: Call to CUDA failed.")
SYSTEM = (
    "unhandled system error (run with NCCL_DEBUG=INFO)",
    "ncclSystemError: System call (e.g. socket, malloc) failed.",
)
REMOTE = (
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network",
)
ARGUMENT = ("invalid argument", "ncclInvalidArgument: Invalid value for an argument.")
INTERNAL = ("internal error - please report this issue", "ncclInternalError: Internal check failed.")

MISTAKES = [
    # log
    (dist.DistBackendError(NCCL.format(*USAGE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000")),
     "the same GPU.*--nproc-per-node"),
    (ValueError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!"), "no GPU for this rank"),  # log
    (RuntimeError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!"), "hardware.device=cpu"),  # memory
    (dist.DistBackendError(NCCL.format(*CUDA, "Cuda failure 2 'out of memory'")),  # memory
     "memory is full: lower micro_batch"),
    (dist.DistBackendError(NCCL.format(*CUDA, "Cuda failure 'CUDA driver version is insufficient for CUDA runtime "
                                       "version'")), "driver is missing, or older"),  # log: the words; memory: by NCCL
    (dist.DistBackendError(NCCL.format(*USAGE, "Mismatched NCCL version detected : rank 0 version 22005 rank 1 version "
                                       "22602")),  # source
     "different versions of NCCL"),
    (dist.DistBackendError(NCCL.format(*SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-OTWUcv (size "
                                       "33030528), error: No space left on device (28)")), "sharedMemorySize"),  # log
    (dist.DistBackendError(NCCL.format(*INTERNAL, "Bootstrap : no socket interface found")),  # log
     "distributed.interface"),
    (dist.DistBackendError(NCCL.format(*ARGUMENT, "Invalid config blocking attribute value -2147483648")),  # log
     "NCCL_DEBUG=WARN"),
    (dist.DistBackendError(NCCL.format(*CUDA, "Cuda failure 'named symbol not found'")),  # log
     "without code for this GPU"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be "
                  "reported late"), "without code for this GPU"),  # log
    (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),  # log
     "driver is missing, or older"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has a total capacity of 14 GiB. "
                            "documentation for Memory Management, timeout and socket settings"),  # log, memory
     "lower micro_batch"),
]  # fmt: skip
MACHINES = [
    dist.DistBackendError(NCCL.format(*CUDA, "Cuda failure 999 'unknown error'")),  # log
    dist.DistBackendError(NCCL.format(*INTERNAL, "Net device plugin failed")),  # memory
    RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronous"),  # log
    RuntimeError("CUDA error: the launch timed out and was terminated"),  # log
    RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),  # log
]
PEERS = [
    # torch: the first words of each; "Connection reset" and "Broken pipe" are the system's.
    RuntimeError("[/pytorch/third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.1.0.7]:40113"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv"),
    RuntimeError("[/pytorch/third_party/gloo/transport/tcp/pair.cc:525] Read error [10.1.0.7]:1: Connection reset"),
    RuntimeError("Application timeout caused pair closure"),
    RuntimeError("Connection reset by peer"),
    RuntimeError("Broken pipe"),
    RuntimeError("Gloo connectFullMesh failed with [10.1.0.7]:1"),
    RuntimeError("Socket Timeout"),
    dist.DistStoreError("wait timeout after 30000ms, keys: /0//worker/1"),
    dist.DistNetworkError("The client socket has timed out after 60000ms while trying to connect to (node-0, 29500)."),
    dist.DistBackendError(NCCL.format(*REMOTE, "socketProgressOpt: Call to send to 10.1.0.7<33759> failed : Connection "
                                      "reset by peer")),  # log
    # log, but of "Connection reset by peer"; memory
    dist.DistBackendError(NCCL.format(*INTERNAL, "Net : Call to recv from 10.1.0.7<3> failed : Broken pipe")),
    dist.DistBackendError(NCCL.format(*SYSTEM, "socket: Connect to 10.1.0.7<41135> failed : Connection refused")),
    dist.DistBackendError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, "
                          "Timeout(ms)=75000) ran for 75060 milliseconds before timing out."),  # log
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),  # log
]  # fmt: skip
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("the model's socket embedding of the connection graph has a timeout column"),
    RuntimeError("DataLoader worker (pid 7) timed out after 60 seconds: connection to a socket"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("nccl_table: unknown key 'gloo'"),
    KeyError("connection"),
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("error", "words"), MISTAKES)
def test_what_a_person_has_to_mend_is_told_with_its_remedy(error, words, size):
    assert not failures.is_peer_failure(error, size)
    found = failures.failure(error, size)
    assert isinstance(found, RankError)
    assert re.search(words, str(found))
    assert "\n" not in str(found)
    assert "NCCLUtils" not in str(found)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("error", MACHINES)
def test_a_machine_that_failed_may_start_again(error, size):
    assert not failures.is_peer_failure(error, size)
    assert isinstance(failures.failure(error, size), TrainingError)


@pytest.mark.parametrize("error", PEERS)
def test_lost_peers(error):
    assert failures.is_peer_failure(error, 2)
    assert failures.failure(error, 2) is None
    assert not failures.is_peer_failure(error, 1), "nobody is there to be lost"


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_stay_what_they_are(error, size):
    assert not failures.is_peer_failure(error, size)
    assert failures.failure(error, size) is None


def test_the_last_error_of_nccl_is_what_is_told():
    assert failures.brief(MISTAKES[0][0]).startswith("ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0")
    assert failures.brief(PEERS[0]) == "Connection closed by peer [10.1.0.7]:40113"


@pytest.mark.parametrize("error", PEERS)
def test_a_peer_lost_in_a_hook_of_ddp_is_lost_alike(error):
    """torch turns each error there into a RuntimeError with these words before it (seen with gloo)."""
    kind = type(error).__name__
    inside = RuntimeError(f"Got the following error when running the callback: {kind}: {error}")
    assert failures.brief(inside) == failures.brief(error)
    if kind != "DistBackendError":  # NCCL's, which its watchdog raises outside of hooks
        assert failures.is_peer_failure(inside, 2) and failures.failure(inside, 2) is None
