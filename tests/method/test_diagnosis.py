"""The failure signatures, over records made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prelora_ray.method.diagnosis import diagnose
from prelora_ray.records import EpochLine
from tests.lines import epoch_line

SWITCH, FREEZE, END = 20, 24, 40


def record(loss) -> list[EpochLine]:
    """40 epochs at a constant learning rate of 1; `loss` is a function of the epoch and of the trunk's loss there."""
    lines = []
    for epoch in range(END):
        phase = "full" if epoch < SWITCH else "warmup" if epoch < FREEZE else "lora"
        lines.append(epoch_line(epoch, phase=phase, learning_rate=1.0, loss=loss(epoch, 2 * 0.98**epoch)))
    return lines


RANKS = {f"blocks.{layer}.attn.query": 8 << layer % 4 for layer in range(12)}


def signatures(lines, ranks=RANKS, num_choices=4) -> list[str]:
    return [finding.signature for finding in diagnose(lines, ranks, num_choices)]


def test_a_run_on_its_trunks_curve_is_healthy():
    assert signatures(record(lambda epoch, curve: curve)) == []


def test_a_loss_that_levels_off_tells_of_an_early_switch():
    (finding,) = diagnose(record(lambda epoch, curve: max(curve, 2 * 0.98**FREEZE)), RANKS, 4)
    assert finding.signature == "early_switch"
    assert finding.value == pytest.approx((0.98 ** -(END - 1 - FREEZE) - 1) * 100)
    assert "switch after epoch 20" in finding.message


def test_a_pace_within_the_runs_noise_is_no_levelling_off():
    noisy = record(lambda epoch, curve: max(curve, 2 * 0.98**FREEZE) * (1 + 0.25 * (-1) ** epoch))
    assert "early_switch" not in signatures(noisy)


def test_a_jump_at_the_freeze_tells_of_a_short_warmup():
    lines = record(lambda epoch, curve: curve * (1.2 if epoch == FREEZE else 1))
    (finding,) = diagnose(lines, RANKS, 4)
    assert finding.signature == "insufficient_warmup"
    assert finding.value == pytest.approx((lines[FREEZE].loss / lines[FREEZE - 1].loss - 1) * 100)
    assert "method.warmup_epochs = 4 may be too few" in finding.message


def test_a_jump_with_larger_images_is_theirs():
    jump = record(lambda epoch, curve: curve * (1.2 if epoch >= FREEZE else 1))
    grown = [replace(line, image_size=160 if line.epoch < FREEZE else 224) for line in jump]
    assert signatures(jump) == ["insufficient_warmup"] and signatures(grown) == []
    later = [replace(line, image_size=160 if line.epoch < FREEZE - 5 else 224) for line in jump]
    assert signatures(later) == ["insufficient_warmup"]


def test_a_pace_is_that_of_images_of_one_size():
    """Images that grow in phase lora raise the loss once, while it goes on falling as in phase full."""
    risen = record(lambda epoch, curve: curve * (1.3 if epoch >= 32 else 1))
    assert signatures(risen) == ["early_switch"]
    assert signatures([replace(line, image_size=160 if line.epoch < 32 else 224) for line in risen]) == []
    level = record(lambda epoch, curve: max(curve, 2 * 0.98**FREEZE) * (1.3 if epoch >= 32 else 1))
    assert signatures([replace(line, image_size=160 if line.epoch < 32 else 224) for line in level]) == ["early_switch"]


def test_a_rise_that_is_usual_for_the_run_is_no_jump():
    assert signatures(record(lambda epoch, curve: curve * (1 + 0.05 * (-1) ** epoch))) == []


@pytest.mark.parametrize(("others", "fires"), [(1, True), (2, False)])
def test_nearly_all_modules_at_one_rank_are_uniform(others, fires):
    ranks = {f"blocks.{layer}.attn.query": 16 if layer < others else 8 for layer in range(12)}
    found = diagnose(record(lambda epoch, curve: curve), ranks, 4)
    assert [finding.signature for finding in found] == ["uniform_ranks"] * fires
    assert diagnose(record(lambda epoch, curve: curve), ranks, 1) == []


@pytest.mark.parametrize("zero", [range(END), range(SWITCH - 3, SWITCH), [FREEZE - 1], [FREEZE], range(FREEZE, END), [END - 1]])
def test_a_loss_of_exactly_0_is_no_error(zero):
    """It has no logarithm, and nothing is a percentage of it."""
    assert signatures(record(lambda epoch, curve: 0.0 if epoch in zero else curve)) == []


def test_a_loss_next_to_0_and_a_learning_rate_of_0_are_no_errors():
    begin = SWITCH - 6
    lines = record(lambda epoch, curve: 10.0 ** (-50 * (min(max(epoch, begin), SWITCH) - begin)))
    (finding,) = diagnose(lines, RANKS, 4)
    assert finding.signature == "early_switch"
    assert 1e6 < finding.value < float("inf")
    assert signatures([replace(line, learning_rate=0.0) for line in lines]) == []


def test_nothing_is_said_before_there_is_enough_to_judge():
    assert signatures(record(lambda epoch, curve: curve)[: FREEZE + 1], ranks=None) == []
    assert signatures([], ranks=None) == []
