"""A plan's arithmetic: against sums by hand, and against steps of two and of four GPUs that were measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prelora_ray.method.phases import Phase
from prelora_ray.plan.cost import (
    BACKWARD_SHARE,
    Memory,
    break_even,
    phase_spans,
    ring_seconds_per_byte,
    sum_by_phase,
    waiting_seconds,
)
from tests.command import ROOT

MIB = 2**20


def measured(name: str) -> list[dict[str, Any]]:
    """Steps of ViT-L/16 in DDP over several links; `link_milliseconds` is what gradients took there."""
    rows: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]
    alone = {row["name"].rpartition(", ")[0]: row["milliseconds"] for row in rows if row["gbit_per_second"] is None}
    return [row | {"alone": alone[row["name"].rpartition(", ")[0]]} for row in rows if row["gbit_per_second"]]


FITTED = measured("2026-11-27-network-h200.json")
"""On two H200s."""
OTHERS = measured("2026-11-27-network-4-h200.json")
"""On four, which no constant was fitted to."""


@pytest.mark.parametrize(
    ("row", "error"),
    [*((row, 0.036) for row in FITTED), *((row, 0.063 if row["phase"] == "lora" else 0.021) for row in OTHERS)],
    ids=[f"{gpus}, {row['name']}" for gpus, rows in (("two", FITTED), ("four", OTHERS)) for row in rows],
)
def test_steps_that_were_measured(row, error):
    gradient_bytes = row["exchanged_bytes"] * (2 if "bf16 exchange" in row["name"] else 1)  # buckets are of float32
    seconds_per_byte = row["link_milliseconds"] / 1e3 / gradient_bytes
    waiting = waiting_seconds(gradient_bytes, seconds_per_byte, BACKWARD_SHARE * row["alone"] / 1e3)
    assert row["alone"] + 1e3 * waiting == pytest.approx(row["milliseconds"], rel=error)


def test_buckets_are_exchanged_one_behind_the_other():
    # One bucket is full as the backward ends, so all of its exchange is waited for.
    assert waiting_seconds(MIB, 3 / MIB, backward_seconds=1.0) == pytest.approx(3)
    # Two of 1 MiB, full at 0.5 and 1 s. In 0.25 s each: 0.5 to 0.75, 1 to 1.25. In 2 s each: 0.5 to 2.5, 2.5 to 4.5.
    assert waiting_seconds(2 * MIB, 0.25 / MIB, backward_seconds=1.0) == pytest.approx(0.25)
    assert waiting_seconds(2 * MIB, 2 / MIB, backward_seconds=1.0) == pytest.approx(3.5)
    # 1, 25 and 1 MiB, full at 1/27, 26/27 and 1 s: the second waits for its gradients, and the third for the second.
    assert waiting_seconds(27 * MIB, 0.01 / MIB, backward_seconds=1.0) == pytest.approx(26 / 27 + 0.26 - 1)


def test_a_ring_sends_twice_all_but_a_share():
    assert ring_seconds_per_byte(4, 3.0) == pytest.approx(0.5)  # 2 x 3/4 of a byte, at 3 a second


def test_memory_is_state_and_images():
    # 100 parameters, 10 of them trained: 4 x 100 + 12 x 10 = 520 bytes; their snapshot 4 x 100 + 8 x 10 = 480.
    memory = Memory(trainable=10, parameters=100, bytes_per_image=50)
    assert memory.peak(8) == 520 + 400
    assert memory.needs(8) == pytest.approx((520 + 400 + 480) / 0.96)
    averaging = Memory(trainable=10, parameters=100, bytes_per_image=50, averaged=90)  # 360 bytes more in each
    assert averaging.peak(8) == 520 + 400 + 360
    assert averaging.needs(8) == pytest.approx((520 + 400 + 480 + 720) / 0.96)


def test_a_run_is_the_sum_of_its_phases():
    spans = phase_spans(epochs=10, switch_epoch=4, warmup_epochs=2)
    costs = {Phase.FULL: [1.0] * 6 + [9.0] * 4, Phase.WARMUP: [1.5] * 10, Phase.LORA: [0.5] * 8 + [0.75] * 2}
    assert sum_by_phase(costs, spans) == {Phase.FULL: 4.0, Phase.WARMUP: 3.0, Phase.LORA: 0.5 + 0.5 + 0.75 + 0.75}
    assert sum_by_phase({Phase.FULL: costs[Phase.FULL]}, phase_spans(10, None, 2)) == {Phase.FULL: 6 + 36}
    assert phase_spans(10, 9, 2) == {Phase.FULL: range(9), Phase.WARMUP: range(9, 10), Phase.LORA: range(10, 10)}


def test_a_late_switch_does_not_pay_for_its_warmup():
    # Full 1, warmup 1.5, lora 0.5 an epoch, warmup of 2: after 5 epochs 5 + 3 + 1.5 = 9.5, after 6 as never, 10.
    costs = {Phase.FULL: [1.0] * 10, Phase.WARMUP: [1.5] * 10, Phase.LORA: [0.5] * 10}
    by_switch = [sum(sum_by_phase(costs, phase_spans(10, switch, 2)).values()) for switch in range(1, 10)]
    assert by_switch[4:7] == [9.5, 10.0, 10.5]
    assert break_even(by_switch, never=10.0) == 5
    assert break_even(by_switch, never=1.0) is None
