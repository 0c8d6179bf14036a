"""One rank of test_compile.py, under torchrun: train with OPTIONS and count the graphs.

Arguments: FILE OPTIONS... Each rank writes the number of torch.compile's graphs to FILE.RANK.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from k8scifar.cli import main

if __name__ == "__main__":
    code = main(["train", *sys.argv[2:]])
    from torch._dynamo.utils import counters

    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(str(counters["stats"]["unique_graphs"]))
    sys.exit(code)
