"""The test against worked examples: every expected number below was computed by hand from METHOD's formulas."""

import json
import math
import random

import pytest

from prelora_ray.method.convergence import ConvergenceTest, Step, percent_change

Q0, Q1, V0 = "blocks.0.attn.query", "blocks.1.attn.query", "blocks.0.attn.value"


def run(test: ConvergenceTest, norms: list[dict[str, float]], losses: list[float]):
    return [test.end_epoch(epoch, n, loss) for epoch, (n, loss) in enumerate(zip(norms, losses, strict=True))]


def test_k2_by_hand():
    # query: layer 0 goes 10 -> 10.1 (1 %), layer 1 goes 20 -> 20.6 (3 %): mean 2 %. value: 4 -> 4 (0 %).
    # loss: 2 -> 1.9 (5 %).
    norms = [{Q0: 10, Q1: 20, V0: 4}, {Q0: 10.1, Q1: 20.6, V0: 4}]
    first, second = run(ConvergenceTest(tau=2.1, zeta=5.0001, windows=2, window_epochs=1), norms, [2, 1.9])
    assert first.family_change is None
    assert first.loss_change is None
    assert not first.converged
    assert second.family_change == pytest.approx({"query": 2, "value": 0})
    assert second.module_change == pytest.approx({Q0: 1, Q1: 3, V0: 0})
    assert second.loss_change == pytest.approx(5)
    assert second.converged


@pytest.mark.parametrize(
    ("tau", "zeta", "converged"),
    [(1.0, 9, False), (1.0001, 9, True), (2, 4.9999, False), (2, 5.0001, True)],
)
def test_tau_is_excluded_and_every_family_counts(tau, zeta, converged):
    norms = [{Q0: 100, V0: 50}, {Q0: 101, V0: 50}]  # exactly 1 % and 0 %
    verdict = run(ConvergenceTest(tau, zeta, windows=2, window_epochs=1), norms, [2, 1.9])[-1]
    assert verdict.converged is converged


def test_zeta_is_included():
    verdict = run(ConvergenceTest(tau=1, zeta=50, windows=2, window_epochs=1), [{Q0: 1}, {Q0: 1}], [2, 1])[-1]
    assert verdict.loss_change == 50
    assert verdict.converged


def test_k4_needs_three_quiet_steps_in_a_row():
    # One value a window; steps in percent: 10, 0.5, 0.5, 3, 0.5, 0.5, 0.5. With k = 4 the last three decide.
    values, norm = [], 100.0
    for change in (0, 10, 0.5, 0.5, 3, 0.5, 0.5, 0.5):
        norm *= 1 + change / 100
        values.append(norm)
    verdicts = run(ConvergenceTest(tau=1, zeta=1, windows=4, window_epochs=1), [{Q0: v} for v in values], [1.0] * 8)
    assert [v.converged for v in verdicts] == [False] * 7 + [True]


def test_k4_takes_no_verdict_before_four_windows():
    verdicts = run(ConvergenceTest(tau=1, zeta=1, windows=4, window_epochs=1), [{Q0: 1.0}] * 4, [1.0] * 4)
    assert [v.converged for v in verdicts] == [False, False, False, True]


def test_windows_of_three_epochs_and_a_short_last_one():
    test = ConvergenceTest(tau=100, zeta=100, windows=2, window_epochs=3)
    verdicts = run(test, [{Q0: float(n)} for n in (1, 2, 4, 4, 4, 5, 9, 9)], [3, 2, 1, 1, 1, 1, 7, 7])
    assert [v is not None for v in verdicts] == [False, False, True, False, False, True, False, False]
    assert verdicts[2].window.loss == 2
    assert verdicts[5].window.epoch_end == 6
    assert verdicts[5].family_change == {"query": 25}  # 4 -> 5, the windows' last epochs
    assert verdicts[5].loss_change == 50  # mean 2 -> mean 1


def test_mean_statistic():
    test = ConvergenceTest(tau=100, zeta=100, windows=2, window_epochs=2, norm_statistic="mean")
    verdict = run(test, [{Q0: float(n)} for n in (1, 3, 4, 5)], [1.0] * 4)[-1]
    assert verdict.family_change == {"query": 125}  # mean 2 -> mean 4.5


def test_zero_norms():
    assert percent_change(0, 0) == 0
    assert percent_change(0, 1e-9) == math.inf
    assert percent_change(2, 0) == 100
    test = ConvergenceTest(tau=1e9, zeta=1e9, windows=2, window_epochs=1)
    still, leaves = run(test, [{Q0: 0.0, V0: 1.0}] * 2 + [{Q0: 0.5, V0: 1.0}], [1.0] * 3)[1:]
    assert still.converged
    assert leaves.family_change == {"query": math.inf, "value": 0}
    assert not leaves.converged


