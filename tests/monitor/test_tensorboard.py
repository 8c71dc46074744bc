"""TensorBoard's own reader finds the run's scalars, settings and images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from prelora_ray.config_file import parse_settings
from prelora_ray.monitor.loggers import Loggers
from prelora_ray.records import EpochLine, WindowLine
from prelora_ray.run_folder import RunFolder
from tests.lines import epoch_line

RUN = parse_settings({"name": "x", "data": {"path": "d|e"}, "train": {"epochs": 20, "learning_rate": 0.25, "compile": True}})


def line(epoch: int, loss: float, val_top1: float | None = 0.5) -> EpochLine:
    return epoch_line(epoch, loss=loss, val_top1=val_top1)


def read(folder: RunFolder) -> EventAccumulator:
    accumulator = EventAccumulator(str(Path(folder.path, "tensorboard")), purge_orphaned_data=True)
    accumulator.Reload()
    return accumulator


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def test_what_a_later_attempt_trains_again_replaces_what_was_written_before(folder):
    log = Loggers(folder, RUN, attempt=0, epoch=0)
    for epoch, loss in enumerate((3.0, 2.0, 1.5)):
        log.epoch(line(epoch, loss, None if epoch == 1 else 0.5))
    assert log.flush()
    log = Loggers(folder, RUN, attempt=1, epoch=2)
    test = {"change": {"query": 7.5, "fc1": None}, "loss_change": 40.0, "converged": False, "in_ramp": False}
    log.window(WindowLine(attempt=1, phase="full", window=2, epoch_end=3, loss=1.0, **test))
    log.epoch(line(2, 1.25))
    log.epoch(line(3, 1.0))
    log.flush()
    board = read(folder)
    assert [(event.step, event.value) for event in board.Scalars("loss/train")] == [(1, 3.0), (2, 2.0), (3, 1.25), (4, 1.0)]
    assert [event.step for event in board.Scalars("accuracy/val_top1")] == [1, 3, 4]
    assert [(event.step, event.value) for event in board.Scalars("norm_change_percent/query")] == [(3, 7.5)]
    assert "norm_change_percent/fc1" not in board.Tags()["scalars"]


def test_a_fork_begins_with_its_trunks_epochs(folder):
    folder.write_records(EpochLine, [epoch_line(epoch, loss=2.0 - epoch, attempt=-1) for epoch in range(2)])
    log = Loggers(folder, RUN, attempt=0, epoch=2)
    log.epoch(line(2, 0.25))
    assert log.flush()
    assert [event.value for event in read(folder).Scalars("loss/train")] == [2.0, 1.0, 0.25]


def test_switched_on_at_a_resume_it_has_what_came_before(folder):
    folder.write_records(EpochLine, [line(epoch, 2.0 - epoch) for epoch in range(2)])
    for attempt, epoch, loss in ((3, 2, 0.25), (4, 3, 0.5)):
        log = Loggers(folder, RUN, attempt=attempt, epoch=epoch)
        log.epoch(line(epoch, loss))
        assert log.flush()
    board = read(folder)
    assert [(event.step, event.value) for event in board.Scalars("loss/train")] == [(1, 2.0), (2, 1.0), (3, 0.25), (4, 0.5)]
    assert len(board.Tensors("settings/text_summary")) == 1


def test_settings_as_hyperparameters_and_as_a_table(folder):
    assert Loggers(folder, RUN, attempt=0, epoch=0).flush()
    assert Loggers(folder, RUN, attempt=1, epoch=0).flush()  # has them no second time
    board = read(folder)
    content = board.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    told = metadata.parse_session_start_info_plugin_data(content).hparams
    assert told["train.learning_rate"].number_value == 0.25
    assert told["train.compile"].bool_value is True
    assert told["data.mean"].string_value == "[0.485, 0.456, 0.406]"
    content = board.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    (metric,) = metadata.parse_experiment_plugin_data(content).metric_infos
    assert metric.name.tag == "accuracy/val_top1"
    (event,) = board.Tensors("settings/text_summary")
    rows = event.tensor_proto.string_val[0].decode().splitlines()
    assert rows[:2] == ["| key | value |", "| --- | --- |"]
    assert {"| `train.epochs` | 20 |", "| `data.path` | d\\|e |", "| `train.ema` | null |"} <= set(rows)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_of_the_first_images_of_each_size(folder, channels):
    log = Loggers(folder, RUN, attempt=0, epoch=0)
    images = np.random.default_rng(0).integers(256, size=(5, 4, 4, channels), dtype=np.uint8)
    assert log.wants_samples(4)
    log.samples(0, images)
    assert not log.wants_samples(4) and log.wants_samples(6)
    log.samples(1, np.zeros((5, 6, 6, channels), np.uint8))
    assert log.flush()
    first, second = read(folder).Images("samples")
    assert (first.step, second.step, second.width, second.height) == (1, 2, 3 * 8, 2 * 8)
    page = np.asarray(Image.open(io.BytesIO(first.encoded_image_string)).convert("RGB"))
    assert page.shape == (12, 18, 3)
    assert np.array_equal(page[6:10, 6:10], images[4].repeat(3 // channels, -1))


def test_no_logger_writes_nothing(folder):
    run = parse_settings({"name": "x", "data": {"path": "d"}, "monitor": {"loggers": []}})
    log = Loggers(folder, run, attempt=0, epoch=0)
    log.epoch(line(0, 1.0))
    assert log.flush() and not log.wants_samples(8)
    assert folder.list_folders() == []
