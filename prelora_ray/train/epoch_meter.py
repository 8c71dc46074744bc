"""What an epoch takes on this worker, from its first batch until its line of epochs.jsonl."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence

import torch

from prelora_ray.data.batch import StreamPlan
from prelora_ray.engine.exchange import ExchangeClock
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import all_gather
from prelora_ray.method.phases import count_parameters
from prelora_ray.records import EpochLine
from prelora_ray.tasks.task import Evaluation
from prelora_ray.train.batch_stream import BatchStream


class EpochMeter:
    """Measures one epoch of one attempt, which may begin inside it. Validation counts in `seconds` alone."""

    def __init__(self, state: TrainState, plan: StreamPlan, stream: BatchStream, clock: ExchangeClock) -> None:
        self.phase = state.phases.phase
        """What the epoch is trained in."""
        self._state = state
        self._plan = plan
        self._stream = stream
        self._first_batch = state.batch
        self._clock = clock
        self._waited = stream.wait_seconds
        self._exchanged = clock.seconds
        self._start = time.monotonic()

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for data since the begin."""
        return self._stream.wait_seconds - self._waited

    def images_per_second(self) -> float:
        """Of all workers together, so far."""
        images = (self._state.batch - self._first_batch) * self._state.settings.data.batch_size
        return images / (time.monotonic() - self._start)

    def end_training(self, loss: float, count: int, images: int) -> float:
        """All batches are trained. `loss`, `count` and `images`: sums over all workers and the epoch. Returns the mean
        loss, which is that over `count`.

        All workers call it together.
        """
        self._loss, self._images = loss / count, images
        self._train_seconds = time.monotonic() - self._start
        self._train_wait_seconds = self.wait_seconds
        exchange = self._clock.seconds - self._exchanged
        own = self.wait_seconds, max(0.0, self._train_seconds - self.wait_seconds - exchange), exchange
        of_all = all_gather(torch.tensor(own, dtype=torch.float64, device=self._state.device))
        self._worker_seconds = dict(zip(("data", "compute", "exchange"), map(list, zip(*of_all, strict=True)), strict=True))
        self._images_here = self._plan.orders["train"].rows_from(self._first_batch)
        return self._loss

    def line(self, attempt: int, validations: Sequence[Evaluation], learning_rate: float) -> EpochLine:
        """The epoch's record. `validations`: as `TrainStep.evaluate` returns them; none where it was not validated."""
        state = self._state
        validation, ema = (*validations, None, None)[:2]
        trainable, parameters = count_parameters(state.model)
        return EpochLine(
            attempt=attempt,
            epoch=state.epoch,
            phase=self.phase.value,
            image_size=None if state.settings.model.takes_text else state.image_size,
            loss=self._loss,
            **{"val_loss": None, "val_top1": None, "val_top5": None, **_recorded("val", validation), **_recorded("ema", ema)},
            images_per_second=self._images_here / self._train_seconds,
            images=self._images,
            train_seconds=self._train_seconds,
            seconds=time.monotonic() - self._start,
            data_wait_seconds=self._train_wait_seconds,
            worker_seconds=self._worker_seconds,
            peak_memory_bytes=_peak_memory_bytes(state.device),
            trainable_parameters=trainable,
            parameters=parameters,
            gradient_bytes=state.gradient_bytes,
            learning_rate=learning_rate,
            world_size=state.world_size,
        )


def _recorded(of: str, evaluation: Evaluation | None) -> dict[str, float]:
    """The numbers of an evaluation that an epoch's record has a field for: of `val` its `val_loss`, `val_top1`, ..."""
    numbers = {} if evaluation is None else vars(evaluation)
    return {f"{of}_{name}": number for name, number in numbers.items() if f"{of}_{name}" in EpochLine.__dataclass_fields__}


def _peak_memory_bytes(device: torch.device) -> int:
    """On a GPU the most that was allocated since the phase was built; on a CPU the most that the process ever held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
