"""Sweeps on Ray Tune over a tiny trunk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray

from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.ray_private import release_groups_of_dead_actors
from prelora_ray.sweep.cost import pareto_front
from prelora_ray.sweep.outcome import outcome
from prelora_ray.sweep.replay import Record, read_record
from prelora_ray.sweep.result import read_notes, write_note
from prelora_ray.sweep.settings import SweepSettings, keys_without_effect, load_sweep
from tests.chaos.site import wait_for
from tests.lines import norms_line
from tests.runs import assert_same_bits, final, last
from tests.sweep.conftest import GRID, listed, load_over_recipe, run

STALE_ADDRESS = Path("/tmp/ray/ray_current_cluster")


@pytest.fixture
def stale_address():
    """What a cluster that ended badly leaves on a machine."""
    before = STALE_ADDRESS.read_text() if STALE_ADDRESS.exists() else None
    STALE_ADDRESS.parent.mkdir(exist_ok=True)
    STALE_ADDRESS.write_text("127.0.0.1:1")
    yield
    if before is None:
        STALE_ADDRESS.unlink()
    else:
        STALE_ADDRESS.write_text(before)


def test_settings_that_agree_are_one_run_with_the_bits_of_a_straight_one(grid, undisturbed):
    """The straight run's on Ray Train alone; tests/sweep/test_fork.py compares what else the trial has."""
    assert grid.entry("never")["trial"] == "trunk"
    assert grid.entry("like the recipe")["trial"] == grid.entry("alike")["trial"]
    assert grid.result["trials"] == len(GRID) - 2
    assert 0 < grid.result["gpu_hours"] < grid.result["naive_gpu_hours"]
    assert_same_bits(last(grid.run("like the recipe")), final(undisturbed(1)))


def test_a_sweep_that_is_done_trains_nothing_again(grid, digits):
    names = [name for name in GRID if name != "diverging"]  # which is tried again
    files = [Path(grid.run(name).path, "epochs.jsonl") for name in names]
    before = [file.read_bytes() for file in files]
    again = run(load_over_recipe(digits, grid.folder, name="grid", settings=listed(names)))
    assert again["settings"] == [grid.entry(name) for name in names]
    assert [file.read_bytes() for file in files] == before


def test_a_trial_that_fails_is_told_and_leaves_the_others_alone(grid):
    """It fails for good the first time that its loss is not finite, without another attempt."""
    assert [grid.entry(name)["ended"] for name in GRID] == ["finished"] * (len(GRID) - 1) + ["failed"]
    message = grid.entry("diverging")["message"]
    assert re.search(r"the loss is not finite at step \d+ .*phase warmup; the last good checkpoint is .*/\d{5}-", message)
    events = grid.run("diverging").read_lines("events.jsonl")
    assert (events[-1]["event"], events[-1]["message"]) == ("run_failed", message)
    assert "restart" not in [line["event"] for line in events]


def test_the_trunk_alone_tells_where_settings_switch(load, trunk):
    """The trunk of another test serves: it is the same run."""
    published = [{"method.tau": tau, "method.zeta": zeta} for tau, zeta in ((1000, 1000), (0.0, 1000))]
    plan = load(settings=published, trunk_only=True, name="calibration", overrides={"method.windows": 4})
    record = read_record(str(trunk))
    assert [outcome(plan, setting, record).switch_epoch for setting in plan.candidates()] == [4, None]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asha_stops_trials_and_the_rest_find_room(load, stale_address):
    space = {"method.warmup_epochs": [0, 1, 2], "method.scaling": [0.5, 1.0, 2.0, 4.0]}
    result = run(load(name="asha", space=space, asha={"grace_epochs": 4, "reduction_factor": 2}, concurrent=2))
    ended = [entry["ended"] for entry in result["settings"]]
    assert set(ended) == {"finished", "stopped"}
    assert len(ended) == 12
    wait_for(all_room_is_given_back, 60, "all room is given back")


def all_room_is_given_back() -> bool:
    release_groups_of_dead_actors()  # as the sweep does while it goes on; here those of the last trials that it stopped
    return ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_optuna_goes_on_with_what_it_has_tried(load):
    space = {"method.warmup_epochs": {"min": 0, "max": 3}, "method.scaling": {"min": 0.5, "max": 4, "log": True}}
    search = {"name": "optuna", "search": "optuna", "space": space, "objectives": ["val_top1", "gpu_hours"]}
    first = run(load(**search, num_settings=3))
    assert len(first["settings"]) == 3
    more = run(load(**search, num_settings=5))
    assert [entry for entry in more["settings"] if entry in first["settings"]] == first["settings"]
    assert len(more["settings"]) == 5
    for entry in more["settings"]:
        assert 0.5 <= entry["setting"]["method.scaling"] <= 4
        assert entry["setting"]["method.warmup_epochs"] in range(4)


