"""The run folder: what a run leaves behind, and other programs read.

    <storage>/<name>/
      config.yaml, data.json, events.jsonl, norms.jsonl, windows.jsonl, epochs.jsonl, samples-<rank>.jsonl,
      ranks.json, micro_batch.json, starting.json, progress.json, end.json, result.json,
      checkpoints/, tensorboard/, wandb/, ray/

docs/run-folder.md describes every file. In a bucket a file that grows has segments (`segment`). Lines carry an
``attempt`` that counts restarts: where two lines are of the same epoch, window or batch, the later attempt's stands.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import yaml

from prelora_ray.config import Settings
from prelora_ray.config_file import Override, parse_settings, parse_yaml, with_overrides
from prelora_ray.errors import UserError, one_line
from prelora_ray.records import (
    EpochLine,
    Event,
    Line,
    NormsLine,
    Progress,
    RecordT,
    Result,
    Starting,
    WindowLine,
    from_json,
    standing,
    to_json,
)
from prelora_ray.section import Section
from prelora_ray.storage import Storage


class RunFolder(Storage):
    """A run's folder, for whoever reads it or writes single files."""

    @classmethod
    def of(cls, settings: Settings) -> RunFolder:
        return cls(str(Storage(settings.storage) / settings.name))

    def read_settings(self, overrides: Iterable[Override] = ()) -> Settings:
        """The run's settings, or what they come to with `overrides`, which are as those of `load_settings`.

        What `overrides` name counts as set, and nothing else does: the file holds every key. Raises UserError where the
        folder holds no run, or the overrides do not fit it.
        """
        if not self.exists("config.yaml"):
            raise UserError(f"{self} is no run folder: it has no config.yaml")
        try:
            content = parse_yaml(self.read_bytes("config.yaml").decode())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise self._damaged("config.yaml", one_line(error)) from None
        if not isinstance(content, dict):
            raise self._damaged("config.yaml", "it holds no settings")
        given = list(overrides)
        settings = parse_settings(with_overrides(_with_keys_of_now(content), given))
        _keep_set(settings, with_overrides({}, given))
        return settings

    def write_settings(self, settings: Settings) -> None:
        """Writes the resolved settings, every key."""
        content = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
        self.write_bytes("config.yaml", content.encode())

    def read_classes(self) -> tuple[str, ...]:
        """Names of the classes that the run is trained on."""
        content = self.read_json("data.json")
        if "classes" not in content:
            raise self._damaged("data.json", "it names no classes")
        return tuple(content["classes"])

    def read_json(self, name: str) -> dict[str, Any]:
        """A file that holds a JSON object. Raises UserError, with a sentence, where it is damaged."""
        try:
            content = super().read_json(name)
        except ValueError as error:
            raise self._damaged(name, str(error)) from None
        if not isinstance(content, dict):
            raise self._damaged(name, "it holds no object")
        return content

    def _damaged(self, name: str, reason: str) -> UserError:
        return UserError(
            f"{self}/{name} is damaged ({reason}): restore it, or remove it and have the same command write it anew"
        )

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """All whole lines of a JSON-lines file and its segments, in file order; none where there is no file."""
        segments = [segment(name, number) for number in range(count_segments(self, name))]
        return [line for each in segments for line in parse_lines(self.read_bytes(each))]

    def records(self, kind: type[RecordT], name: str | None = None) -> list[RecordT]:
        """All lines of a kind, in file order, of its own file or of `name`. One that lacks a key is ignored."""
        name = name or kind.FILE
        found = []
        for line in self.read_lines(name):
            with contextlib.suppress(ValueError):
                found.append(from_json(kind, line, f"{self}/{name}"))
        return found

    def norms(self, name: str | None = None) -> list[NormsLine]:
        """The lines that stand, by epoch."""
        return standing(self.records(NormsLine, name), lambda line: line.epoch)

    def windows(self) -> list[WindowLine]:
        """The lines that stand, by window."""
        return standing(self.records(WindowLine), lambda line: line.window)

    def epochs(self) -> list[EpochLine]:
        """The lines that stand, by epoch."""
        return standing(self.records(EpochLine), lambda line: line.epoch)

    def events(self) -> list[Event]:
        """All events, in file order: none replaces another."""
        return self.records(Event)

    def read_progress(self) -> Progress:
        """Where the run is right now. Raises ValueError where that is damaged, and OSError where it was not written."""
        return from_json(Progress, self.read_json(Progress.FILE), f"{self}/{Progress.FILE}")

    def read_place(self) -> Starting | Progress | None:
        """What the run does right now, or did last: what was written later. None where neither is there, or whole."""
        found: list[Starting | Progress] = []
        with contextlib.suppress(FileNotFoundError, ValueError):
            found.append(from_json(Starting, self.read_json(Starting.FILE), f"{self}/{Starting.FILE}"))
        with contextlib.suppress(FileNotFoundError, ValueError):
            found.append(self.read_progress())
        return max(found, key=lambda place: place.time, default=None)

    def write_starting(self, doing: str) -> None:
        """Says what is done before the next step of training; where there is no room for it, nothing is said."""
        with contextlib.suppress(OSError):
            self.write_json(Starting.FILE, to_json(Starting(time=time.time(), doing=doing)))

    def read_result(self) -> dict[str, Any]:
        """The result of a finished run, with the keys of `Result`. Raises UserError, with a sentence, where it is
        damaged."""
        content = self.read_json(Result.FILE)
        try:
            from_json(Result, content, "it")
        except ValueError as error:
            raise self._damaged(Result.FILE, str(error)) from None
        return content

    def write_records(self, kind: type[RecordT], lines: Iterable[Line]) -> None:
        """Writes the file of a kind of line whole; infinite numbers become null."""
        self.write_bytes(kind.FILE, b"".join(_encoded(to_json(line)) for line in lines))


