"""A plan's arithmetic: against sums by hand, and against steps of two GPUs that were measured."""

from __future__ import annotations

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

MIB = 2**20
# ViT-L/16 at 224 in DDP on two H100s, 256 images each, torch 2.11, November 2026: milliseconds of a step inside NVLink,
# bytes of its gradients, and milliseconds where an all-reduce of n bytes takes 2 n / bandwidth longer, by Gbit/s
# (docs/plan.md).
MEASURED = {
    "full": (234, 1_217_306_528, {100: 326, 25: 907, 10: 2072, 5: 4018, 1: 19_600}),
    "lora bf16": (205, 65_052_576, {100: 206, 25: 220, 10: 257, 5: 354, 1: 1156}),
    "lora fp8": (188, 65_052_576, {100: 191, 25: 205, 10: 238, 5: 336, 1: 1131}),
}


@pytest.mark.parametrize(
    ("phase", "gbit"), [(phase, gbit) for phase, (_, _, steps) in MEASURED.items() for gbit in steps], ids=str
)
def test_steps_that_were_measured(phase, gbit):
    compute, gradient_bytes, steps = MEASURED[phase]
    waiting = waiting_seconds(gradient_bytes, 2 / (gbit * 1e9 / 8), BACKWARD_SHARE * compute / 1e3)
    assert compute + 1e3 * waiting == pytest.approx(steps[gbit], rel=0.05)


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
    assert memory.fits(8, total=(520 + 400 + 480) / 0.96)
    assert not memory.fits(9, total=(520 + 400 + 480) / 0.96)


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
