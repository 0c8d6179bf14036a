"""What the first 20 steps of recipes come to, kept in golden.json: rounding may change it, nothing else may.

golden.py (`make golden`) writes the file anew and says what changed; golden.py --print NAME... prints those trainings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("golden.json")
REPOSITORY = PATH.parents[3]
# Two processes side by side take every other one, and so the same time.
TRAININGS = ["demo.fp32", "quick.fp32", "quick.bf16", "demo.bf16", "standard.fp32", "standard.bf16"]
STEPS = 20  # whose losses, images and rates are kept
FIRST = 3  # steps of which the rest is kept
MICRO_BATCH = 20
# All else is the recipe's own. As in a real training these are the first of several hundred steps.
SETS = [
    "epochs=200", f"global_batch={2 * MICRO_BATCH}", f"micro_batch={MICRO_BATCH}",
    "resolution=[{until: 0.025, pixels: 8}, {until: 1.0, pixels: 12}]",
    "checkpoint.every_epochs=99", "checkpoint.every_seconds=0", "evaluation.every_epochs=0", "log.tensorboard=false",
    "hardware.device=cpu", "hardware.threads=1",
]  # fmt: skip
DATA = "synthetic:90:20"  # two steps an epoch, ten images left out
# What stands for other machines: environment and arguments of golden.py. AVX2 and less take no bf16.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
VARIANTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "AVX2": (AVX2, []),
    "no vector instructions": ({"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, []),
    "torch's AVX2, oneDNN's AVX512": ({"ATEN_CPU_CAPABILITY": "avx2"}, []),
    "torch's own forms of convolution": ({}, ["--set", "hardware.products=false"]),
    "forms for slow bf16": ({}, ["--slow-bf16"]),
    "two threads": ({}, ["--set", "hardware.threads=2"]),
    "first weights' last bits": ({}, ["--nudge", "1"]),
}
VERSIONS = (".venv-oldest", ".venv-newest")  # `make test-versions` builds them
FACTOR = 3.0  # times the greatest difference between variants: another machine may differ by as much
FLOOR = 1e-6  # of the differences: seven digits are kept

Series = dict[str, list[float]]


class Done(Exception):
    """The steps are done."""


def measure(names: list[str], sets: list[str]) -> dict[str, Series]:
    """What the steps of each training come to, on one rank of this machine."""
    import torch

    from k8scifar.cli import main
    from k8scifar.data.prepare import prepare
    from k8scifar.results.display import Display
    from k8scifar.training import loop

    found: dict[str, Series] = {}
    shown = Display.step

    def note(series: str, value: float) -> None:
        found[name].setdefault(series, []).append(float(f"{value:.7g}"))

    def step(display, number, loss, lr, inputs, *rest):
        note("loss", loss())
        squares = inputs[-MICRO_BATCH:].double().flatten() ** 2  # a pass may be of several micro-batches
        note("images", squares.mul(torch.arange(len(squares))).mean().item())  # mirrored, they give another number
        if number == STEPS:
            raise Done
        shown(display, number, loss, lr, inputs, *rest)

    Display.step, loop.update = step, noted(loop.update, note)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), DATA)
        for name in names:
            found[name] = {}
            recipe, _, precision = name.partition(".")
            options = [part for value in [*SETS, f"hardware.precision={precision}", *sets] for part in ("--set", value)]
            where = ["--recipe", recipe, "--data-dir", folder, "--runs-dir", f"{folder}/runs", "--name", name]
            with contextlib.suppress(Done):
                main(["train", *where, *options])
                raise SystemExit(f"training {name} failed")
    return found


def noted(update: Callable[[Any], None], note: Callable[[str, float], None]) -> Callable[[Any], None]:
    """`update` of the loop, with notes: the rate; of first steps gradient, statistics, how each group of weights moves.

    Outward: the cosine of the angle between update and weights, for weight decay points inward.
    """
    import torch

    def norm(tensors: list[torch.Tensor]) -> float:
        return torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm().item()

    def wrapper(session: Any) -> None:
        note("rate", session.state.optimizer.param_groups[0]["lr"])
        if session.state.step >= FIRST:
            return update(session)
        net = session.state.net
        note("gradient", norm([parameter.grad for parameter in net.parameters()]))
        note("statistics", norm(session.state.statistics.running()))
        before = {name: torch.cat([weight.detach().flatten() for weight in group]) for name, group in groups(net)}
        update(session)
        for name, group in groups(net):
            old = before[name].double()
            change = torch.cat([weight.detach().flatten() for weight in group]).double() - old
            moved, size = norm([change]), norm([old])
            note(f"{name}: update", moved)
            note(f"{name}: outward", (change @ old).item() / (moved * size))
        return None

    return wrapper


def groups(net: Any) -> list[tuple[str, list[Any]]]:
    """The weights by how a recipe may treat them."""
    found: dict[str, list[Any]] = {}
    for name, weight in net.named_parameters():
        matrix = "ends" if name in ("conv1.weight", "fc.weight") else "convolutions"
        vector = "biases" if name.endswith("bias") else "scales"
        found.setdefault(matrix if weight.ndim > 1 else vector, []).append(weight)
    return list(found.items())


def measured(python: str = sys.executable, environment: dict[str, str] | None = None, options: list[str] | None = None):
    """What `--print` prints, of two processes side by side."""
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""} | (environment or {})
    surroundings = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | own
    command = [python, str(Path(__file__)), *(options or []), "--print"]
    running = [
        subprocess.Popen([*command, *part], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings)
        for part in (TRAININGS[::2], TRAININGS[1::2])
    ]
    found: dict[str, Any] = {}
    for process, (out, said) in [(process, process.communicate()) for process in running]:
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{said}")
        part = json.loads(out)
        found = part | {"steps": found.get("steps", {}) | part["steps"]}
    return found


def gap(series: str, before: float, after: float) -> float:
    """How far two values are apart: relative to the former, but for cosines."""
    return abs(after - before) / (1.0 if series.endswith("outward") else abs(before))


def spread(kept: dict[str, Series], others: list[dict[str, Series]]) -> dict[str, Series]:
    """The greatest gap of a precision's trainings in each series, up to each step, rounded up to two digits."""
    found: dict[str, Series] = {}
    for training, all_series in kept.items():
        group = found.setdefault(training.partition(".")[2], {})
        for series, values in all_series.items():
            gaps = group.setdefault(series, [FLOOR] * len(values))
            for after in [other[training][series] for other in others if training in other]:
                gaps[:] = [max(gap(series, *pair), wide) for *pair, wide in zip(values, after, gaps, strict=True)]
    return {
        precision: {name: [float(f"{1.05 * gap:.1e}") for gap in accumulate(gaps, max)] for name, gaps in group.items()}
        for precision, group in found.items()
    }


