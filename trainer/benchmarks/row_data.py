"""The data path alone, one process and one core each: augmented batches ready to train on."""

from __future__ import annotations

import time

from harness import Options, shown, spread

TITLE = "Data path alone"
COMMAND = "make bench ROWS=data"


def measure(options: Options) -> dict:
    """Batches of 250, 32 pixels: the trainer's, and the DataLoader of plain_ddp.py with one worker."""
    import torch
    from plain_ddp import datasets
    from torch.utils.data import DataLoader

    from k8scifar.data.augment import Images
    from k8scifar.data.packed import read, read_manifest
    from k8scifar.training.cpu import memory

    repetitions, batches, theirs_batches, batch = (1, 2, 2, 20) if options.tiny else (5, 40, 12, 250)
    memory.keep()
    manifest = read_manifest(options.data)
    split = read(options.data, manifest, "train")
    tensors = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    pictures = Images(*tensors, manifest.mean, manifest.std, border=4)
    settings = {"flip": True, "translate": 4, "cutout": 0}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, theirs = [], []
    try:
        for repetition in range(repetitions):
            order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(repetition))
            pictures.augmented(order[:batch], 32, seed=0, epoch=0, **settings)
            begun = time.perf_counter()
            for at in range(batches):
                samples = order[torch.arange(at * batch, (at + 1) * batch) % len(order)]
                pictures.augmented(samples, 32, seed=0, epoch=repetition, **settings)
            ours.append(batches * batch / (time.perf_counter() - begun))
            loader = iter(DataLoader(datasets(options.data, 100)[0], batch, shuffle=True, num_workers=1))
            next(loader), next(loader)
            begun = time.perf_counter()  # what the worker has prefetched by now is counted again at the end
            for _ in range(theirs_batches):
                next(loader)
            theirs.append(theirs_batches * batch / (time.perf_counter() - begun))
            del loader
    finally:
        torch.set_num_threads(threads)
    ratio = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ours": spread(ours), "plain": spread(theirs), "ratio": spread(ratio)}


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    return [
        ("images/s augmented, one core, trainer (flip, shift, normalise)", shown(found["ours"]), ""),
        ("images/s, DataLoader of plain_ddp.py, one worker (the same)", shown(found["plain"]), ""),
        ("ratio", shown(found["ratio"], "x"), "50x"),
    ]
