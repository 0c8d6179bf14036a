"""Which images an accuracy is of: test images, or training images that were held out (data.holdout).

Records and summaries say it by the names of their keys, so that nobody takes the one for the other.
"""

from __future__ import annotations

from typing import Any

PREFIXES = {"test": "test_", "held-out": "heldout_"}  # word for people -> how its keys begin


def word(held: int) -> str:
    """What the evaluation's images are called where so many are held out."""
    return "held-out" if held else "test"


def word_of(record: dict[str, Any]) -> str:
    """What the images are called whose accuracy is in this record (summary, epoch)."""
    return word(any(key.startswith(PREFIXES["held-out"]) for key in record))


def figure(record: dict[str, Any], name: str) -> Any:
    """A figure (accuracy, loss, images) of the evaluation in this record (summary, epoch), None where there is none."""
    return record.get(PREFIXES[word_of(record)] + name)


def best_first(history: list[dict[str, Any]]) -> list[int]:
    """The steps of the epochs that were evaluated, those of the highest accuracy first, of equal ones the earliest."""
    scored = [(accuracy, -record["step"]) for record in history if (accuracy := figure(record, "accuracy")) is not None]
    return [-step for _, step in sorted(scored, reverse=True)]
