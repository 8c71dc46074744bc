"""How data-parallel workers exchange their gradients: in which buckets, and in which number format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[torch.Tensor]]
"""Begins the exchange of a bucket, in a process group (None: all workers); its future holds the workers' mean."""


@dataclass(frozen=True)
class Exchange:
    """How DDP exchanges what trains."""

    hook: Hook | None = None
    """None is DDP's own: the mean in the number format of what trains."""
    number_format: torch.dtype | None = None
    """What `hook` sends; None: what trains, as it is."""
    bucket_mb: int | None = None
    """MiB of gradients that go at once, before `hook` makes them smaller; None: torch's 25, and 1 for the first."""

    @classmethod
    def of(cls, number_format: Literal["fp32", "bf16"]) -> Exchange:
        """As `train.gradient_exchange` has it.

        In bf16 each worker's gradient is rounded to 8 significant bits, divided by the number of workers, and summed in
        bf16. With u = 2**-8 and n workers a value is off by at most ((1 + u)**(n + 1) - 1) times the mean of the
        workers' absolute values; a division by a power of two is exact, which leaves n.
        """
        return cls(bf16_compress_hook, torch.bfloat16) if number_format == "bf16" else cls()

    def wrap(self, model: nn.Module, device: torch.device) -> DistributedDataParallel:
        """The model in DDP, for what trains now."""
        network = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            bucket_cap_mb=self.bucket_mb,
            gradient_as_bucket_view=True,
        )
        hook = self.hook
        if hook is not None:  # a lambda: DDP refuses postponed annotations, and on CPUs torch's bf16 hook by its name
            network.register_comm_hook(None, lambda group, bucket: hook(group, bucket))
        return network


def align_gradients(model: nn.Module) -> None:
    """Gives the gradients of tokens and position embeddings, (1, n, width), the strides that DDP's buckets have.

    The gradient of one image is cut out of a longer sequence, whose stride stays in the dimension of size 1. It has no
    meaning there, but DDP compares it, and warns of a slow copy.
    """
    for parameter in model.parameters():
        if 1 in parameter.shape:
            parameter.register_hook(lambda gradient: gradient.flatten().view(gradient.shape))
