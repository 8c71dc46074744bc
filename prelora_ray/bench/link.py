"""A network between workers, simulated behind the exchange that they really make."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook

from prelora_ray.engine.exchange import Hook

_CALIBRATION_CYCLES = 10**8
Bucket = torch.futures.Future[torch.Tensor]


class Link:
    """A worker's one way to the others: its buckets go over it one after the other, each behind its real exchange.

    A bucket of N bytes takes 2 N / bandwidth: in a ring of many workers each sends so much, and receives as much. For
    so long a kernel of one thread spins on a stream of its own, or on a CPU a thread sleeps, and the step waits for
    neither before it wants the bucket's mean.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.number_format: Literal["fp32", "bf16"] = "fp32"
        """In which buckets are exchanged."""
        self.gbit_per_second: float | None = None
        """In each direction; None adds nothing to the real exchange."""
        self.num_bytes = 0
        """That this worker gave to be summed."""
        self._spans: list[tuple[Any, Any]] = []
        """Begin and end of each bucket on the way: events of the GPU, or seconds."""
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._cycles_per_second = self._calibrate()
        else:
            self._thread = ThreadPoolExecutor(1)

    def exchange(self, group: Any, bucket: dist.GradBucket) -> Bucket:
        """DDP's hook."""
        hook: Hook = bf16_compress_hook if self.number_format == "bf16" else allreduce_hook
        size = bucket.buffer().numel() * (2 if self.number_format == "bf16" else bucket.buffer().itemsize)
        self.num_bytes += size
        real = hook(group, bucket)
        if self.gbit_per_second is None:
            return real
        seconds = self.seconds(size)
        if self.device.type == "cuda":
            return self._spin(real, seconds)
        carried: Bucket = torch.futures.Future()
        self._thread.submit(self._sleep, real, seconds, carried)
        return carried

    def seconds(self, num_bytes: int) -> float:
        """How long so many bytes of gradients are on the way."""
        return 0.0 if self.gbit_per_second is None else 2 * 8 * num_bytes / (self.gbit_per_second * 1e9)

    def reset(self) -> None:
        """Begins to count anew."""
        self.num_bytes = 0
        self._spans.clear()

    def busy_seconds(self) -> float:
        """How long buckets have been on the way since `reset`, measured; the device must have done its work."""
        if self.device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
        return float(sum(end - begin for begin, end in self._spans))

    def _spin(self, real: Bucket, seconds: float) -> Bucket:
        """Nothing here waits for the GPU: the streams wait for each other."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        carried: Bucket = torch.futures.Future(devices=[self.device])
        with torch.cuda.stream(self._stream):
            mean = real.wait()
            begin.record()
            torch.cuda._sleep(int(seconds * self._cycles_per_second))
            end.record()
            carried.set_result(mean)
        self._spans.append((begin, end))
        return carried

    def _sleep(self, real: Bucket, seconds: float, carried: Bucket) -> None:
        try:
            mean = real.wait()
            begin = time.perf_counter()
            time.sleep(seconds)
            self._spans.append((begin, time.perf_counter()))
            carried.set_result(mean)
        except RuntimeError as error:  # DDP waits for `carried`, and raises it
            carried.set_exception(error)  # type: ignore[arg-type]  # as torch declares it

    def _calibrate(self) -> float:
        """Cycles a second of the GPU's clock."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_CALIBRATION_CYCLES)  # the clock wakes up
        begin.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        end.record()
        end.synchronize()
        return _CALIBRATION_CYCLES / (begin.elapsed_time(end) / 1e3)
