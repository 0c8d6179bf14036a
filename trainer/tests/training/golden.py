"""Losses of tiny trainings, kept in golden.json: what computes may change, the mathematics may not. `make golden`.

golden.py writes the file anew and says what changed; golden.py --print only prints what it measures, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

PATH = Path(__file__).with_name("golden.json")
STEPS = 6
TRAININGS = [(optimizer, precision) for optimizer in ("sgd", "muon") for precision in ("fp32", "bf16")]
# Greatest relative difference of a loss between machines and releases of torch: rounding, amplified by the steps.
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}
SETS = [
    "epochs=1", "global_batch=100", "micro_batch=50", "optimizer.lr=0.002", "optimizer.muon_lr=0.002",
    "optimizer.norm_bias_lr=1.0",
    "resolution=[{until: 0.5, pixels: 8}, {until: 1.0, pixels: 12}]", "label_smoothing=0.1",
    "evaluation.tta=false", "evaluation.every_epochs=0", "checkpoint.every_seconds=0", "log.tensorboard=false",
    "hardware.device=cpu", "hardware.threads=1",
]  # fmt: skip


def measure() -> dict[str, list[float]]:
    """The losses of each training's steps, on one rank of this machine; bf16 where it has that in hardware.

    Emulated, bf16 takes minutes.
    """
    from k8scifar import machine
    from k8scifar.cli import main
    from k8scifar.data.prepare import prepare
    from k8scifar.results.display import Display

    losses: list[float] = []
    shown = Display.step

    def step(display, number, loss, *rest):
        losses.append(float(f"{loss():.7g}"))
        shown(display, number, loss, *rest)

    Display.step = step
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), "synthetic:600:100")
        for optimizer, precision in TRAININGS:
            if precision == "bf16" and not machine.has_bf16(machine.cpu_features()):
                continue
            losses.clear()
            name = f"{optimizer}.{precision}"
            sets = [*SETS, f"optimizer.name={optimizer}", f"hardware.precision={precision}"]
            options = [part for value in sets for part in ("--set", value)]
            if main(["train", *options, "--data-dir", folder, "--runs-dir", f"{folder}/runs", "--name", name]):
                raise SystemExit(f"training {name} failed")
            found[name] = list(losses)
    return found


def computer() -> dict[str, str]:
    """What measured."""
    import torch

    return {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}


def differences(before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, float]:
    """The greatest relative difference of each training; infinite where one lacks it or has other steps."""
    found = {}
    for name in before | after:
        pair = before.get(name, []), after.get(name, [])
        same = len(pair[0]) == len(pair[1]) > 0
        found[name] = max(abs(b - a) / abs(a) for a, b in zip(*pair, strict=True)) if same else float("inf")
    return found


def main() -> int:
    """Renew the file, or print."""
    for name in ("RANK", "WORLD_SIZE"):  # one rank
        os.environ.pop(name, None)
    found = measure()
    if "--print" in sys.argv:
        print(json.dumps(found))
        return 0
    if len(found) < len(TRAININGS):
        print("error: this processor has no bf16; run make golden on one that has", file=sys.stderr)
        return 1
    former = json.loads(PATH.read_text()) if PATH.exists() else {"losses": {}}
    PATH.write_text(json.dumps({"made with": computer(), "tolerance": TOLERANCE, "losses": found}, indent=1) + "\n")
    print(f"former: {former.get('made with', 'none')}; now: {computer()}")
    for name, value in differences(former["losses"], found).items():
        limit = TOLERANCE[name.partition(".")[2]]
        verdict = "unchanged" if value == 0 else "within tolerance" if value <= limit else "ANOTHER MATHEMATICS"
        print(f"{name}: greatest relative difference {value:.2g}, {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
