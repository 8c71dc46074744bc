"""A map over tau and zeta agrees with a replay of each point, and with a run of one."""

from __future__ import annotations

import math
import random

import pytest

from prelora_ray.config import MethodSettings
from prelora_ray.recorded.replay import Record, read_record, replay
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import Switch
from prelora_ray.sweep.map import switch_map, what_it_means
from tests.lines import norms_line


def noisy_record(rng: random.Random) -> Record:
    names = [f"blocks.{layer}.{target}" for layer in range(3) for target in ("attn.query", "mlp.fc1")]
    norms, loss, lines = dict.fromkeys(names, 10.0), 3.0, []
    for epoch in range(36):
        lines.append(norms_line(epoch, dict(norms), loss))
        norms = {name: norm * (1 + rng.uniform(0, 0.1) / (epoch + 1)) for name, norm in norms.items()}
        loss *= 1 - rng.uniform(0, 0.2) / (epoch + 1)
    return Record(lines, MethodSettings(), ramp_epochs=3)


@pytest.mark.parametrize("windows", [2, 4])
def test_every_point_is_what_a_replay_gives(windows):
    rng = random.Random(0)
    record = noisy_record(rng)
    method = MethodSettings(windows=windows, window_epochs=3)
    taus, zetas = sorted(rng.uniform(0, 5) for _ in range(8)), sorted(rng.uniform(0, 5) for _ in range(6))
    points = switch_map(record, method, record.ramp_epochs, taus, zetas)
    assert [(point.tau, point.zeta) for point in points] == [(tau, zeta) for tau in taus for zeta in zetas]
    for point in points:
        alone = replay(record, method.model_copy(update={"tau": point.tau, "zeta": point.zeta}), record.ramp_epochs)
        assert (point.switch_epoch, point.ranks) == (alone.switch_epoch, alone.ranks)
    assert len({point.switch_epoch for point in points}) > 3


def test_what_a_switch_means_is_what_the_run_measured(grid):
    run = grid.run("like the recipe")
    record = read_record(str(run))
    meaning = what_it_means(str(run), record.method)
    (point,) = switch_map(record, record.method, record.ramp_epochs, [1000], [1000], meaning)
    result = run.read_json("result.json")
    (switch,) = RunRecords(run).events_of(Switch)
    by_hand = 6 * (0.99 * (2 / 3 / 2 - math.sin(math.pi / 3) / (2 * math.pi)) + 0.01 * 2 / 3) / (0.5 + 6 * 0.505)
    assert point.rate_left == switch.rate_left == pytest.approx(by_hand, abs=0.01)
    assert point.switch_epoch == result["switch_epoch"]
    assert point.trainable_fraction == result["trainable_fraction"]["lora"]
    assert meaning is not None and point.hours == pytest.approx(
        sum(
            meaning.epoch_seconds[stage] * count
            for stage, count in {("full", 4): 1, ("full", 6): 2, ("warmup", 6): 2, ("lora", 6): 1, ("lora", 8): 1}.items()
        )
        / 3600
    )
    assert meaning.hours(3, warmup_epochs=4) is None  # of images of 8 pixels it measured no warmup


def test_a_frozen_prefix_is_taken_off_what_lora_trains(grid):
    """By hand: block 0 of the tiny ViT (width 16) is frozen whole, and what stands in front of the blocks."""
    run = grid.run("like the recipe")
    record = read_record(str(run))
    adapted = what_it_means(str(run), record.method)
    prefix = what_it_means(str(run), record.method.model_copy(update={"freeze": "prefix"}))
    assert adapted and prefix
    (point,) = switch_map(record, record.method, record.ramp_epochs, [1000], [1000])
    assert point.ranks
    ranks = {name: 0 if name.startswith("blocks.0.") else 2 for name in point.ranks}
    d, hidden, tokens = 16, 64, 16 + 1
    sides = 2 * (4 * 2 * d + 2 * (d + hidden)) * 2
    linears = 3 * (3 * d * d + 3 * d + d * d + d + 2 * d * hidden + hidden + d)
    norms = 3 * 2 * 2 * d + 2 * d
    front, head = 3 * 2 * 2 * d + d + d + tokens * d, 10 * d + 10
    parameters = linears + norms + front + head + sides
    assert adapted.trainable_fraction(ranks) == (norms + front + head + sides) / parameters
    assert prefix.trainable_fraction(ranks) == (norms - 2 * 2 * d + head + sides) / parameters