def _keep_set(section: Section, given: dict[str, Any]) -> None:
    """Of the keys that count as set, keeps those in `given` alone."""
    section.model_fields_set.intersection_update(given)
    for key, value in section:
        if isinstance(value, Section):
            _keep_set(value, given.get(key) or {})


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """The lines that hold a JSON object. What a killed writer or a lost disk left of others, anywhere, is ignored.

    Nothing brings such a line back, and the others are valid without it. A caller that needs all of them, such as a
    replay, has to check that none is missing.
    """
    lines = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(entry := json.loads(line), dict):
                lines.append(entry)
    return lines


SEGMENT_BYTES = 2**18
"""Of a file that is appended to in a bucket, from which on it goes on in a further segment."""
_SEGMENT = re.compile(r"(.+\.jsonl)\.\d{4,}")


def segment(name: str, number: int) -> str:
    """Name of one of the segments of a file, from 0: `epochs.jsonl`, `epochs.jsonl.0001`, `epochs.jsonl.0002`."""
    return f"{name}.{number:04d}" if number else name


def name_without_segment(name: str) -> str:
    """`epochs.jsonl` of any segment of it; other names as they are."""
    match = _SEGMENT.fullmatch(name)
    return match[1] if match else name


def count_segments(folder: Storage, name: str) -> int:
    """Segments that a file has, which follow each other without a gap: none where there is no file."""
    above = 1
    while folder.exists(segment(name, above - 1)):
        above *= 2
    return bisect.bisect_left(range(above - 1), True, lo=above // 2, key=lambda i: not folder.exists(segment(name, i)))


class Appender:
    """Appends to one file of a run folder, without ever waiting for the storage.

    On a disk a thread writes what is appended at once; on a full one it waits in memory for room, and so does the
    file's creation. Object stores cannot append: there it gathers in a local file until `flush`, which uploads that
    whole as a segment of its own, the next free one, so that a writer of an earlier attempt that is not dead yet
    overwrites nothing of it. One of `SEGMENT_BYTES` or more stays as it is, and a further one begins. What was appended
    survives this process's end once `flush` has returned True. One thread may append while another flushes.
    """

    def __init__(self, folder: Storage, name: str) -> None:
        self._folder = folder
        self._name = name
        self._file: IO[bytes] | None = None
        self._writing = threading.Lock()
        """Held by the thread that writes, which may take long."""
        self._lock = threading.Lock()
        """Held for a moment, for what follows."""
        self._has_writer = False
        """Whether a thread of its own writes what is appended."""
        self._pending = b""
        self._segment: int | None = None
        """In a bucket, the one that the file is uploaded as; None in front of its first upload."""
        self._num_bytes = 0
        """Bytes in the file, in a bucket those of the segment."""
        self._uploaded = 0
        """Bytes of the segment that are in the bucket."""

    def append(self, content: bytes) -> None:
        with self._lock:
            self._pending += content
            begins = self._folder.is_local and not self._has_writer
            self._has_writer |= begins
        if begins:
            threading.Thread(target=self._write_beside, daemon=True).start()

    def flush(self) -> bool:
        """Returns whether all that was appended so far is stored; where it is not, the next flush tries again."""
        with self._writing:
            has_all = self._drain()
            if not has_all or self._folder.is_local:
                return has_all
            if self._num_bytes != self._uploaded:
                assert self._file is not None
                content = os.pread(self._file.fileno(), self._num_bytes, 0)
                try:
                    if self._segment is None:
                        self._segment = count_segments(self._folder, self._name)
                    self._folder.write_bytes(segment(self._name, self._segment), content)
                except OSError:
                    return False
                self._uploaded = self._num_bytes
                if self._uploaded >= SEGMENT_BYTES:
                    self._file = self._segment = None
                    self._num_bytes = self._uploaded = 0
            return True

    def _write_beside(self) -> None:
        while True:
            with self._writing:
                has_room = self._drain()
            with self._lock:
                if not has_room or not self._pending:
                    self._has_writer = False
                    return

    def _drain(self) -> bool:
        """Writes as much as there is room for; returns whether that is all that was pending at the last look."""
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = self._open()
            while content := self._pending:
                written = self._file.write(content)
                with self._lock:
                    self._pending = self._pending[written:]
                self._num_bytes += written
            return True
        return False

    def _open(self) -> IO[bytes]:
        if not self._folder.is_local:
            return tempfile.TemporaryFile(buffering=0)
        path = Path(self._folder.file(segment(self._name, max(0, count_segments(self._folder, self._name) - 1))))
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+b", buffering=0)


class LineWriter(Appender):
    """Appends JSON lines; infinite numbers become null. A line that a killed writer left unfinished is ended first."""

    def _open(self) -> IO[bytes]:
        file = super()._open()
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                with self._lock:
                    self._pending = b"\n" + self._pending
        return file

    def write(self, **line: Any) -> None:
        self.append(_encoded(line))


class RecordWriter:
    """The JSON-lines files that rank 0 writes while a run goes on."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._writers = {kind.FILE: LineWriter(folder, kind.FILE) for kind in (Event, NormsLine, WindowLine, EpochLine)}
        self._progress_time = float("-inf")

    def write(self, line: Line) -> None:
        """Appends a line to the file of its kind."""
        self._writers[line.FILE].write(**to_json(line))

    def progress_is_due(self) -> bool:
        """Whether progress.json is due again; once it says so, not again for a while."""
        now = time.monotonic()
        is_due = now - self._progress_time >= (1.0 if self._folder.is_local else 15.0)
        if is_due:
            self._progress_time = now
        return is_due

    def progress(self, progress: Progress) -> None:
        """Replaces progress.json."""
        with contextlib.suppress(OSError):  # on a full disk: the next one is soon due
            self._folder.write_json(Progress.FILE, _finite(to_json(progress)))

    def flush_events(self) -> None:
        """Uploads the events so far, from which a later attempt takes its number; the rest waits for `flush`."""
        self._writers[Event.FILE].flush()

    def flush(self) -> bool:
        """Returns whether all that was recorded is stored."""
        return all(writer.flush() for writer in self._writers.values())  # where one fails, the others would too


def _with_keys_of_now(content: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run folder that an earlier version wrote: there `rank_floor` says whether `rank_floor_percent`
    counts, and where `drop_path_form` is missing a model had masks."""
    method, model = content.get("method"), content.get("model")
    if isinstance(method, dict) and "rank_floor" in method:
        dropped = ("rank_floor",) if method["rank_floor"] == 0 else ("rank_floor", "rank_floor_percent")
        content = {**content, "method": {key: value for key, value in method.items() if key not in dropped}}
    if isinstance(model, dict):
        content = {**content, "model": {"drop_path_form": "mask", **model}}
    return content


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(_finite(line), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    """The value with null in place of every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
