"""Owners of matrices: three ranks with unequal shares step as one would, also when the owners change."""

from __future__ import annotations

import sys

import torch
from runs import HELPERS, run

from k8scifar.exchange.formats import Int8 as Bytes
from k8scifar.exchange.owners import divide


def test_three_ranks_step_as_one_and_lose_nothing_when_owners_change(tmp_path):
    """Exactly, and as bytes with remainders; the assertions are in the ranks."""
    done = run([sys.executable, str(HELPERS / "owner_ranks.py"), str(tmp_path)], timeout=120)
    assert done.returncode == 0, done.stderr


def test_byte_format_keeps_what_it_rounds_off_and_tells_what_is_not_finite():
    form, generator = Bytes(), torch.Generator().manual_seed(3)
    rest, total, sent = torch.zeros(5, 7, dtype=torch.bfloat16), torch.zeros(5, 7), torch.zeros(5, 7)
    for _ in range(4):
        matrix = torch.randn(5, 7, generator=generator)
        matrix[2] = 0
        out, half = torch.empty(form.size(5, 7), dtype=torch.uint8), (matrix + rest).abs().amax(1, keepdim=True) / 254
        form.write(matrix, 0.5, rest, out)
        assert (rest.abs() <= 1.01 * half).all(), "rounded to the nearest"
        form.add(out, sent)
        total += matrix
    assert rest.abs().max() > 0 and not rest[2].any()
    torch.testing.assert_close(2 * sent + rest, total, rtol=1e-4, atol=1e-4)
    assert rest.abs().max() < total.abs().max() / 50
    for bad in (torch.nan, torch.inf, -torch.inf):
        matrix[0, 3] = bad
        form.write(matrix, 1.0, torch.zeros(5, 7, dtype=torch.bfloat16), out)
        read = torch.empty(5, 7)
        form.read(out, read)
        assert not read[0].isfinite().all() and read[1:].isfinite().all()


def test_a_row_whose_gradients_have_died_stays_finite():
    """What is rounded off it shrinks from step to step, to numbers whose inverse is infinite."""
    form, matrix, rest = Bytes(), torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bfloat16)
    matrix[0] = torch.linspace(-1.0, 1.0, 8)
    sent, found = torch.empty(form.size(2, 8), dtype=torch.uint8), torch.empty(2, 8)
    for step in range(40):
        form.write(matrix, 1.0, rest, sent)
        form.read(sent, found)
        assert found.isfinite().all() and rest.isfinite().all(), step
        matrix.zero_()
    assert rest.abs().max() < 1e-20, "the steps come to where it matters"


def test_owners_weigh_bytes_and_work_and_speed():
    assert divide([4e9, 1e9, 1e9, 1e9, 1e9], [10] * 5, [1.0, 1.0]) == [0, 1, 1, 1, 1]
    assert divide([1.0] * 4, [4_000_000, 1_000_000, 1_000_000, 2_000_000], [1.0, 1.0]) == [0, 1, 1, 1]
    assert divide([3e9] * 4, [1] * 4, [3.0, 1.0]).count(0) == 3
    assert divide([1.0] * 4, [1_000_000] * 4, [3.0, 1.0]).count(0) == 2, "the wire of a fast rank is no faster"
