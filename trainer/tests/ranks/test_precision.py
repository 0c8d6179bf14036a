"""Precision: what is chosen for which devices, and loss scaling for fp16, whose arithmetic itself needs a GPU.

The choice is shown by stand-ins for what devices can do; that a real V100 or T4 says so of itself is not.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from runs import CUT_AT, train_in_turn, weights_hash

from k8scifar import machine
from k8scifar.config import loading
from k8scifar.errors import UserError
from k8scifar.ranks import device
from k8scifar.training import checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def resolved(monkeypatch, sets, here, other):
    """The precision of two ranks of these abilities."""

    def all_reduce(tensor, operation, group):
        pair = [tensor.item(), other]
        tensor.fill_(min(pair) if operation == dist.ReduceOp.MIN else max(pair))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(device, "ability", lambda _: here)
    return device.resolve_precision(loading.load(sets=sets), GPU, None)


@pytest.mark.parametrize(
    ("here", "other", "sets", "name", "told"),
    [
        (device.BF16, device.BF16, [], "bf16", ""),
        (device.FP16, device.FP16, [], "fp16", ""),
        (device.FP16, device.BF16, [], "fp32", ""),
        (device.FP16, device.NONE, [], "fp32", ""),
        (device.NONE, device.BF16, [], "fp32", ""),
        (device.FP16, device.FP16, ["hardware.precision=bf16"], "bf16", "bf16 is only emulated .* takes fp16"),
        (device.BF16, device.NONE, ["hardware.precision=bf16"], "bf16", "bf16 is only emulated .* takes fp32"),
        (device.NONE, device.NONE, ["hardware.precision=fp16"], "fp16", "fp16 is only emulated .* takes fp32"),
        (device.BF16, device.BF16, ["hardware.precision=fp16"], "fp16", ""),
        (device.NONE, device.NONE, ["hardware.precision=fp32"], "fp32", ""),
    ],
)
def test_precision_that_all_ranks_have(here, other, sets, name, told, monkeypatch):
    found = resolved(monkeypatch, sets, here, other)
    assert found.name == name
    assert re.fullmatch(told, found.note) if not told else re.search(told, found.note)


def test_fp16_is_refused_where_it_can_not_work(monkeypatch):
    with pytest.raises(UserError, match=r"needs a GPU.*set it to auto"):
        device.resolve_precision(loading.load(sets=["hardware.precision=fp16"]), CPU, None)
    with pytest.raises(UserError, match=r"int8.*set hardware\.precision=auto"):
        resolved(monkeypatch, ["hardware.precision=fp16", "distributed.comm=int8"], device.FP16, device.FP16)


@pytest.mark.parametrize(
    ("capability", "best"),
    [
        ((6, 1), device.NONE),
        ((7, 0), device.FP16),
        ((7, 5), device.FP16),
        ((8, 0), device.BF16),
        ((12, 0), device.BF16),
    ],
)
def test_ability_of_gpus(capability, best, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.ability(GPU) == best


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_70", "sm_90"], False),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((6, 1), ["sm_70", "sm_75", "sm_80"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90"], False),
        ((12, 1), ["sm_100", "sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((9, 0), ["gfx90a"], True),
        ((9, 0), [], True),
    ],
)
def test_whether_a_torch_build_has_code_for_a_card(capability, built, runs):
    assert device.has_code(capability, built) == runs


@pytest.mark.parametrize(
    ("info", "able"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("flags\t\t: fpu amx_bf16\nprocessor : 1\nflags\t\t: fpu avx2\n", False),
        ("Features\t: fp asimd atomics i8mm bf16 sve sve_bf16\n", True),
        ("Features\t: fp asimd sve_bf16_emulated\nmodel name : bf16\n", False),
        ("Features\t: fp asimd atomics fphp asimdhp\n", False),
    ],
)
def test_bf16_of_processors(info, able, tmp_path):
    (tmp_path / "cpuinfo").write_text(info)
    assert machine.has_bf16(machine.cpu_features(tmp_path / "cpuinfo")) == able
    assert not machine.has_bf16(machine.cpu_features(tmp_path / "none"))


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        ("", {"avx512_bf16", "amx_bf16"}),
        ("all", {"avx512_bf16", "amx_bf16"}),
        ("AVX10_1_512_AMX", {"avx512_bf16", "amx_bf16"}),
        ("AVX512_CORE_FP16", {"avx512_bf16"}),
        ("AVX512_CORE_VNNI", set()),
        ("AVX2", set()),
    ],
)
def test_a_processor_that_is_held_back_has_no_bf16(most, kept, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512f avx512_bf16 amx_bf16\n")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert machine.cpu_features(tmp_path / "cpuinfo") == {"avx2", "avx512f"} | kept


@pytest.mark.slow
def test_overflows_are_left_out_and_a_resumed_run_equals_the_undisturbed_one(tiny_data, tmp_path):
    sets = ["epochs=1", "evaluation.tta=false", "checkpoint.keep=9", "log.tensorboard=false"]
    sets += [f"checkpoint.every_steps={CUT_AT}"]
    local = [*sets, "distributed.comm=local-sgd", "distributed.local_sgd_steps=3"]
    trainings = [
        {"name": "whole", "sets": sets, "scaled": True},
        {"name": "resumed", "sets": sets, "scaled": True, "cut": "whole"},
        {"name": "local", "sets": local, "scaled": True},
    ]
    done = train_in_turn(tmp_path, tiny_data, trainings)
    assert done.returncode == 0, done.stderr
    assert weights_hash(tmp_path / "resumed") == weights_hash(tmp_path / "whole")
    assert done.stderr.count("step 2 left out: gradients beyond fp16; the loss scale is now 32768") == 2
    (path,) = (tmp_path / "whole" / "checkpoints").glob(f"step-{CUT_AT:08d}-*.pt")
    saved = checkpoint.load(path)["scaler"]
    assert saved["scale"] == 32768
    assert saved["_growth_tracker"] == CUT_AT - 2, "steps since"
    ranks = [(tmp_path / f"hashes.{rank}").read_text() for rank in range(2)]
    assert ranks[0] == ranks[1]
