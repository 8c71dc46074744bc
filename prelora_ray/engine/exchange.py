"""How data-parallel workers exchange their gradients: in which buckets and number format, and how long they wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class ExchangeClock:
    """Measures what of the exchange no computation hides: from the end of a worker's own backward pass until it has the
    mean of all workers' gradients.

    That is the network's time, and the wait for whoever comes last, who waits least. Nothing waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._begin: Any = None
        self._pending: deque[tuple[Any, Any]] = deque()

    @property
    def seconds(self) -> float:
        """Over all steps that the device has done, which on a GPU may be some behind."""
        self._read()
        return self._seconds

    def _read(self) -> None:
        while self._pending and (not self._is_cuda or self._pending[0][1].query()):
            begin, end = self._pending.popleft()
            self._seconds += begin.elapsed_time(end) / 1000 if self._is_cuda else end - begin

    @contextmanager
    def watching(self, loss: torch.Tensor) -> Iterator[None]:
        """For the time of the backward pass of `loss`, in which DDP exchanges."""
        engine = torch.autograd.Variable._execution_engine
        # What is queued as the pass begins is called at its end, before what DDP queues later: the wait for buckets.
        loss.register_hook(lambda _: engine.queue_callback(self._backward_ends))
        self._begin = None
        yield
        assert self._begin is not None, "a backward pass ran"
        self._pending.append((self._begin, self._now()))
        self._read()

    def _backward_ends(self) -> None:
        self._begin = self._now()

    def _now(self) -> Any:
        """The time where the device's stream is, or on a CPU the time."""
        if not self._is_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def align_gradients(model: nn.Module) -> None:
    """Gives the gradients of tokens and position embeddings, (1, n, width), the strides that DDP's buckets have.

    The gradient of one image is cut out of a longer sequence, whose stride stays in the dimension of size 1. It has no
    meaning there, but DDP compares it, and warns of a slow copy.
    """
    for parameter in model.parameters():
        if 1 in parameter.shape:
            parameter.register_hook(lambda gradient: gradient.flatten().view(gradient.shape))
