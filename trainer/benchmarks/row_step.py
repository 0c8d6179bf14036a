"""Step throughput, two ranks, against plain_ddp.py; and the fraction of the machine's peak at that precision."""

from __future__ import annotations

from harness import Options, peak, plain, sets, shown, spread, train_steps

TITLE = "Step throughput"
COMMAND = "make bench ROWS=step"


def measure(options: Options) -> dict:
    """Both contenders in turn, 32 pixels, 128 images a rank, SGD; images/s of the median step."""
    repetitions, ours_steps, plain_steps, batch = (1, 3, 3, 4) if options.tiny else (3, 6, 5, 128)
    values = {"global_batch": 2 * batch, "micro_batch": batch, "resolution": "[{until: 1.0, pixels: 32}]"}
    values["optimizer__name"] = "sgd"  # the plain script's
    ours, theirs, peaks, flops, precision = [], [], [], 0, ""
    for _ in range(repetitions):
        found = train_steps(options, 2, ours_steps, *sets(**values, hardware__threads=1))
        ours.append(found["batch"] / spread(found["steps"])["median"])
        flops, precision = found["flops"], found["precision"]
        found = plain(options, 2, "--batch", str(batch), "--steps", str(plain_steps))
        theirs.append(found["batch"] / spread(found["steps"])["median"])
        peaks.append(peak(2, precision))
    return {
        "ours": spread(ours),
        "plain": spread(theirs),
        "ratio": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
        "of_peak": spread([a * flops / b for a, b in zip(ours, peaks, strict=True)]),
        "precision": precision,
        "n": repetitions,
    }


def lines(found: dict) -> list[tuple[str, str, str]]:
    """(what, measured, aim)."""
    return [
        ("images/s, two ranks, 32 pixels, 128 a rank, SGD, trainer", shown(found["ours"]), ""),
        ("images/s, plain_ddp.py", shown(found["plain"]), ""),
        ("ratio", shown(found["ratio"], "x"), "2.5x with AVX512-BF16, 1.5x without"),
        (f"fraction of the measured {found['precision']} matmul peak", shown(found["of_peak"]), "0.95; fp32 0.9"),
    ]
