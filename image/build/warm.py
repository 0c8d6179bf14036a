"""Does once, in small, what training, evaluation and TensorBoard do, and prints the Python files that took.

The image's build compiles these to bytecode: all of the packages' bytecode would be twice as much.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

import compat
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

compat.import_torchvision()

STANDARD = [
    "argparse", "concurrent.futures", "csv", "difflib", "email.message", "glob", "hashlib", "http.client", "json",
    "logging.handlers", "multiprocessing.spawn", "multiprocessing.resource_tracker", "queue", "secrets", "shlex",
    "signal", "sqlite3", "statistics", "tarfile", "uuid", "xml.etree.ElementTree", "zipfile",
]  # fmt: skip
LIBRARIES = [
    "jinja2", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.pyplot",
    "numpy", "PIL.Image", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "pydantic", "safetensors.torch",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.distributed.run", "torch.distributed.elastic.multiprocessing", "torch.multiprocessing",
    "torch.nn.functional", "torch.optim.lr_scheduler", "torch.utils.flop_counter", "torch.utils.tensorboard",
    "torchmetrics.classification", "torchvision.datasets", "torchvision.models", "torchvision.transforms.v2",
    "tqdm", "yaml",
]  # fmt: skip


def configure() -> None:
    """A model of settings, checked and described."""
    import pydantic

    class Settings(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)
        count: int = pydantic.Field(1, ge=1)
        names: list[str] | None = None

        @pydantic.model_validator(mode="after")
        def _whole(self) -> Settings:
            return self

    Settings.model_validate({"count": 2}).model_dump_json()
    Settings.model_json_schema()


def train(folder: Path) -> None:
    """One step of DDP, a checkpoint, weights, a figure, an event file."""
    import matplotlib.pyplot as plt
    import torchmetrics.classification as metrics
    from safetensors.torch import save_file
    from torchvision.models import resnet18
    from torchvision.transforms import v2

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    network = resnet18(num_classes=10).to(memory_format=torch.channels_last)
    network = DistributedDataParallel(network, static_graph=True, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    labels = torch.arange(4)
    pictures = v2.RandomHorizontalFlip()(torch.randn(4, 3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(network(pictures), labels, label_smoothing=0.1)
    loss.backward()
    optimizer.step()
    accuracy = metrics.MulticlassAccuracy(10)
    accuracy.update(network(pictures).detach().float(), labels)
    accuracy.compute()
    torch.save({"model": network.module.state_dict(), "random": torch.get_rng_state()}, folder / "checkpoint.pt")
    torch.load(folder / "checkpoint.pt", weights_only=True)
    save_file({"weight": network.module.fc.weight}, folder / "model.safetensors")
    figure, axes = plt.subplots()
    figure.colorbar(axes.imshow(torch.rand(4, 4)))
    axes.text(0, 0, "text")
    figure.savefig(io.BytesIO(), format="png")
    with SummaryWriter(folder / "events") as writer:
        writer.add_scalar("loss", 1.0, 0)
        writer.add_text("text", "text")
        writer.add_image("picture", torch.rand(3, 8, 8), 0)
        writer.add_figure("figure", figure, 0)
    dist.destroy_process_group()


def tensorboard(folder: Path) -> None:
    """Serve the event file and fetch the list of runs."""
    from tensorboard import program

    server = program.TensorBoard()
    server.configure(argv=["tensorboard", "--logdir", str(folder), "--port", "0", "--load_fast", "false"])
    with urllib.request.urlopen(server.launch() + "data/runs", timeout=30) as answer:
        answer.read()


def main() -> None:
    files = os.dup(1)
    os.dup2(2, 1)  # what the libraries print is not the list of files
    for name in STANDARD + LIBRARIES:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        configure()
        train(Path(folder))
        tensorboard(Path(folder))
        found = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    with os.fdopen(files, "w") as output:
        # Some of torch's modules name a file that is not there.
        files_found = sorted(name for name in filter(None, found) if name.endswith(".py") and os.path.isabs(name))
        output.writelines(f"{name}\n" for name in files_found)
        output.flush()
    os._exit(0)  # TensorBoard's server thread has no stop


if __name__ == "__main__":
    main()
