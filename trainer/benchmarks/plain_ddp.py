"""The script that most DDP tutorials teach, written honestly: what the trainer is measured against.

float32 in torch's default layout, torchvision's transforms image by image in a DataLoader with workers, a
DistributedSampler, SGD with momentum and a cosine, evaluation shared by the ranks. The network is the trainer's
(ResNet-18 with a 3x3 stem) and the data are the same packed images, handed out as PIL images as ImageFolder would.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from k8scifar.compat import import_torchvision
from k8scifar.data.packed import read, read_manifest

import_torchvision()
from torchvision import models, transforms  # noqa: E402


class Images(Dataset):
    """A packed split as PIL images through a transform."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def datasets(folder: Path, interim: int) -> tuple[Images, Images]:
    """Training images, augmented, and evenly spaced test images."""
    manifest = read_manifest(folder)
    normalise = transforms.Normalize(manifest.mean, manifest.std)
    augment = [transforms.RandomCrop(manifest.pixels, padding=4), transforms.RandomHorizontalFlip()]
    train, test = read(folder, manifest, "train"), read(folder, manifest, "test")
    some = np.arange(min(interim, len(test))) * len(test) // min(interim, len(test))
    return (
        Images(train.images, train.labels, transforms.Compose([*augment, transforms.ToTensor(), normalise])),
        Images(test.images[some], test.labels[some], transforms.Compose([transforms.ToTensor(), normalise])),
    )


def network() -> nn.Module:
    """ResNet-18 for small images."""
    net = models.resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


@torch.no_grad()
def evaluate(net: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Test accuracy, the ranks sharing the images."""
    net.eval()
    counts = torch.zeros(2, device=device)
    for images, labels in loader:
        right = (net(images.to(device)).argmax(1) == labels.to(device)).sum()
        counts += torch.stack([right, torch.tensor(len(labels), device=device)])
    dist.all_reduce(counts)
    net.train()
    return (counts[0] / counts[1]).item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=128, help="images a rank")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=0, help="stop after this many")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after this many minutes of training")
    parser.add_argument(
        "--evaluate", type=int, default=0, help="steps from one evaluation to the next, whose time is left out"
    )
    parser.add_argument("--test-pictures", type=int, default=2000, help="evenly spaced, for each evaluation")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    train_set, test_set = datasets(args.data, args.test_pictures)
    sampler = DistributedSampler(train_set)
    loader = DataLoader(
        train_set, args.batch, sampler=sampler, num_workers=args.workers, drop_last=True, persistent_workers=True
    )
    test_loader = DataLoader(test_set, 250, sampler=DistributedSampler(test_set, shuffle=False), num_workers=0)
    net = DistributedDataParallel(network().to(device), device_ids=[device.index] if cuda else None)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
    begun, left_out, step, ended, curve, over = time.time(), 0.0, 0, [], [], False
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            step += 1
            loss.item()
            ended.append(time.time())
            if args.evaluate and step % args.evaluate == 0:
                spent = time.time() - begun - left_out
                curve.append((spent, evaluate(net.module, test_loader, device), step))
                left_out = time.time() - begun - spent
            spent = torch.tensor([time.time() - begun - left_out], dtype=torch.float64, device=device)
            if args.minutes:
                dist.broadcast(spent, 0)
            over = step == args.steps or (args.minutes and spent.item() > 60 * args.minutes)
            if over:
                break
        schedule.step()
        if over:
            break
    if rank == 0:
        steps = [end - start for start, end in itertools.pairwise(ended)]
        found = {"batch": args.batch * dist.get_world_size(), "steps": steps, "curve": curve}
        args.out.write_text(json.dumps(found | {"seconds": ended[-1] - begun - left_out}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
