"""The list of deliberate mistakes fits the code; `make mutants` makes them, and its verdicts are these."""

from __future__ import annotations

import mutants
import pytest


def test_each_mistake_can_be_made_and_its_test_exists():
    found = mutants.load()
    assert len(found) >= 50
    assert len({each.name for each in found}) == len(found)
    assert {each.name: fault for each in found if (fault := each.fault())} == {}


@pytest.mark.parametrize(
    ("code", "output", "became"),
    [
        (1, "1 failed in 2.00s", "caught"),
        (1, "+++++ Timeout +++++", "caught (time-out)"),
        (0, "1 passed", "LIVES"),
        (2, "1 error during collection", "LIVES (pytest ended with 2)"),
        (5, "1 deselected", "LIVES (pytest ended with 5)"),
        (None, "", "LIVES (pytest ended with None)"),
    ],
)
def test_verdicts(code, output, became):
    assert mutants.verdict(code, output) == became


def test_a_test_that_skips_or_fails_without_the_mistake_catches_nothing():
    assert mutants.passes(0, "3 passed in 1.00s") == ""
    assert mutants.passes(0, "2 passed, 1 skipped in 1.00s") == "skips"
    assert mutants.passes(1, "1 failed") == "fails without the mistake (pytest ended with 1)"
