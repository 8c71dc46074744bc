"""What workers send to the cluster's exporter."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Sequence

import torch

from prelora_ray.config import Settings
from prelora_ray.engine.flops import forward_flops, peak_flops, training_passes
from prelora_ray.measures import MEASURED
from prelora_ray.method.phases import Phase
from prelora_ray.monitor.client import Client
from prelora_ray.monitor.metrics import RunMetrics, WorkerMetrics
from prelora_ray.monitor.sensors import Sensors
from prelora_ray.records import Diagnosis, EpochLine, Event, Restart, WindowLine
from prelora_ray.run_folder import RunFolder

_RATE_SECONDS = 5.0
"""Shortest time over which images_per_second is the mean."""


def run_label(settings: Settings) -> str:
    """The run's folder, as no two runs share one: `/mnt/shared/runs/digits`."""
    return str(RunFolder.of(settings))


class WorkerTelemetry:
    """A worker's own measurements. Costs some microseconds a step, and a message a second."""

    def __init__(
        self,
        settings: Settings,
        num_classes: int,
        rank: int,
        world_size: int,
        device: torch.device,
        sequence_length: int | None = None,
    ) -> None:
        """`sequence_length`: tokens of a sample of text."""
        self._labels = run_label(settings), str(rank)
        self._world_size = world_size
        self._device = device
        watches_gpu = settings.monitor.enabled and device.type == "cuda"
        self._sensors = Sensors(device) if watches_gpu else None
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if watches_gpu else None
        self._forward_flops = functools.cache(
            functools.partial(
                forward_flops, settings.model, num_classes, cell=settings.data.cell, sequence_length=sequence_length
            )
        )
        self._exchanged = 0.0
        self._metrics = WorkerMetrics()
        self._client = Client(self._labels[0], str(rank), self._metrics, enabled=settings.monitor.enabled)

    def begin_epoch(self, phase: Phase, image_size: int) -> None:
        self._forget_rates()  # those of a phase that is over, or a sum would count them for ever
        self._phase = phase
        self._mfu_per_rate = self._forward_flops(image_size) / self._peak if self._peak else None
        """MFU for each forward a second."""
        self._last = time.monotonic()
        self._waited = 0.0
        self._recent = deque([(self._last, 0)])
        self._images_per_second = 0.0
        labels = (*self._labels, phase)
        self._images = self._metrics.images.labels(*labels)
        self._steps = self._metrics.step_seconds.labels(*labels)
        self._wait = self._metrics.data_wait_seconds.labels(*labels)
        self._exchange = self._metrics.exchange_seconds.labels(*labels)

    def step(self, images: int, waited: float, exchanged: float) -> None:
        """A step on so many images has ended.

        `waited`: seconds of waiting for data since the epoch's begin. `exchanged`: those of waiting for gradients since
        the attempt's.
        """
        now = time.monotonic()
        self._images.inc(images)
        self._steps.observe(now - self._last)
        self._wait.inc(waited - self._waited)
        self._exchange.inc(exchanged - self._exchanged)
        self._last, self._waited, self._exchanged = now, waited, exchanged
        self._recent.append((now, self._recent[-1][1] + images))
        while len(self._recent) > 2 and now - self._recent[1][0] >= _RATE_SECONDS:
            self._recent.popleft()
        (begin, before), (end, after) = self._recent[0], self._recent[-1]
        self._images_per_second = (after - before) / (end - begin)
        if self._client.is_due:
            self.send()

    def end(self) -> None:
        """The run has trained all its epochs: its counts stay for a while, its rates end."""
        self._forget_rates()
        self._client.send(self._world_size)

    def _forget_rates(self) -> None:
        self._metrics.images_per_second.clear()
        self._metrics.mfu.clear()

    def send(self) -> None:
        self._metrics.images_per_second.labels(*self._labels, self._phase).set(self._images_per_second)
        if self._mfu_per_rate is not None:
            forwards = self._images_per_second * training_passes(self._phase)
            self._metrics.mfu.labels(*self._labels, self._phase).set(forwards * self._mfu_per_rate)
        if self._sensors is not None and (read := self._sensors.read()) is not None:
            used, watts = read
            self._metrics.gpu_utilization.labels(*self._labels).set(used)
            self._metrics.gpu_power.labels(*self._labels).set(watts)
        if self._device.type == "cuda":
            for kind, value in (
                ("allocated", torch.cuda.memory_allocated()),
                ("reserved", torch.cuda.memory_reserved()),
                ("peak", torch.cuda.max_memory_allocated()),
            ):
                self._metrics.gpu_memory_bytes.labels(*self._labels, self._phase, kind).set(value)
        self._client.send(self._world_size)


class RunTelemetry:
    """What rank 0 knows of the run."""

    def __init__(self, settings: Settings, world_size: int, events: Sequence[Event]) -> None:
        self._run = run_label(settings)
        self._world_size = world_size
        self._metrics = RunMetrics()
        self._client = Client(self._run, "run", self._metrics, enabled=settings.monitor.enabled)
        self._metrics.world_size.labels(self._run).set(world_size)
        self._metrics.epochs.labels(self._run).set(settings.train.epochs)
        for kind, limit in (("tau", settings.method.tau), ("zeta", settings.method.zeta)):
            self._metrics.threshold.labels(self._run, kind).set(limit)
        for event in events:
            if isinstance(event, Restart):
                self._metrics.restarts.labels(self._run, event.cause).inc()
            elif isinstance(event, Diagnosis):
                self.diagnosis(event.signature)

    def state(self, phase: str, epoch: int, ranks: dict[str, int] | None) -> None:
        """The phase that trains now, completed epochs, and the ranks once there are any."""
        for other in Phase:
            self._metrics.phase_info.labels(self._run, other.value).set(other == phase)
        self._metrics.epoch.labels(self._run).set(epoch)
        for module, rank in (ranks or {}).items():
            self._metrics.adapter_rank.labels(self._run, module).set(rank)

    def progress(self, loss: float) -> None:
        self._metrics.loss.labels(self._run).set(loss)
        if self._client.is_due:
            self._client.send(self._world_size)

    def epoch(self, line: EpochLine, remaining_seconds: float) -> None:
        """An epoch has ended, and the run will go on for about so many seconds."""
        self._metrics.epoch.labels(self._run).set(line.epoch + 1)
        self._metrics.remaining_seconds.labels(self._run).set(remaining_seconds)
        self._metrics.loss.labels(self._run).set(line.loss)
        self._metrics.learning_rate.labels(self._run).set(line.learning_rate)
        self._metrics.trainable_parameters.labels(self._run).set(line.trainable_parameters)
        for key in MEASURED:
            if (value := getattr(line, key)) is not None:
                getattr(self._metrics, key).labels(self._run).set(value)
        self._client.send(self._world_size)

    def window(self, line: WindowLine) -> None:
        for family, change in (line.change or {}).items():
            self._metrics.norm_change.labels(self._run, family).set(math.inf if change is None else change)
        if line.loss_change is not None:
            self._metrics.loss_change.labels(self._run).set(line.loss_change)

    def saved(self, seconds: float) -> None:
        """A checkpoint is committed, so many seconds after its snapshot."""
        self._metrics.checkpoint_seconds.labels(self._run).set(seconds)
        self._metrics.checkpoint_time.labels(self._run).set(time.time())

    def diagnosis(self, signature: str) -> None:
        self._metrics.diagnosis.labels(self._run, signature).set(1)
