"""A run's scalars as TensorBoard logs: `tensorboard --logdir <run folder>`."""

from __future__ import annotations

import struct
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from prelora_ray.method.phases import Phase
from prelora_ray.records import EpochLine, WindowLine
from prelora_ray.run_folder import Appender, RunFolder

FOLDER = "tensorboard"
_FROM_EPOCHS = {
    "loss/train": "loss",
    "loss/val": "val_loss",
    "accuracy/val_top1": "val_top1",
    "accuracy/val_top5": "val_top5",
    "accuracy/ema_top1": "ema_top1",
    "speed/images_per_second": "images_per_second",
    "speed/epoch_seconds": "seconds",
    "speed/data_wait_seconds": "data_wait_seconds",
    "memory/peak_bytes": "peak_memory_bytes",
    "run/learning_rate": "learning_rate",
    "run/trainable_parameters": "trainable_parameters",
    "run/world_size": "world_size",
    "run/image_size": "image_size",
}
"""Scalars, by the fields of an EpochLine that hold them."""


class TensorBoardLog:
    """Writes a file an attempt, with the number of completed epochs as the step.

    TensorBoard drops what an earlier attempt has written of the epochs that this one trains again. A
    run that forked begins with its trunk's epochs.
    """

    def __init__(self, folder: RunFolder, attempt: int, epoch: int) -> None:
        self._file = Appender(folder / FOLDER, f"events.out.tfevents.{attempt:06d}")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=epoch + 1, session_log=SessionLog(status=SessionLog.START)))
        if attempt == 0:
            for line in folder.epochs():
                self.epoch(line)
            for window in folder.records(WindowLine):
                self.window(window)

    def epoch(self, line: EpochLine) -> None:
        values = {tag: getattr(line, key) for tag, key in _FROM_EPOCHS.items()}
        self._scalars(line.epoch + 1, {**values, "run/phase": list(Phase).index(Phase(line.phase))})

    def window(self, line: WindowLine) -> None:
        changes = {f"norm_change_percent/{family}": change for family, change in (line.change or {}).items()}
        self._scalars(line.epoch_end, {**changes, "loss_change_percent": line.loss_change})

    def flush(self) -> bool:
        """Returns whether all that was written is there."""
        return self._file.flush()

    def _scalars(self, step: int, values: dict[str, float | None]) -> None:
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=found)))

    def _write(self, event: Event) -> None:
        """A record: length, checksum of the length, content, checksum of the content."""
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self._file.append(length + checksums[0] + content + checksums[1])
