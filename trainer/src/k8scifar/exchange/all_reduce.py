"""All-reduce of DistributedDataParallel's gradient buckets, while the backward pass still runs."""

# No `from __future__ import annotations`: DistributedDataParallel reads a hook's annotations, not their text.
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from k8scifar.exchange.interface import Exchange
from k8scifar.ranks.world import World

Hook = Callable[[None, dist.GradBucket], torch.futures.Future[torch.Tensor]]


class AllReduce(Exchange):
    """Every rank receives the mean of every gradient, summed in `dtype`."""

    def __init__(self, name: str, dtype: torch.dtype, world: World, ddp: DistributedDataParallel) -> None:
        self.name = self.label = name
        self.model = ddp
        listen(ddp, reduce_in(dtype, world))


def reduce_in(dtype: torch.dtype, world: World) -> Hook:
    """A hook that replaces a bucket of gradients by its mean over the ranks.

    DDP's own all-reduce would multiply by 1 / world size, which gives other bits at three ranks. And DDP cannot return
    to it once the trials of `auto` have registered a hook.
    """

    def reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer().div_(world.size)
        sent = dist.all_reduce(buffer.to(dtype), async_op=True).get_future()
        return sent.then(lambda done: buffer.copy_(done.value()[0]))

    return reduce


def listen(ddp: DistributedDataParallel, hook: Hook) -> None:
    """Call `hook` with each bucket from now on, instead of a former hook: DDP accepts only one registration."""
    if not hasattr(ddp, "bucket_hooks"):
        ddp.bucket_hooks = []

        def call(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            return ddp.bucket_hooks[-1](_, bucket)

        ddp.register_comm_hook(None, call)
    ddp.bucket_hooks[:] = [hook]
