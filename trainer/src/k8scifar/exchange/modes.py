"""The modes of communication by name: the values of `distributed.comm`."""

from __future__ import annotations

from k8scifar.exchange.gradients import AllReduce, BFloat16, Int8
from k8scifar.exchange.local_sgd import LocalSGD

KINDS = {kind.name: kind for kind in (AllReduce, BFloat16, Int8, LocalSGD)}  # the most exact first
