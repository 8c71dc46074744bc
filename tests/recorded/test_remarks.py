"""What is said of a run beside its numbers, against replays of its record and by hand."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from prelora_ray.config_file import parse_settings
from prelora_ray.fault_tolerance.end import End, write_end
from prelora_ray.recorded.remarks import Remarks, remarks_on
from prelora_ray.recorded.replay import _above, read_record, replay
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import EpochLine, Event, NormsLine
from prelora_ray.run_folder import RunFolder
from tests.lines import epoch_line, event, norms_line

NAMES = [f"blocks.{layer}.{target}" for layer in range(2) for target in ("attn.query", "mlp.fc1")]


def folder_of(path: Path, epochs: int, *, ended: str | None = None, top1: float = 0.9, seed: int = 0, **method) -> RunFolder:
    """A run of so many of 24 epochs, whose norms and loss move less and less, over 10 classes."""
    rng, norms, loss = random.Random(seed), dict.fromkeys(NAMES, 10.0), 3.0
    folder = RunFolder(path)
    folder.make()
    method = {"window_epochs": 2, "tau": 0.01, "zeta": 0.01} | method
    content = {"name": "run", "data": {"path": "x"}, "train": {"epochs": 24, "ramp_epochs": 3}, "method": method}
    folder.write_settings(parse_settings(content))
    lines = []
    for epoch in range(epochs):
        lines.append(norms_line(epoch, dict(norms), loss))
        norms = {name: norm * (1 + rng.uniform(0.02, 0.1) / (epoch + 1)) for name, norm in norms.items()}
        loss *= 1 - rng.uniform(0.02, 0.2) / (epoch + 1)
    folder.write_records(NormsLine, lines)
    folder.write_records(EpochLine, [epoch_line(epoch, val_top1=top1) for epoch in range(epochs)])
    folder.write_json("data.json", {"classes": list("0123456789")})
    if ended == "finished":
        folder.write_json("result.json", {})
    elif ended is not None:
        write_end(folder, End(ended, message="the disk is full"))
    return folder


def remarks_of(folder: RunFolder) -> Remarks:
    return remarks_on(RunRecords(folder))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("tau", "zeta"), [(0.01, 50.0), (50.0, 0.01), (0.01, 0.01), (0.0, 0.0)])
def test_a_run_that_never_switched_is_told_what_would_have_switched_it(tmp_path, seed, tau, zeta):
    """What it names as kept, and where other thresholds switch, are what a replay with them finds."""
    folder = folder_of(tmp_path, 24, ended="finished", seed=seed, tau=tau, zeta=zeta)
    (told,) = remarks_of(folder).remarks
    record = read_record(str(folder))
    own = replay(record, record.method, record.ramp_epochs)
    largest = own.verdicts[-1].largest
    assert own.switch_epoch is None and largest is not None
    assert told.startswith("no switch: in the last 3 windows ")
    for name, value, limit in (("tau", largest[0], tau), ("zeta", largest[1], zeta)):
        assert (f" changed by {value:.3g} %, where method.{name} = {limit:g} wants" in told) == (value >= limit)
    pairs = re.findall(r"((?:method\.\w+ = [\d.e-]+(?: with )?)+) would have switched after epoch (\d+)", told)
    assert pairs
    for keys, epoch in pairs:
        given = {key: float(value) for key, value in re.findall(r"method\.(\w+) = ([\d.e-]+)", keys)}
        other = replay(record, record.method.model_copy(update=given), record.ramp_epochs)
        assert other.switch_epoch == int(epoch) < 24
    assert ("with" in pairs[0][0]) == (tau == zeta)


def test_a_run_whose_windows_lie_in_the_ramp_is_told_so(tmp_path):
    (told,) = remarks_of(folder_of(tmp_path, 7, ended="finished")).remarks
    assert (
        told
        == "no switch: of 3 windows none had a verdict, which takes 3 windows of 2 epochs, all but the first behind the ramp"
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 0.29, 0.5, 1.93, 9.96, 10.0, 12.0, 99.9, 1234.5, 1e-7, 5e-324, 1e300])
def test_a_threshold_to_try_is_just_above(value):
    above = _above(value)
    assert value < above <= max(1.11 * value, 0.0011) and above == float(f"{above:.2g}")


@pytest.mark.parametrize(
    ("ended", "progress"),
    [
        ("finished", "finished"),
        ("stop", "stopped after 9 of 24 epochs"),
        ("failed", "failed after 9 of 24 epochs: the disk is full"),
        ("preemption", "left nodes that were about to go after 9 of 24 epochs"),
        (None, "unfinished after 9 of 24 epochs"),
    ],
)
def test_how_far_a_run_came(tmp_path, ended, progress):
    state = remarks_of(folder_of(tmp_path, 9, ended=ended, enabled=False))
    assert (state.progress, state.is_finished, state.remarks) == (progress, ended == "finished", ())


@pytest.mark.parametrize("ended", [None, "stop", "failed"])
def test_no_switch_so_far_is_not_held_against_a_run_that_may_go_on(tmp_path, ended):
    state = remarks_of(folder_of(tmp_path, 9, ended=ended))
    assert state.remarks == ()
    (told,) = state.so_far
    assert told.startswith("no switch so far: in the last 3 windows ")
    assert remarks_of(folder_of(tmp_path, 9, ended="finished")).so_far == ()


@pytest.mark.parametrize(("top1", "is_told"), [(0.1, True), (0.2, True), (0.25, False), (0.9, False)])
def test_a_run_that_hardly_learned_is_told_so(tmp_path, top1, is_told):
    """20 % of 10 classes, where guessing comes to 10 %."""
    remarks = remarks_of(folder_of(tmp_path, 9, top1=top1, enabled=False)).remarks
    assert [remark.split(";")[0] for remark in remarks] == (
        [f"hardly learned: top-1 is {top1:.1%}, and guessing among 10 classes comes to 10.0%"] if is_told else []
    )


def test_what_a_run_learned_is_judged_behind_the_ramp(tmp_path):
    """Which has 3 epochs."""
    for epochs, is_told in ((1, False), (3, False), (4, True)):
        assert bool(remarks_of(folder_of(tmp_path, epochs, top1=0.1, enabled=False)).remarks) == is_told


def test_a_run_that_never_froze_is_told_so(tmp_path):
    folder = folder_of(tmp_path, 24, ended="finished")
    folder.write_records(Event, [event("switch", 22, switch_epoch=22, trainable_parameters=1, parameters=1)])
    (told,) = remarks_of(folder).remarks
    assert told.startswith("no freeze: the switch came after epoch 22 of 24, within method.warmup_epochs of the end")


def test_a_forced_switch_that_lies_ahead_is_no_remark(tmp_path):
    assert remarks_of(folder_of(tmp_path, 9, switch_epoch=12)).remarks == ()


def test_of_a_record_without_its_first_epoch_nothing_is_said(tmp_path):
    folder = folder_of(tmp_path, 24, ended="finished")
    folder.write_records(NormsLine, folder.norms()[1:])
    assert remarks_of(folder).remarks == ()


@pytest.mark.parametrize(("grows", "shrinks"), [(0.001, -0.002), (0.001, 0.002), (-0.001, -0.002)])
def test_a_switch_on_a_turning_point_is_told(tmp_path, grows, shrinks):
    """Where growth and decay about balance, norms of some families grow and those of others shrink."""
    folder = folder_of(tmp_path, 12, tau=1.0, zeta=5.0)
    pace = {name: grows if "query" in name else shrinks for name in NAMES}
    norms = [{name: 10 * (1 + pace[name]) ** epoch for name in NAMES} for epoch in range(12)]
    folder.write_records(NormsLine, [norms_line(epoch, norms[epoch], 1.0) for epoch in range(12)])
    folder.write_records(Event, [event("switch", switch_epoch=8, trainable_parameters=1, parameters=1)])
    own = replay(read_record(str(folder)), folder.read_settings().method, ramp_epochs=3)
    assert own.switch_epoch == 8  # window 1 is the first that ends behind the ramp
    told = [remark for remark in remarks_of(folder).remarks if "turning point" in remark]
    assert told == ([own.note] if grows > 0 > shrinks else [])
    assert own.note is None or "norms of query grow and norms of fc1 shrink" in own.note


SLOW = (
    "slow worker: worker 2 holds up the others: it spends 30% of its time waiting for data, they 0%, and they wait for it 40% "
    "of theirs"
)


def test_what_holds_up_the_workers_is_named(tmp_path):
    folder = folder_of(tmp_path, 3)
    of_worker = {"data": [0.0, 0.0, 30.0], "compute": [60.0, 60.0, 60.0], "exchange": [40.0, 40.0, 10.0]}
    for seconds, told in (
        (of_worker, SLOW),
        (of_worker | {"exchange": [40.0, 40.0, 60.0]}, "slow exchange of gradients: every worker waits for it 40% of the time"),
        (of_worker | {"exchange": [9.0, 9.0, 9.0]}, None),
    ):
        lines = [epoch_line(epoch, val_top1=0.9, train_seconds=100.0, worker_seconds=seconds) for epoch in range(3)]
        folder.write_records(EpochLine, lines)
        assert [remark.startswith(told or "?") for remark in remarks_of(folder).remarks] == ([True] if told else [])
