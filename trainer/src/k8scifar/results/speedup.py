"""Was the second machine worth it: what several machines came to together, beside what each would have alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def gathered(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The epochs' records of speed as one, medians; None where there was one machine, or nothing to compare.

    Of a run whose machines have changed, the last ones' count. Keys: pixels; alone [nodes], images/s; together,
    images/s; network, the fraction of the time that all waited for it; shares [ranks], micro-batches.
    """
    found = [record["speed"] for record in history if "speed" in record]
    if not found:
        return None
    last = found[-1]
    found = [each for each in found if each["pixels"] == last["pixels"] and len(each["alone"]) == len(last["alone"])]
    return last | {key: statistics.median(each[key] for each in found) for key in ("together", "network")}


def sentence(speed: dict[str, Any]) -> str:
    """What it came to, in one sentence."""
    alone, together = speed["alone"], speed["together"]
    machines = WORDS[len(alone)] if len(alone) < len(WORDS) else str(len(alone))
    told = [f"{each:,.0f}" for each in alone]
    rates = f"{', '.join(told[:-1])} and {told[-1]}" if len(alone) <= 8 else f"{min(alone):,.0f} to {max(alone):,.0f}"
    return (
        f"{machines} machines trained {together / max(alone):.1f} times as fast as the faster one alone: "
        f"{rates} images/s alone, {together:,.0f} together; "
        f"{speed['network'] * 100:.0f} % of the time waiting for the network (at {speed['pixels']} pixels)"
    )
