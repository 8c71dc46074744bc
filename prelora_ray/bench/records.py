"""What the records of a long run cost in a bucket, which cannot append: bytes written, and the time to read them.

A made-up run of ViT-L on 64 workers: 144 norms an epoch, a window every third, a checkpoint an epoch, 300 scalars, and
with `audit_samples` what one worker records of 128,000 images. It uploads at the end of every epoch, and nothing is
trained.
"""

from __future__ import annotations

from typing import Any

import torch

from prelora_ray import run_folder
from prelora_ray.bench.machine import cpu_time_of, describe
from prelora_ray.config_file import parse_settings
from prelora_ray.monitor.tensorboard import TensorBoardLog
from prelora_ray.records import CheckpointSaved, EpochLine, NormsLine, WindowLine
from prelora_ray.run_folder import LineWriter, RecordWriter, RunFolder

_WORKERS, _BATCHES, _SAMPLES = 64, 31, 64
_FAMILIES = ("query", "key", "value", "proj", "fc1", "fc2")
_MODULES = [f"blocks.{layer}.attn.{family}" for layer in range(24) for family in _FAMILIES]


class _Bucket(RunFolder):
    """A bucket in memory, which counts what is written to it."""

    is_local = False

    def __init__(self) -> None:
        super().__init__("/bucket")
        self.files: dict[str, bytes] = {}
        self.num_written = 0

    def exists(self, name: str) -> bool:
        return self.file(name) in self.files

    def num_bytes(self, name: str) -> int | None:
        return len(self.files[self.file(name)]) if self.exists(name) else None

    def list_files(self) -> dict[str, int]:
        return {path: len(content) for path, content in self.files.items() if path.startswith(self.path)}

    def read_bytes(self, name: str) -> bytes:
        return self.files[self.file(name)]

    def write_bytes(self, name: str, content: bytes) -> None:
        self.files[self.file(name)] = content
        self.num_written += len(content)


class _Run:
    """What writes the records of an attempt, from an epoch on."""

    def __init__(self, folder: _Bucket, attempt: int, epoch: int) -> None:
        self._attempt = attempt
        self._records = RecordWriter(folder)
        self._samples = LineWriter(folder, "samples-0.jsonl")
        settings = parse_settings({"name": "bench", "data": {"path": "nowhere"}})
        self._board = TensorBoardLog(folder, settings, attempt, epoch)

    def epoch(self, epoch: int) -> None:
        number = 1 / (epoch + 3)  # of as many digits as any
        place: dict[str, Any] = {"attempt": self._attempt, "epoch": epoch, "phase": "full"}
        shares = ("loss", "val_loss", "val_top1", "val_top5", "images_per_second", "learning_rate")
        numbers: dict[str, Any] = dict.fromkeys((*shares, "train_seconds", "seconds", "data_wait_seconds"), number)
        numbers |= dict.fromkeys(("images", "peak_memory_bytes", "trainable_parameters", "parameters"), 10**8)
        seconds = dict.fromkeys(("data", "exchange", "compute"), [number] * _WORKERS)
        self._records.write(EpochLine(**place, **numbers, world_size=_WORKERS, worker_seconds=seconds))
        self._records.write(NormsLine(**place, loss=number, norms=dict.fromkeys(_MODULES, 100 + number)))
        self._records.write(CheckpointSaved(**place, time=1e9 + number, step=epoch, checkpoint=f"{epoch:08d}", seconds=number))
        if epoch % 3 == 2:
            change: dict[str, float | None] = dict.fromkeys(_FAMILIES, number)
            self._records.write(
                WindowLine(
                    attempt=self._attempt,
                    phase="full",
                    window=epoch // 3,
                    epoch_end=epoch + 1,
                    loss=number,
                    change=change,
                    signed_change=change,
                    loss_change=number,
                    converged=False,
                    in_ramp=False,
                )
            )
        for batch in range(_BATCHES):
            samples = list(range(100_000, 100_000 + _SAMPLES))
            self._samples.write(attempt=self._attempt, epoch=epoch, batch=batch, samples=samples)
        self._board.scalars(epoch + 1, {f"norms/{i:03d}": number for i in range(300)})
        assert self._records.flush() and self._samples.flush() and self._board.flush()


def bench_records(numbers_of_epochs: tuple[int, ...]) -> dict[str, Any]:
    """Bytes of runs of so many epochs, in segments and with each file uploaded whole; `against_recorded`: written over
    what is recorded in all."""
    rows = [
        {"name": f"{name}, {epochs} epochs", **_measure(epochs, num_bytes)}
        for name, num_bytes in (("segments", run_folder.SEGMENT_BYTES), ("whole files", 2**62))
        for epochs in numbers_of_epochs
    ]
    return {"benchmark": "records", **describe(torch.device("cpu")), "options": {"epochs": numbers_of_epochs}, "rows": rows}


def _measure(epochs: int, segment_bytes: int) -> dict[str, Any]:
    usual, run_folder.SEGMENT_BYTES = run_folder.SEGMENT_BYTES, segment_bytes
    try:
        folder = _Bucket()
        run = _Run(folder, 0, 0)
        for epoch in range(epochs):
            run.epoch(epoch)
        recorded = sum(map(len, folder.files.values()))
        written, files = folder.num_written, len(folder.files)
        seconds = cpu_time_of(lambda: (folder.epochs(), folder.norms(), folder.windows(), folder.events()))
        return {
            "recorded_bytes": recorded,
            "written_bytes": written,
            "against_recorded": written / recorded,
            "files": files,
            "seconds_to_read_all": seconds,
        }
    finally:
        run_folder.SEGMENT_BYTES = usual
