"""What three ranks agree on: flags that any raises, means, a mistake of one that is everybody's, facts that differ."""

from __future__ import annotations

import json
import sys

from runs import HELPERS, run


def test_three_ranks_see_alike(tmp_path):
    done = run([sys.executable, str(HELPERS / "agree_ranks.py"), str(tmp_path)], timeout=60)
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "agreed": ["save", "stop"],
            "nothing": [],
            "mean": [1.0, 1.0, 3.0, 3.0],
            "each": [None, 10, 20],
            "mistake": "refused",
            "differ": "refused",
            "evaluated": True,
            "passes": [4, 2, 1][rank],  # rounds of two batches of rank 0, and one of each other
            "broadcast": "from 1",
        }
