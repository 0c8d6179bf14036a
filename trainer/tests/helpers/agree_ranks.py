"""Three ranks of test_agree.py, forked: one import of torch. Each leaves what it saw as RANK.json in a folder."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from k8scifar.compat import import_torchvision
from k8scifar.data.augment import Images
from k8scifar.errors import TrainingError, UserError
from k8scifar.ranks import agree
from k8scifar.ranks.heartbeats import Pulse
from k8scifar.ranks.world import World
from k8scifar.training.evaluation import evaluate

RANKS = 3


def fail(rank: int):
    """What each rank does for `agree.each`: rank 1 meets a user's mistake."""
    if rank == 1:
        raise UserError("no data there")
    return rank


def evaluation(world: World) -> dict[str, Any]:
    """Seven batches of two images by a linear model, rank 0 twice as fast as the others."""
    torch.manual_seed(0)
    net, passes = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)), []
    net.register_forward_hook(lambda *_: passes.append(1))
    images = Images(torch.randint(0, 256, (13, 8, 8, 3), dtype=torch.uint8), torch.arange(13) % 3, [0.5] * 3, [0.2] * 3)
    found = evaluate(net, images, world, classes=3, pixels=8, batch=2, turns=[2, 1, 1])
    alone = net(images.plain(torch.arange(13), 8))
    losses = F.cross_entropy(alone, images.labels, reduction="none")
    right = (alone.argmax(1) == images.labels).float().mean().item()
    same = torch.allclose(found.losses, losses.double(), atol=1e-5) and abs(found.figures["accuracy"] - right) < 1e-6
    return {"evaluated": same and found.samples.tolist() == list(range(13)), "passes": len(passes) - 1}


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    world = World(rank, RANKS, rank, RANKS, torch.device("cpu"), "gloo", None, Pulse(rank, RANKS), 30.0)
    seen = {}
    flags = agree.Agreement(world, ("stop", "save", "bad"))
    seen["agreed"] = sorted(flags.now(stop=rank == 2, save=rank == 0))
    seen["nothing"] = sorted(flags.now())
    tensors = [torch.tensor([float(rank), 1.0]), torch.full((1, 2), 3.0 * rank)]
    agree.average(tensors, world)
    seen["mean"] = torch.cat([tensor.flatten() for tensor in tensors]).tolist()
    seen["each"] = agree.each(world, (lambda: rank * 10) if rank else None)
    for name, kind, call in (
        ("mistake", UserError, lambda: agree.each(world, lambda: fail(rank))),
        ("differ", TrainingError, lambda: agree.meet(world, {"torch": "2.4" if rank == 2 else "2.5", "data": "x"})),
    ):
        with contextlib.suppress(kind):
            call()
            seen[name] = "passed"
        seen.setdefault(name, "refused")
    agree.meet(world, {"data": "x"})
    seen |= evaluation(world)
    seen["broadcast"] = agree.broadcast(b"from 1" if rank == 1 else b"", 1, world).decode()
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    import_torchvision()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=main, args=(rank, sys.argv[1])) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
