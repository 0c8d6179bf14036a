"""Convolutions as training/cpu/convolution.py has them against torch's own: steps of one core, in turn."""

from __future__ import annotations

import time

from harness import Options, shown, spread

TITLE = "Convolutions in other forms than torch's"
COMMAND = "make bench ROWS=products"


def measure(options: Options) -> dict:
    """Forward and backward of ResNet-18, 125 images, bf16 where the processor has it."""
    import torch
    import torch.nn.functional as F

    from k8scifar import machine
    from k8scifar.config.sections import Model
    from k8scifar.training import model
    from k8scifar.training.cpu import memory

    repetitions, images, sizes = (1, 4, (8,)) if options.tiny else (3, 125, (16, 20, 24, 32))
    memory.keep()
    bf16 = machine.has_bf16(machine.cpu_features())
    nets = {form: model.build(Model(), 10, products=form == "products") for form in ("torch", "products")}
    labels = torch.arange(images) % 10
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict] = {}
    try:
        for pixels in sizes:
            inputs = torch.randn(images, 3, pixels, pixels).to(memory_format=torch.channels_last)
            seconds: dict[str, list[float]] = {form: [] for form in nets}
            for repetition in range(repetitions + 1):
                for form, net in nets.items():
                    begun = time.perf_counter()
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        logits = net(inputs)
                    F.cross_entropy(logits.float(), labels).backward()
                    if repetition:  # the first one warms up
                        seconds[form].append(time.perf_counter() - begun)
            ratios = [old / new for old, new in zip(seconds["torch"], seconds["products"], strict=True)]
            rates = [images / value for value in seconds["products"]]
            found[str(pixels)] = {"ratio": spread(ratios), "images_per_second": spread(rates)}
    finally:
        torch.set_num_threads(threads)
    return {"precision": "bf16" if bf16 else "fp32", "pixels": found}


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    return [
        (
            f"{pixels} pixels, {found['precision']}, one core: images/s over those with torch's own forms",
            f"{shown(run['ratio'], 'x')}; {shown(run['images_per_second'])} images/s",
            "",
        )
        for pixels, run in found["pixels"].items()
    ]
