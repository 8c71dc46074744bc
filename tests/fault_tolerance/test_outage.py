"""A bucket that cannot be reached for a while."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray.train

from prelora_ray.config import Settings
from prelora_ray.fault_tolerance.lock import DriverLock
from prelora_ray.run_folder import LineWriter, RunFolder
from prelora_ray.train.run import train
from tests.proxy import Proxy
from tests.runs import EPOCHS, FREEZE, SWITCH, assert_same_bits, final, settings


class Told(ray.train.UserCallback):
    """Notes reported epochs in a local file, as those of a run in a bucket are not to be seen while that is out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self.path.write_text(str(metrics[0]["epoch"]))

    def wait_for(self, epoch: int) -> None:
        end = time.monotonic() + 200
        while not self.path.exists() or int(self.path.read_text() or -1) < epoch:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("until", [SWITCH, FREEZE])
def test_a_bucket_that_is_out_through_a_change_of_phase_costs_only_saves(
    bucket: str, proxy: Proxy, digits: Path, tmp_path: Path, undisturbed: Callable[..., Settings], until: int
) -> None:
    """From the last epoch of phase full to the first of warmup, or of lora."""
    run = settings(digits, Path("unused"), "out", 1)
    run = run.model_copy(update={"storage": f"{bucket}/outage-{until}"})
    folder, told = RunFolder.of(run), Told(tmp_path / "told")
    with ThreadPoolExecutor() as beside:
        training = beside.submit(train, run, callbacks=[told])
        told.wait_for(1)
        with proxy.outage():
            told.wait_for(until)
        result = training.result()
    assert result["epochs"] == EPOCHS
    assert result["restarts"] == 0
    assert (result["switch_epoch"], result["freeze_epoch"]) == (SWITCH, FREEZE)
    assert any(line["event"] == "checkpoint_failed" for line in folder.read_lines("events.jsonl"))
    assert [line["epoch"] for line in folder.read_lines("epochs.jsonl")] == list(range(EPOCHS))
    assert len(folder.read_lines("samples-0.jsonl")) == EPOCHS * 15
    assert_same_bits(final(run), final(undisturbed(1)))


@pytest.mark.slow
def test_what_failed_is_told_though_the_lock_cannot_be_given_back(bucket: str, proxy: Proxy) -> None:
    folder = RunFolder(f"{bucket}/lock-out")
    with contextlib.ExitStack() as outage:

        def fail() -> None:
            with DriverLock(folder):
                outage.enter_context(proxy.outage())
                raise ValueError("the reason")

        with pytest.raises(ValueError, match="the reason"):
            fail()


def test_lines_that_an_outage_held_up_are_there_after_it(bucket: str, proxy: Proxy) -> None:
    folder = RunFolder(f"{bucket}/lines")
    writer = LineWriter(folder, "a.jsonl")
    writer.write(number=0)
    assert writer.flush()
    with proxy.outage():
        writer.write(number=1)
        assert not writer.flush()
    writer.write(number=2)
    assert writer.flush()
    another = LineWriter(folder, "a.jsonl")
    another.write(number=3)
    assert another.flush()
    assert [line["number"] for line in folder.read_lines("a.jsonl")] == [0, 1, 2, 3]