def beyond(kept: dict[str, Any], name: str, found: Series) -> dict[str, float]:
    """How many times the tolerance a training is away, at "series, step"; infinite where it has other steps."""
    away = {}
    tolerances = kept["spread"][name.partition(".")[2]]
    for series in kept["steps"][name] | found:
        before, after = kept["steps"][name].get(series, []), found.get(series, [])
        if len(before) != len(after):
            away[f"{series}, all"] = float("inf")
            continue
        for step, (*pair, wide) in enumerate(zip(before, after, tolerances[series], strict=True), 1):
            away[f"{series}, {step}"] = gap(series, *pair) / (kept["factor"] * wide)
    return away


def computer() -> dict[str, str]:
    """What measures."""
    import torch

    return {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}


def pretend(slow_bf16: bool, nudge: int) -> None:
    """Take the forms of a processor that is slow in bf16; change the first weights' last bits by this seed."""
    import torch

    from k8scifar import machine
    from k8scifar.training import model

    build = model.build

    def nudged(*arguments: Any) -> Any:
        net, generator = build(*arguments), torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for weight in net.parameters():
                weight *= 1 + 2.0**-23 * torch.randint(-1, 2, weight.shape, generator=generator)
        return net

    if slow_bf16:
        machine.fast_bf16 = lambda: False
    if nudge:
        model.build = nudged


def renew() -> int:
    """Write the file anew, the spread with it, and say what has changed."""
    now = measured()
    if len(now["steps"]) < len(TRAININGS):
        print("error: this processor has no bf16; run make golden on one that has", file=sys.stderr)
        return 1
    former = json.loads(PATH.read_text()) if PATH.exists() else {}
    print(f"former: {former.get('made with', 'none')}; now: {now['made with']}")
    for name in former.get("steps", {}):
        where, times = max(beyond(former, name, now["steps"].get(name, {})).items(), key=lambda pair: pair[1])
        print(f"{name}: {where}: {times:.2g} of the tolerance{', ANOTHER MATHEMATICS' if times > 1 else ''}")
    others = {}
    for name, (environment, options) in VARIANTS.items():
        others[name] = measured(environment=environment, options=options)
    for path in [REPOSITORY / folder / "bin/python" for folder in VERSIONS]:
        if path.exists():
            version = measured(str(path))
            others[f"torch {version['made with']['torch']}"] = version
        else:
            print(f"NOTICE: the spread leaves out {path}, which make test-versions builds")
    steps = {name: other["steps"] for name, other in others.items()}
    for name, other in steps.items():
        widest = spread(now["steps"], [other])
        print(f"{name}: losses differ by", {precision: group["loss"] for precision, group in widest.items()})
    kept = {"made with": now["made with"], "factor": FACTOR, "spread from": list(others)}
    kept |= {"spread": spread(now["steps"], list(steps.values())), "steps": now["steps"]}
    text = json.dumps(kept, indent=1)
    PATH.write_text(
        re.sub(r"\[[^\[\]]*\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
        + "\n"
    )
    return 0


def main() -> int:
    """Renew the file, or print what trainings come to; in bf16 where this processor has it, for emulation is slow."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--print", nargs="+", metavar="NAME")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--slow-bf16", action="store_true")
    parser.add_argument("--nudge", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.print:
        return renew()
    from k8scifar import machine

    has_bf16 = machine.has_bf16(machine.cpu_features())
    pretend(arguments.slow_bf16, arguments.nudge)
    names = [name for name in arguments.print if has_bf16 or name.endswith("fp32")]
    print(json.dumps({"made with": computer(), "steps": measure(names, arguments.set)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