def test_notes_are_read_whole_and_a_torn_one_is_told(load, tmp_path):
    plan = load(settings=[{"method.tau": 1.0}])
    write_note(plan, {"method.tau": 1.0}, ended="finished")
    folder = Path(plan.folder, "settings")
    (folder / "a.json.0123.tmp").write_text('{"se')  # what a killed writer left
    assert [note["ended"] for note in read_notes(plan)] == ["finished"]
    (folder / "b.json").write_text('{"se')
    with pytest.raises(UserError, match=r"settings/b\.json is damaged"):
        read_notes(plan)


def test_pareto_front_is_what_nothing_beats():
    points = [(0.9, 5.0), (0.8, 1.0), (0.9, 4.0), (0.7, 2.0), (0.95, 9.0), (0.8, 1.5)]
    assert pareto_front(points) == [1, 2, 4]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"space": {"train.seed": [1]}}, r"train.seed is not allowed: trials share their trunk"),
        ({"space": {"method.tau": {"min": 0.1, "max": 1}}}, r"space.method.tau is a range, of which search: grid"),
        ({"space": {"method.r_min": [32], "method.r_max": [16]}}, r"r_min"),
        ({"space": {"method.tau": [-1]}}, r"method.tau = -1 is not allowed"),
        ({"space": {}}, "space or settings must be given"),
        ({"settings": [{"method.tau": 1}, {"method.zeta": 1}]}, "settings differ in their keys"),
        (
            {
                "space": {"method.tau": [1]},
                "objectives": ["val_top1", "gpu_hours"],
                "asha": {"grace_epochs": 2},
            },
            "asha is not allowed with two objectives",
        ),
        ({"space": {"method.tau": [1]}, "asha": {"grace_epochs": 1000}}, r"asha.grace_epochs = 1000 is not allowed: .* = \d+$"),
        ({"space": {"method.tau": [1]}, "name": "../up"}, r"name = '../up' is not allowed"),
        ({"space": {"method.tau": [1]}, "recipe": "none.yaml"}, "none.yaml is no file"),
        ({"space": {"method.tau": [1]}, "serach": "grid"}, "serach = 'grid' is not allowed: .* did you mean search"),
    ],
)
def test_what_a_sweep_may_not_ask_is_one_sentence(load, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(**content)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "jobs" / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_of_the_project_is_sound(path):
    plan = load_sweep(str(path), [])
    assert plan.candidates()
    assert not plan.trunk.method.enabled and plan.trunk.checkpoint.keep_trunk
    assert f"prelora sweep jobs/sweeps/{path.name}" in path.read_text().splitlines()[0]


def test_paths_are_those_of_the_command_and_not_of_a_trial(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = load(space={"method.tau": [1]}, storage="runs", name="here", overrides={"data.path": "data/digits"})
    assert plan.folder == str(tmp_path / "runs" / "here")
    assert plan.trunk.storage == plan.folder
    assert plan.trunk.data.path == str(tmp_path / "data" / "digits")


def test_trials_are_named_by_what_makes_them(load):
    """Settings that switch alike and have the same ranks are one; r_max counts by the ranks that it comes to."""

    def names(**space: list) -> list[str]:
        plan = load(space={f"method.{key}": values for key, values in space.items()})
        norms = [{f"blocks.{layer}.attn.query": 10.0 + layer * epoch / 100 for layer in range(3)} for epoch in range(7)]
        trunk = Record([norms_line(*line) for line in enumerate(norms)], plan.trunk.method, ramp_epochs=1)
        return [outcome(plan, candidate, trunk).trial for candidate in plan.candidates()]

    first = names(tau=[0.5, 1.0], warmup_epochs=[1, 2])
    assert first[0] == first[2] != first[1] == first[3]
    assert first[0].startswith("switch-3_warmup_epochs-1_")
    small, large = names(r_max=[4, 8])
    assert small.startswith("switch-3_") and small != large


def test_settings_without_effect_are_told():
    content = {"name": "s", "recipe": "r.yaml", "space": {"method.tau": [1.0]}}
    grid = SweepSettings(**content, num_settings=5, objectives=("val_top1",))
    assert keys_without_effect(grid) == [
        "num_settings has no effect, as a grid draws nothing",
        "objectives has no effect, as Optuna alone chooses by them",
    ]
    optuna = SweepSettings(**content, search="optuna", num_settings=5, seed=1, objectives=("val_top1", "gpu_hours"))
    assert keys_without_effect(optuna) == []
    assert keys_without_effect(SweepSettings(**content, trunk_only=True, concurrent=2)) == [
        "concurrent has no effect, as trunk_only runs no trial"
    ]
