"""`k8scifar predict`: print the most probable classes of images of any size."""

from __future__ import annotations

import argparse
import json

import torch

from k8scifar.data.augment import Images
from k8scifar.data.reading.decode import decode
from k8scifar.data.reading.tree import read_image
from k8scifar.inference.trained import Trained, open_model
from k8scifar.urls import local

TOP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of `k8scifar predict`."""
    parser.add_argument("checkpoint", help="a checkpoint (.pt), exported weights (.safetensors) or a run folder")
    parser.add_argument("images", nargs="+", metavar="image", help="image files of any size")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """`k8scifar predict`."""
    trained = open_model(local(args.checkpoint))
    results = [{"image": name, "top": predict(trained, read_image(name), name)} for name in args.images]
    if args.json:
        print(json.dumps(results))
        return 0
    for result in results:
        print(f"{result['image']}: " + ", ".join(f"{top['class']} {top['probability']:.1%}" for top in result["top"]))
    return 0


@torch.inference_mode()
def predict(trained: Trained, content: bytes, name: str) -> list[dict[str, float | str]]:
    """The most probable classes of an image, from its file's bytes. Raises UserError if it is not an image."""
    image = torch.tensor(decode(content, name))[None]
    images = Images(image, torch.zeros(1, dtype=torch.int64), trained.mean, trained.std)
    logits = trained.net(images.plain(torch.tensor([0]), trained.pixels))
    best = logits.softmax(1)[0].topk(min(TOP, len(trained.classes)))
    return [
        {"class": trained.classes[index], "probability": round(probability, 6)}
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
