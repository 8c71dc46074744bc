"""What a worker records, in a bucket that holds a file only once it is uploaded."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from prelora_ray.run_folder import RunFolder
from prelora_ray.train import recorder as recorder_module
from prelora_ray.train.recorder import Recorder
from tests.runs import settings


class Bucket(RunFolder):
    """A folder on a disk that is written to as a bucket is, and waits with it until it is reachable."""

    is_local = False  # type: ignore[assignment]
    is_reachable = True

    def write_bytes(self, name: str, content: bytes) -> None:
        while not self.is_reachable:
            time.sleep(0.05)
        super().write_bytes(name, content)


def recorder(folder: RunFolder, tmp_path) -> Recorder:
    run = settings(tmp_path, tmp_path, "recorded", 1)
    return Recorder(folder, run, rank=1, attempt=0, watchdog=cast(Any, SimpleNamespace(beat=lambda: None)))


def batch(number: int) -> Any:
    return SimpleNamespace(epoch=0, batch=number, ids=np.array([number, -1]))


def test_samples_are_there_before_a_checkpoint_inside_an_epoch(tmp_path):
    folder = Bucket(tmp_path)
    own = recorder(folder, tmp_path)
    for number in range(3):
        own.samples(batch(number))
    assert folder.read_lines("samples-1.jsonl") == []
    own.flush_samples()
    assert [line["samples"] for line in folder.read_lines("samples-1.jsonl")] == [[0], [1], [2]]


def test_no_step_waits_long_for_a_bucket_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "_SAMPLES_SECONDS", 0.1)
    folder = Bucket(tmp_path)
    own = recorder(folder, tmp_path)
    folder.is_reachable = False
    own.samples(batch(0))
    own.flush_samples()
    own.samples(batch(1))
    own.flush_samples()
    assert folder.read_lines("samples-1.jsonl") == []
    folder.is_reachable = True
    own.flush_samples()
    own.flush()
    assert [line["samples"] for line in folder.read_lines("samples-1.jsonl")] == [[0], [1]]
