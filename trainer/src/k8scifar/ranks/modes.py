"""The modes of communication by name: the values of `distributed.comm`."""

from __future__ import annotations

from k8scifar.ranks.exchange import AllReduce, BFloat16, Int8
from k8scifar.ranks.local_sgd import LocalSGD

KINDS = {kind.name: kind for kind in (AllReduce, BFloat16, Int8, LocalSGD)}  # the most exact first
