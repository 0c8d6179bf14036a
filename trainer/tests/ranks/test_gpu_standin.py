"""What is asked of GPUs, by a stand-in for torch.cuda: no GPU is needed.

Shows which options, variables and lines come from this code. Not that any torch, NCCL or driver heeds them, nor that a
real one fails in these words: test_gpu.py runs on a GPU.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from k8scifar.config import loading
from k8scifar.errors import RankError, TrainingError, UserError
from k8scifar.ranks import agree, nccl, world
from k8scifar.ranks import device as devices
from k8scifar.results import ownership
from k8scifar.results.run_folder import RunFolder
from k8scifar.training import resume


@pytest.fixture
def gpus(monkeypatch):
    """A machine with GPUs: ``gpus(count=1, capability=(8, 0), built=["sm_80"])``; records what is called."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    made = SimpleNamespace(groups=[], environment={})

    def start(count: int = 1, capability=(8, 0), built=("sm_70", "sm_80", "sm_90")):
        def init(backend, **options):
            made.groups.append((backend, options))
            made.environment = {name: value for name, value in world.os.environ.items() if name.startswith("TORCH_")}

        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "device_count", lambda: count)
        monkeypatch.setattr(cuda, "set_device", lambda device: None)
        monkeypatch.setattr(cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(cuda, "get_device_name", lambda device=None: "Stand-in 100")
        monkeypatch.setattr(cuda, "get_arch_list", lambda: list(built))
        monkeypatch.setattr(dist, "init_process_group", init)
        monkeypatch.setattr(dist, "new_group", lambda **options: made.groups.append((options.pop("backend"), options)))
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        for name in [name for name in world.os.environ if name.startswith("TORCH_")]:
            monkeypatch.delenv(name)
        return made

    yield start
    for name in [name for name in world.os.environ if name.startswith(("TORCH_NCCL", "TORCH_FR"))]:
        del world.os.environ[name]


def config(tmp_path, *sets):
    return loading.load(sets=[f"runs_dir={tmp_path}", "name=run", *sets])


def test_gloo_is_asked_to_notice_a_lost_peer_before_nccl_and_nccl_before_its_monitor(gpus, tmp_path, monkeypatch):
    """The time-outs as they are handed over; in which order they strike is not shown."""
    made = gpus()
    with world.join(config(tmp_path)):
        assert not (tmp_path / "run").exists(), "one rank waits for nobody"
    made.groups.clear()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = config(tmp_path, "distributed.timeout_seconds=400")
    with world.join(settings, settings.run_dir) as here:
        assert here.backend == "nccl"
        assert here.device == torch.device("cuda", 0)
    (backend, first), (host_backend, host) = made.groups
    assert (backend, host_backend) == ("nccl", "gloo")
    assert first["device_id"] == torch.device("cuda", 0)
    seconds = [host["timeout"].total_seconds(), first["timeout"].total_seconds()]
    seconds.append(float(made.environment["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]))
    assert seconds == [400, 600, 800]
    assert made.environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert made.environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    kept = [name for name, value in made.environment.items() if value == str(tmp_path / "run" / "nccl" / "rank_")]
    assert len(kept) == 1
    assert not (tmp_path / "run").exists(), "whose run it is, nobody has asked yet"


def test_nccl_s_folder_is_made_with_the_run_folder_alone(gpus, tmp_path, monkeypatch):
    """Of a training of two ranks, once the folder is known to be its own; an evaluation has none."""
    made = gpus()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = config(tmp_path)
    with world.join(settings):
        assert not [value for value in made.environment.values() if str(tmp_path) in value]
    with world.join(settings, settings.run_dir) as here:
        monkeypatch.setattr(agree, "each", lambda world, call: [call()])
        monkeypatch.setenv(ownership.RELEASE, "lab/cifar")
        resume._open(RunFolder(settings.run_dir), settings, here)
        assert (tmp_path / "run" / "nccl").is_dir()
        (tmp_path / "run" / "nccl").rmdir()
        ownership.leave()
        monkeypatch.setenv(ownership.RELEASE, "team/cifar")
        with pytest.raises(UserError, match="belongs to release cifar in namespace lab"):
            resume._open(RunFolder(settings.run_dir), settings, here)
        assert not (tmp_path / "run" / "nccl").exists()


@pytest.mark.parametrize(("version", "prefix"), [("2.4.0+cu121", "TORCH_NCCL_TRACE"), ("2.13.0", "TORCH_FR")])
def test_flight_recorder_has_the_names_of_each_torch(version, prefix, tmp_path):
    environment = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    nccl.settle_environment(60, tmp_path, environment, version)
    assert environment[f"{prefix}_BUFFER_SIZE"] == "2000"
    assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1", "what the user sets stays"
    assert environment["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "480"
    assert len(environment) == 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (ValueError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!"), RankError, "no GPU for this rank"),
        (RuntimeError("Socket Timeout"), TrainingError, "rank 0 of 1 could not join its peers: Socket Timeout"),
    ],
)
def test_failing_set_up_is_told_for_what_it_is(gpus, tmp_path, monkeypatch, failure, kind, words):
    gpus()

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(kind, match=words), world.join(config(tmp_path)):
        pass


def test_out_of_memory_while_training_is_a_persons_to_mend(gpus, tmp_path):
    gpus()
    with pytest.raises(RankError, match="lower micro_batch"), world.join(config(tmp_path)):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_reader_does_not_wait_for_a_stuck_gpu_for_good(monkeypatch):
    """With an event that is never done; not that a real stuck GPU lets `query` return."""

    class Event:
        def record(self):
            pass

        def query(self):
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    here = SimpleNamespace(device=torch.device("cuda", 0), size=2, timeout=0.05)
    with pytest.raises(RuntimeError, match="Timed out waiting") as told:
        world.settle(here)
    assert world.failures.is_peer_failure(told.value, 2)
    world.settle(SimpleNamespace(device=torch.device("cpu"), size=2, timeout=0.05))


def test_card_without_code_in_this_torch_is_told_before_the_first_step(gpus, tmp_path):
    gpus(capability=(6, 1))
    with (
        pytest.raises(RankError, match=r"no code for Stand-in 100, compute capability 6\.1 \(it has sm_70.*device=cpu"),
        world.join(config(tmp_path)),
    ):
        pass


def test_rank_without_a_gpu_of_its_own_is_told(gpus, tmp_path, monkeypatch):
    gpus(count=1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RankError, match="local rank 1 has no GPU: this machine has 1"), world.join(config(tmp_path)):
        pass


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_driver_that_is_too_old_is_told_in_one_line(gpus, tmp_path, monkeypatch, capsys, wanted):
    gpus()

    def unusable():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please "
                      "update your GPU driver. (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)",
                      UserWarning, stacklevel=1)  # fmt: skip
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unusable)
    with warnings.catch_warnings(record=True) as told:
        if wanted == "auto":
            assert devices.choose(config(tmp_path), 0).type == "cpu"
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert "driver on your system is too old" in said
            assert "Triggered" not in said
        else:
            with pytest.raises(UserError, match=r"driver on your system is too old.*set hardware\.device=cpu"):
                devices.choose(config(tmp_path, "hardware.device=cuda"), 0)
    assert not told


@pytest.mark.parametrize("wanted", [True, False])
def test_gpus_choose_the_fastest_algorithms_or_repeatable_ones(gpus, tmp_path, monkeypatch, wanted):
    gpus()
    chosen = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", wanted)
    settings = config(tmp_path, f"hardware.deterministic={wanted}")
    devices.prepare(settings, torch.device("cpu"))
    assert torch.backends.cudnn.benchmark == wanted, "a CPU is left alone"
    with world.join(settings):
        assert torch.backends.cudnn.benchmark == (not wanted)
        assert chosen == [True] * wanted
        assert world.os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    world.os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
