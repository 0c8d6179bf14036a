"""The CPU's convolutions: torch's results, and the same form for the same shapes."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from k8scifar import machine
from k8scifar.config.sections import Model
from k8scifar.training import model
from k8scifar.training.cpu import convolution, winograd

ALWAYS, NEVER = (0, 0), (10**9, 10**9)


@pytest.fixture
def forms(monkeypatch):
    """Set the channels a pixel from which products are used, and the channels from which Winograd's form is."""
    monkeypatch.setattr(convolution, "MEASURED", True)

    def settle(form: tuple[int, int], fewest: float = math.inf) -> None:
        monkeypatch.setattr(convolution, "FEW", dict.fromkeys(convolution.FEW, form))
        monkeypatch.setattr(convolution, "WINOGRAD", dict.fromkeys(convolution.WINOGRAD, fewest))

    return settle


def results(layer: nn.Conv2d, images: torch.Tensor) -> list[torch.Tensor]:
    """A layer's output, and the gradients of the images and the weights."""
    out = layer(images)
    torch.manual_seed(2)
    return [out, *torch.autograd.grad(out, (images, layer.weight), torch.randn_like(out))]


@pytest.mark.parametrize("form", [ALWAYS, (10**9, 0)], ids=["everywhere", "weights"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (2, 4), (3, 3), (5, 4), (7, 7)])
def test_outputs_and_gradients_are_those_of_torch(forms, form, stride, size):
    torch.manual_seed(1)
    own = nn.Conv2d(6, 10, 3, stride, 1, bias=False).double().to(memory_format=torch.channels_last)
    images = torch.randn(3, 6, *size, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    forms(form)
    for mine, torchs in zip(results(convolution.Convolution(own), images), results(own, images), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-12)
        assert mine.stride() == torchs.stride()  # the gradients are views into DDP's buckets


@pytest.mark.parametrize("at_once", [1, 20_000, winograd.AT_ONCE])
@pytest.mark.parametrize("size", [(2, 2), (2, 5), (3, 3), (4, 4), (7, 6), (8, 9), (16, 16)])
def test_with_fewer_multiplications_they_are_also_those_of_torch(forms, monkeypatch, size, at_once):
    """Tiles of 2, 3 and 4 pixels, whole and cut, and images one by one, several and all together."""
    torch.manual_seed(1)
    monkeypatch.setattr(winograd, "AT_ONCE", at_once)
    own = nn.Conv2d(6, 10, 3, 1, 1, bias=False).double().to(memory_format=torch.channels_last)
    images = torch.randn(3, 6, *size, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    forms(NEVER, fewest=1)
    taken = convolution.Convolution(own)
    assert type(taken(images).grad_fn).__name__ == "_WinogradBackward"
    for mine, torchs in zip(results(taken, images), results(own, images), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-11, atol=1e-11)
        assert mine.stride() == torchs.stride()


def test_fewer_multiplications_cost_little_precision(forms):
    """About eight times the rounding error of torch's form in float32; that of bf16 is a thousand times larger."""
    torch.manual_seed(1)
    own = nn.Conv2d(64, 64, 3, 1, 1, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(8, 64, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    forms(NEVER, fewest=1)
    mine, torchs = results(convolution.Convolution(own), images), results(own, images)
    exact = results(own.double(), images.detach().double().requires_grad_())
    for one, other, true in zip(mine, torchs, exact, strict=True):
        lost, torchs_lost = (one - true).norm() / true.norm(), (other - true).norm() / true.norm()
        assert 0 < torchs_lost < lost < 4e-6, (lost, torchs_lost)


@pytest.mark.parametrize("fewest", [1, math.inf], ids=["fewer multiplications", "products"])
def test_in_bf16_both_forms_round_alike(forms, fewest):
    """Both are equally near to the float32 result."""
    torch.manual_seed(1)
    own = nn.Conv2d(64, 128, 3, 1, 1, bias=False).to(memory_format=torch.channels_last)
    mine = convolution.Convolution(own)
    images = torch.randn(16, 64, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    exact = results(own, images)
    forms(ALWAYS, fewest)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, torchs = results(mine, images), results(own, images)
    for one, other, true in zip(rounded, torchs, exact, strict=True):
        assert one.dtype == other.dtype
        assert (one - true).norm() < 1.5 * (other - true).norm() + 1e-6
    assert not torch.equal(rounded[0], exact[0])


def test_only_the_plain_3x3_convolutions_take_it_and_the_weights_stay():
    torch.manual_seed(0)
    fitted = model.build(Model(), 10)
    torch.manual_seed(0)
    plain = model.build(Model(), 10, products=False)
    assert sum(isinstance(layer, convolution.Convolution) for layer in fitted.modules()) == 17
    assert not any(isinstance(layer, convolution.Convolution) for layer in plain.modules())
    kept = plain.state_dict()
    assert list(fitted.state_dict()) == list(kept)
    assert all(torch.equal(value, kept[name]) for name, value in fitted.state_dict().items())


def test_the_form_depends_on_shape_and_precision_alone(forms, monkeypatch):
    taken = []
    patches = convolution.patches
    monkeypatch.setattr(convolution, "MEASURED", True)
    monkeypatch.setattr(convolution, "kind", lambda dtype: "fp32")
    fewer = []
    monkeypatch.setattr(convolution.winograd, "convolve", lambda images, _: fewer.append(1) or images)
    monkeypatch.setattr(convolution, "patches", lambda images, stride: taken.append(1) or patches(images, stride))
    layer = convolution.Convolution(nn.Conv2d(8, 64, 3, 1, 1, bias=False))
    for pixels, product in ((1, True), (2, False), (8, False)):  # 64, 16 and 1 channels a pixel, of 32 wanted
        taken.clear()
        layer(torch.randn(2, 8, pixels, pixels))
        assert bool(taken) == product, pixels
    assert not fewer, "8 channels are too few"
    for stride, channels, pixels, form in ((1, 64, 2, True), (1, 64, 1, False), (2, 64, 8, False), (1, 32, 8, False)):
        fewer.clear()
        layer = convolution.Convolution(nn.Conv2d(channels, 64, 3, stride, 1, bias=False))
        layer(torch.randn(2, channels, pixels, pixels))
        assert bool(fewer) == form, (stride, channels, pixels)


@pytest.mark.parametrize(
    ("vendor", "features", "most", "kind"),
    [
        ("GenuineIntel", "amx_bf16 avx512_bf16", "ALL", "fast bf16"),
        ("GenuineIntel", "amx_bf16 avx512_bf16", "AVX512_CORE_BF16", "slow bf16"),
        ("GenuineIntel", "avx512_bf16", "ALL", "slow bf16"),
        ("AuthenticAMD", "avx512_bf16", "ALL", "fast bf16"),
        ("AuthenticAMD", "avx512_bf16", "AVX512_CORE_BF16", "fast bf16"),
        ("AuthenticAMD", "avx2", "ALL", "slow bf16"),
    ],
)
def test_features_of_the_processor_decide(monkeypatch, tmp_path, vendor, features, most, kind):
    convolution._fast_bf16.cache_clear()
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\nflags\t\t: {features}\n")
    found = functools.partial(machine.fast_bf16, tmp_path / "cpuinfo")
    monkeypatch.setattr(convolution.machine, "fast_bf16", found)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert convolution.kind(torch.bfloat16) == kind
    assert convolution.kind(torch.float32) == "fp32"
    convolution._fast_bf16.cache_clear()


def test_a_machine_without_cpuinfo_has_no_fast_bf16(tmp_path):
    assert not machine.fast_bf16(tmp_path / "none")