def test_no_verdict_rests_on_the_ramp():
    # Steps are windows 1, 2, 3, ...; with k = 3 window t rests on steps t - 1 and t, and epochs 0 to 2 are the ramp.
    test = ConvergenceTest(tau=1, zeta=1, windows=3, window_epochs=1, ramp_epochs=3)
    verdicts = run(test, [{Q0: 1.0}] * 6, [1.0] * 6)
    assert [v.in_ramp for v in verdicts] == [False, True, True, True, False, False]
    assert [v.converged for v in verdicts] == [False, False, False, False, True, True]


def test_state_survives_json_in_the_middle_of_a_window():
    norms, losses = [{Q0: 10 / (1 + i)} for i in range(12)], [5 / (1 + i) for i in range(12)]
    make = lambda: ConvergenceTest(tau=20, zeta=20, windows=3, window_epochs=2, norm_statistic="mean")  # noqa: E731
    undisturbed = run(make(), norms, losses)
    for stop in range(12):
        before, after = make(), make()
        run(before, norms[:stop], losses[:stop])
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert [after.end_epoch(i, norms[i], losses[i]) for i in range(stop, 12)] == undisturbed[stop:]


def test_families_whose_norms_grow_and_shrink_within_the_windows():
    """By hand: query grows 2 % and shrinks 1 %; value, the mean of its layers, shrinks 1 % and grows 0.5 %."""
    test = ConvergenceTest(tau=5, zeta=5, windows=3, window_epochs=1)
    norms = [
        {"blocks.0.attn.query": 100.0, "blocks.0.attn.value": 100.0, "blocks.1.attn.value": 100.0},
        {"blocks.0.attn.query": 102.0, "blocks.0.attn.value": 104.0, "blocks.1.attn.value": 94.0},
        {"blocks.0.attn.query": 100.98, "blocks.0.attn.value": 104.0, "blocks.1.attn.value": 94.94},
        {"blocks.0.attn.query": 100.98, "blocks.0.attn.value": 104.0, "blocks.1.attn.value": 94.0},
    ]
    norms = [{**each, "blocks.0.attn.key": 5.0} for each in norms]  # neither
    verdicts = run(test, norms, [1.0] * 4)
    assert [verdict.growing for verdict in verdicts] == [[], [], ["query", "value"], ["value"]]
    assert [verdict.shrinking for verdict in verdicts] == [[], [], ["value", "query"], ["query", "value"]]
    assert verdicts[1].family_change == pytest.approx({"query": 2, "value": 5, "key": 0})
    assert verdicts[1].signed_change == pytest.approx({"query": 2, "value": -1, "key": 0})
    assert verdicts[2].signed_change == pytest.approx({"query": -1, "value": 0.5, "key": 0})
    assert verdicts[1].module_change == pytest.approx(dict(zip(norms[0], (2, 4, 6, 0), strict=True)))
    assert verdicts[2].record()["signed_change"] == verdicts[2].signed_change


@pytest.mark.parametrize(("key", "value"), [("windows", 1), ("window_epochs", 0)])
def test_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} = {value}"):
        ConvergenceTest(1, 1, **{key: value})


@pytest.mark.parametrize("seed", range(5))
def test_all_steps_are_under_where_the_verdict_says_so(seed):
    rng, test = random.Random(seed), ConvergenceTest(tau=1.0, zeta=5.0, windows=3, window_epochs=1, ramp_epochs=2)
    norms, loss, steps, verdicts = {Q0: 1.0, V0: 1.0}, 1.0, [], []
    for epoch in range(40):
        verdict = test.end_epoch(epoch, dict(norms), loss)
        if verdict.family_change is not None:
            steps.append(Step(epoch + 1, verdict.family_change, verdict.loss_change))
            assert set(test.steps_under(steps)) == {"query", "value", "loss"}
        assert all(count == 2 for count in test.steps_under(steps).values()) == verdict.converged
        verdicts.append(verdict.converged)
        norms = {name: norm * (1 + rng.choice([0.001, 0.001, 0.001, 0.02])) for name, norm in norms.items()}
        loss *= 1 - rng.choice([0.01, 0.01, 0.01, 0.2])
    assert True in verdicts and False in verdicts[3:]


def test_steps_are_counted_in_a_row_from_the_newest_on():
    """By hand: the ramp ends with window 1, three steps count of four, and of the loss the newest one is not under."""
    test = ConvergenceTest(tau=1.0, zeta=5.0, windows=4, window_epochs=2, ramp_epochs=3)
    changes = [(0.5, 0.1, 1.0), (0.5, 0.1, 1.0), (2.0, 0.1, 1.0), (0.5, 1.0, 5.1)]
    steps = [Step(2 * window + 4, {"query": q, "value": v}, loss) for window, (q, v, loss) in enumerate(changes)]
    assert test.steps_under(steps) == {"query": 1, "value": 0, "loss": 0}
    assert test.steps_under(steps[:2]) == {"query": 1, "value": 1, "loss": 1}
    assert test.steps_under([]) == {"loss": 0}
