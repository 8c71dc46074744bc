"""A run as TensorBoard logs: `tensorboard --logdir <run folder>`."""

from __future__ import annotations

import struct
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams, image, text

from prelora_ray.config import Settings, flat
from prelora_ray.measures import measures_of
from prelora_ray.monitor.scalars import Pixels, Scalars, settings_in_words, tag_of
from prelora_ray.run_folder import Appender, RunFolder

FOLDER = "tensorboard"


class TensorBoardLog:
    """Writes a file an attempt, with the number of completed epochs as the step.

    TensorBoard drops what an earlier attempt has written of the epochs that this one trains again.
    """

    def __init__(self, folder: RunFolder, settings: Settings, attempt: int, epoch: int) -> None:
        """`epoch`: completed epochs at the attempt's begin."""
        self.is_first = not (folder / FOLDER).list_files()
        """Whether no earlier attempt has written any."""
        self._file = Appender(folder / FOLDER, f"events.out.tfevents.{attempt:06d}")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=epoch + 1, session_log=SessionLog(status=SessionLog.START)))
        if self.is_first:
            self._settings(settings)

    def scalars(self, step: int, values: Scalars) -> None:
        self._summary(step, Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def samples(self, step: int, page: Pixels) -> None:
        """A sheet of training images."""
        self._summary(step, image("samples", page, dataformats="HWC"))

    def flush(self) -> bool:
        """Returns whether all that was written is there."""
        return self._file.flush()

    def _settings(self, settings: Settings) -> None:
        """As a table to read, and for the page that compares runs by their settings."""
        words = settings_in_words(settings)
        rows = [f"| `{key}` | {value.replace('|', chr(92) + '|')} |" for key, value in words.items()]
        self._summary(0, text("settings", "\n".join(["| key | value |", "| --- | --- |", *rows])))
        told = {key: value if isinstance(value, (int, float)) else words[key] for key, value in flat(settings).items()}
        experiment, begin, _ = hparams(told, {tag_of(measures_of(settings.task)[0].key): 0})
        self._summary(0, experiment)
        self._summary(0, begin)

    def _summary(self, step: int, summary: Summary) -> None:
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        """A record: length, checksum of the length, content, checksum of the content."""
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self._file.append(length + checksums[0] + content + checksums[1])
