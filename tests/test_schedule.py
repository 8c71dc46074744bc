"""From settings and a record to a switch."""

from __future__ import annotations

import pytest

from prelora_ray.config import MethodSettings
from prelora_ray.method.phases import Phase
from prelora_ray.recorded.replay import Record, replay
from prelora_ray.schedule import decide, phase_schedule, ranks_for
from tests.lines import norms_line

NAMES = ["blocks.0.attn.query", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
EPOCHS = [norms_line(epoch, dict.fromkeys(NAMES, 1.0)) for epoch in range(9)]
"""Nothing changes, so that the second window converges."""
METHOD = MethodSettings(windows=2, window_epochs=2, warmup_epochs=1, r_min=2, r_max=8)


def test_a_run_decides_up_to_its_switch():
    schedule = phase_schedule(METHOD, 0, NAMES)
    assert [(verdict.window.epoch_end, verdict.converged) for verdict in decide(schedule, EPOCHS)] == [(2, False), (4, True)]
    assert (schedule.phase, schedule.switched_at) == (Phase.WARMUP, 4)


def test_no_switch_rests_on_the_ramp():
    schedule = phase_schedule(METHOD, 3, NAMES)
    decide(schedule, EPOCHS)
    assert schedule.switched_at == 6  # the ramp reaches into window 1, so the step to window 2 is the first


@pytest.mark.parametrize("enabled", [True, False])
def test_a_replay_tells_where_a_control_would_have_switched(enabled):
    method = METHOD.model_copy(update={"enabled": enabled})
    schedule = phase_schedule(method, 0, NAMES)
    decide(schedule, EPOCHS)
    assert schedule.switched_at == (4 if enabled else None)
    found = replay(Record(EPOCHS, method, 0, rates_left=[1.0, 0.9, 0.8, 0.6, 0.4]), method, 0)
    assert (found.switch_window, found.switch_epoch, found.rate_left, found.reason) == (1, 4, 0.4, None)


def test_given_ranks_stand_in_place_of_assigned_ones():
    method = METHOD.model_copy(update={"rank_pattern": {"query": 16, "blocks.0.mlp.fc1": 0, "blocks.1.mlp.fc1": 4}})
    assert list(ranks_for(method, {}, NAMES).values()) == [16, 0, 4]
    found = replay(Record(EPOCHS, method, 0), method, 0)
    assert found.ranks == dict(zip(NAMES, [16, 0, 4], strict=True))
