"""Lines of a run folder, as small as a test wants them."""

from __future__ import annotations

from typing import Any

from prelora_ray.records import EVENTS, EpochLine, Event, NormsLine, Progress
from prelora_ray.run_folder import LineWriter
from prelora_ray.storage import Storage


def write_lines(folder: Storage, name: str, *lines: dict[str, Any]) -> None:
    """Appends lines to a file of a run folder, as a run does."""
    writer = LineWriter(folder, name)
    for line in lines:
        writer.write(**line)
    assert writer.flush()


def epoch_line(epoch: int, **content: Any) -> EpochLine:
    """An epoch of phase full by attempt 0, in which every other number is 1."""
    numbers = ("loss", "val_loss", "val_top1", "val_top5", "images_per_second", "images", "train_seconds", "seconds")
    others = ("data_wait_seconds", "peak_memory_bytes", "trainable_parameters", "parameters", "learning_rate", "world_size")
    ones: dict[str, Any] = dict.fromkeys((*numbers, *others), 1)
    return EpochLine(**{"attempt": 0, "epoch": epoch, "phase": "full", **ones, **content})


def norms_line(epoch: int, norms: dict[str, float], loss: float = 1.0, **content: Any) -> NormsLine:
    return NormsLine(**{"attempt": 0, "epoch": epoch, "phase": "full", "loss": loss, "norms": norms, **content})


def event(kind: str, epoch: int = 0, **content: Any) -> Event:
    return EVENTS[kind](**{"attempt": 0, "time": 0.0, "epoch": epoch, "step": 0, "phase": "full", **content})


def progress(epoch: int) -> Progress:
    return Progress(attempt=0, time=0.0, epoch=epoch, batch=0, batches=1, step=0, phase="full", loss=1.0, images_per_second=1.0)
