"""The failure signatures, over records made by hand."""

from __future__ import annotations

import math

import pytest

from prelora_ray.method.diagnosis import diagnose

SWITCH, FREEZE, END = 20, 24, 40


def record(loss) -> list[dict]:
    """40 epochs at a cosine schedule; `loss` is a function of the epoch and of what the trunk's curve gives there."""
    lines, spent = [], 0.0
    for epoch in range(END):
        rate = 0.5 * (1 + math.cos(math.pi * epoch / END))
        spent += rate
        phase = "full" if epoch < SWITCH else "warmup" if epoch < FREEZE else "lora"
        lines.append({"epoch": epoch, "phase": phase, "learning_rate": rate, "loss": loss(epoch, 2 * spent**-0.3)})
    return lines


RANKS = {f"blocks.{layer}.attn.query": 8 << layer % 4 for layer in range(12)}


def signatures(lines, ranks=RANKS, num_choices=4) -> list[str]:
    return [finding.signature for finding in diagnose(lines, ranks, num_choices)]


def test_a_run_on_its_trunks_curve_is_healthy():
    assert signatures(record(lambda epoch, curve: curve)) == []


def test_a_loss_that_levels_off_tells_of_an_early_switch():
    level = record(lambda epoch, curve: curve)[SWITCH]["loss"]
    lines = record(lambda epoch, curve: max(curve, level))
    (finding,) = diagnose(lines, RANKS, 4)
    expected = sum(line["loss"] for line in record(lambda epoch, curve: curve)[-4:]) / 4
    assert finding.signature == "early_switch"
    assert finding.value == pytest.approx((level / expected - 1) * 100)
    assert "switch after epoch 20" in finding.message


def test_noise_of_the_trunk_is_no_levelling_off():
    level = record(lambda epoch, curve: curve)[SWITCH]["loss"]
    noisy = record(lambda epoch, curve: max(curve, level) * (1 + 0.1 * (-1) ** epoch))
    assert "early_switch" not in signatures(noisy)


def test_a_jump_at_the_freeze_tells_of_a_short_warmup():
    lines = record(lambda epoch, curve: curve * (1.2 if epoch == FREEZE else 1))
    (finding,) = diagnose(lines, RANKS, 4)
    assert finding.signature == "insufficient_warmup"
    assert finding.value == pytest.approx((lines[FREEZE]["loss"] / lines[FREEZE - 1]["loss"] - 1) * 100)
    assert "4 epochs of warmup" in finding.message


def test_a_rise_that_is_usual_for_the_run_is_no_jump():
    assert signatures(record(lambda epoch, curve: curve * (1 + 0.05 * (-1) ** epoch))) == []


@pytest.mark.parametrize(("others", "fires"), [(1, True), (2, False)])
def test_nearly_all_modules_at_one_rank_are_uniform(others, fires):
    ranks = {f"blocks.{layer}.attn.query": 16 if layer < others else 8 for layer in range(12)}
    found = diagnose(record(lambda epoch, curve: curve), ranks, 4)
    assert [finding.signature for finding in found] == ["uniform_ranks"] * fires
    assert diagnose(record(lambda epoch, curve: curve), ranks, 1) == []


def test_nothing_is_said_before_there_is_enough_to_judge():
    assert signatures(record(lambda epoch, curve: curve)[: FREEZE + 1], ranks=None) == []
    assert signatures([], ranks=None) == []
