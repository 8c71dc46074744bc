"""A disk that answers nobody for a while, as a share does whose server is silent: training goes on."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from prelora_ray.monitor.telemetry import run_label
from prelora_ray.monitor.tensorboard import TensorBoardLog
from prelora_ray.run_folder import RecordWriter, RunFolder
from prelora_ray.train.run import train
from tests.chaos.site import wait_for
from tests.conftest import exporter
from tests.disk import HangingDisk
from tests.lines import epoch_line, event
from tests.monitor.test_tensorboard import read
from tests.runs import settings, wait_inside

LINES = 20


def test_who_records_does_not_wait_and_all_lines_are_there_later_in_their_order(hanging_disk: HangingDisk) -> None:
    folder = RunFolder(hanging_disk.path / "run")
    folder.make()
    run = settings(hanging_disk.path, hanging_disk.path, "run", 1)
    records, board = RecordWriter(folder), TensorBoardLog(folder, run, attempt=0, epoch=0)
    assert records.flush() and board.flush()
    with hanging_disk.hangs():
        for epoch in range(LINES):
            records.write(event("stop", epoch))
            records.write(epoch_line(epoch))
            board.scalars(epoch + 1, {"loss/train": 2.0})
        assert hanging_disk.is_hanging, "else it thawed because this thread waited for it"
    assert records.flush() and board.flush()
    for name in ("events.jsonl", "epochs.jsonl"):
        assert [entry["epoch"] for entry in folder.read_lines(name)] == list(range(LINES))
    assert [event.step for event in read(folder).Scalars("loss/train")] == list(range(1, LINES + 1))


@pytest.mark.slow
def test_steps_go_on_while_the_run_folder_hangs(hanging_disk: HangingDisk, digits: Path) -> None:
    """Counted by what the exporter has. Nothing but a save at the end of an epoch is waited for, and there are none."""
    run = settings(
        *(digits, hanging_disk.path, "hanging", 1),
        train={"epochs": 150, "resolution": [], "ema": None},
        method={"tau": 0.0},
        checkpoint={"every_epochs": 1000, "every_steps": 5},
    ).model_copy(update={"audit_samples": False})
    address = exporter(run)

    def images() -> float:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return sum(s.value for f in families for s in f.samples if (s.name, s.labels["run"]) == ("prelora_images_total", label))

    label = run_label(run)
    with ThreadPoolExecutor() as beside:
        training = beside.submit(train, run)
        wait_inside(RunFolder.of(run), 2)
        with hanging_disk.hangs():
            before = images()
            wait_for(lambda: images() > before + 10 * run.data.batch_size, 15, "ten steps")
            assert hanging_disk.is_hanging
        assert training.result()["restarts"] == 0
