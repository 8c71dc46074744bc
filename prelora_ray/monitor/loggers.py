"""All that a run is logged to besides its own records (`monitor.loggers`). Rank 0 alone logs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

from prelora_ray.config import Settings
from prelora_ray.extras import check_installed
from prelora_ray.fault_tolerance.end import EndKind
from prelora_ray.monitor.scalars import Pixels, Scalars, epoch_scalars, sheet, window_scalars
from prelora_ray.monitor.tensorboard import TensorBoardLog
from prelora_ray.monitor.tracker import Courier, Outcome, Tracker
from prelora_ray.records import EpochLine, WindowLine
from prelora_ray.run_folder import RunFolder


def check_loggers(settings: Settings) -> None:
    """Raises UserError where a logger is asked for that is not installed."""
    for name in settings.monitor.loggers:
        if name != "tensorboard":
            check_installed(f"monitor.loggers = {name}", name, name)


class Loggers:
    """The loggers of one attempt. What is new to a run begins with its epochs so far, also those of its trunk."""

    def __init__(self, folder: RunFolder, settings: Settings, attempt: int, epoch: int) -> None:
        """`epoch`: completed epochs at the attempt's begin."""
        self._of_window: Scalars = {}
        self._sizes: set[int] = set()
        """Of images that have had their sheet."""
        names = settings.monitor.loggers
        recorded = _recorded(folder, epoch)
        self._board = TensorBoardLog(folder, settings, attempt, epoch) if "tensorboard" in names else None
        if self._board is not None and self._board.is_first:
            for step, values in recorded:
                self._board.scalars(step, values)
        self._couriers = _couriers(folder, settings, recorded)
        self._all: list[TensorBoardLog | Courier] = [*([self._board] if self._board is not None else []), *self._couriers]

    def window(self, line: WindowLine) -> None:
        """Comes before the epoch that ends the window."""
        self._of_window = window_scalars(line)

    def epoch(self, line: EpochLine) -> None:
        values, self._of_window = epoch_scalars(line) | self._of_window, {}
        for log in self._all:
            log.scalars(line.epoch + 1, values)

    def wants_samples(self, image_size: int) -> bool:
        """Whether no images of this size have been shown yet."""
        return image_size not in self._sizes and bool(self._all)

    def samples(self, epoch: int, images: Pixels) -> None:
        """Images that an epoch (from 0) trains on, as the model takes them: (n, size, size, channels)."""
        self._sizes.add(images.shape[1])
        page = sheet(images)
        for log in self._all:
            log.samples(epoch + 1, page)

    def flush(self) -> bool:
        """Returns whether all that goes into the run folder is there."""
        return self._board is None or self._board.flush()

    def end(self, kind: EndKind, meanwhile: Callable[[], None]) -> None:
        """The attempt has ended. Nodes that are about to go wait for no service."""
        if kind != "preemption":
            for courier in self._couriers:
                courier.end(kind, meanwhile)


def tell_end(settings: Settings, outcome: Outcome) -> None:
    """Tells services how a run has ended whose workers could not, with all that they lack of it."""
    folder = RunFolder.of(settings)
    if any(event.attempt >= 0 for event in folder.events()):  # else no service has heard of it
        for courier in _couriers(folder, settings, _recorded(folder, settings.train.epochs)):
            courier.end(outcome, lambda: None)


def services_of(settings: Settings) -> list[str]:
    """The loggers that are services elsewhere."""
    return [name for name in _CONNECTS if name in settings.monitor.loggers]


def _couriers(folder: RunFolder, settings: Settings, recorded: list[tuple[int, Scalars]]) -> list[Courier]:
    return [Courier(name, functools.partial(_CONNECTS[name], folder, settings), recorded) for name in services_of(settings)]


def _recorded(folder: RunFolder, epoch: int) -> list[tuple[int, Scalars]]:
    """What stands of the first so many epochs, by step."""
    windows = {line.epoch_end: window_scalars(line) for line in folder.windows()}
    return [
        (line.epoch + 1, epoch_scalars(line) | windows.get(line.epoch + 1, {}))
        for line in folder.epochs()
        if line.epoch < epoch
    ]


def _identity(folder: RunFolder, settings: Settings) -> str:
    """Of the run at every service: the same in all attempts, and another one in a run of that name begun anew."""
    first = next(event for event in folder.events() if event.attempt >= 0)  # a fork's begin with its trunk's
    return hashlib.blake2b(f"{settings.name} {first.time}".encode(), digest_size=8).hexdigest()


def _mlflow(folder: RunFolder, settings: Settings) -> Tracker:
    from prelora_ray.monitor.mlflow_run import MLflowRun  # an extra, which takes seconds to import

    return MLflowRun(settings, _identity(folder, settings))


def _wandb(folder: RunFolder, settings: Settings) -> Tracker:
    from prelora_ray.monitor.wandb_run import WandbRun

    return WandbRun(folder, settings, _identity(folder, settings))


_CONNECTS: dict[str, Callable[[RunFolder, Settings], Tracker]] = {"mlflow": _mlflow, "wandb": _wandb}
