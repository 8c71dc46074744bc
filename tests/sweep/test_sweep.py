"""Sweeps on Ray Tune over a tiny trunk."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import yaml

from prelora_ray.config import BendSettings, Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.ray_private import release_groups_of_dead_actors
from prelora_ray.measures import measures_of
from prelora_ray.recorded.replay import Record, read_record
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import EpochLine, Freeze, NormsLine, Switch
from prelora_ray.report.records import read_sweep
from prelora_ray.report.sweep_table import sweep_table, told_of_controls
from prelora_ray.run_folder import RunFolder
from prelora_ray.sweep.control import full_training_costs, full_training_of_cost, name_controls, on_front
from prelora_ray.sweep.cost import Prices, pareto_front
from prelora_ray.sweep.outcome import outcome
from prelora_ray.sweep.result import read_notes, summarize_sweep, write_note
from prelora_ray.sweep.run import _asha, _optuna
from prelora_ray.sweep.settings import Plan, SweepSettings, keys_without_effect, load_sweep
from tests.chaos.site import wait_for
from tests.lines import epoch_line, norms_line
from tests.sweep.conftest import DIVERGING, GRID, listed, load_over_recipe, run

SWEEPS = Path(__file__).parents[2] / "jobs" / "sweeps"
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


def test_settings_that_agree_are_one_run(grid):
    """tests/sweep/test_fork.py compares it with a straight one's."""
    assert grid.entry("never")["trial"] == "trunk"
    assert grid.entry("like the recipe")["trial"] == grid.entry("alike")["trial"]
    assert [entry["ended"] for entry in grid.result["settings"]] == ["finished"] * len(GRID)
    assert grid.result["trials"] == len(GRID) - 2  # the trunk, and one for two that agree
    assert grid.result["controls"] == []


def test_a_sweep_that_is_done_trains_nothing_again(grid, digits):
    files = [Path(grid.run(name).path, "epochs.jsonl") for name in GRID]
    before = [file.read_bytes() for file in files]
    again = run(load_over_recipe(digits, grid.folder, name="grid", settings=listed(GRID.values())))
    assert again["settings"] == grid.result["settings"]
    assert [file.read_bytes() for file in files] == before


@pytest.mark.slow
def test_a_trial_that_fails_is_told_and_leaves_the_others_alone(grid, digits, tmp_path):
    """It fails for good the first time that its loss is not finite, without another attempt.

    Without warmup it freezes where it forks.
    """
    folder = shutil.copytree(grid.folder, tmp_path, dirs_exist_ok=True)
    result = run(load_over_recipe(digits, folder, name="grid", settings=listed([DIVERGING, {}])))
    failed, finished = result["settings"]
    assert (failed["ended"], finished) == ("failed", grid.entry("like the recipe"))
    diverged = RunFolder(Path(result["path"], failed["trial"]))
    assert re.search(
        r"the loss is not finite at step \d+ .*phase lora; the last good checkpoint is .*/\d{5}-", failed["message"]
    )
    events = diverged.read_lines("events.jsonl")
    assert (events[-1]["event"], events[-1]["message"]) == ("run_failed", failed["message"])
    (switch,), (freeze,) = (RunRecords(diverged).events_of(kind) for kind in (Switch, Freeze))
    assert switch.switch_epoch == freeze.freeze_epoch == 5
    assert "restart" not in [line["event"] for line in events]


@pytest.mark.slow
def test_controls_are_trained_once_all_settings_are(controlled):
    plan, result = controlled
    trials = {entry["trial"]: entry for entry in [result["full"], *result["settings"], *result["controls"]]}
    (setting,) = result["settings"]
    full = setting["full_control"]
    assert (full, setting["rank_1_control"]) == ("full-3-to-5", None)
    assert [entry["ended"] for entry in result["controls"]] == ["finished"]
    assert result["unit"] == "CPU-hours"  # of half a CPU, which a worker asks for
    seconds = {name: entry["cost"] * 2 * 3600 for name, entry in trials.items()}
    assert (seconds["trunk"], seconds[setting["trial"]], seconds[full]) == tuple(map(pytest.approx, (70, 52, 50)))
    assert (RunFolder(plan.folder) / full).read_json("result.json")["switch_epoch"] is None
    points = {name: (entry["val_top1"], entry["cost"]) for name, entry in trials.items()}
    beaten = {a for a in points for b in points if points[b][0] >= points[a][0] and points[b][1] < points[a][1]}
    assert set(result["pareto"]) <= set(points) - beaten
    assert max(points.values())[0] == points[result["pareto"][-1]][0]
    assert result["naive_cost"] * 2 * 3600 == pytest.approx(52 + 50)
    own = [line.seconds for line in RunFolder(Path(plan.folder, full)).epochs() if line.attempt >= 0]
    assert len(own) == 2
    assert result["cost"] * 2 * 3600 == pytest.approx(70 + 2 * 10 + 2 * 1 + sum(own))  # each epoch once
    assert run(plan) == result


@pytest.mark.slow
def test_a_control_of_rank_1_has_adapters_of_rank_1(load):
    result = run(load(settings=[{"method.warmup_epochs": 2}], controls={"full": "none", "rank_1": 0.5}))
    (setting,), (control,) = result["settings"], result["controls"]
    assert (control["trial"], control["ended"]) == (setting["rank_1_control"], "finished")
    assert set(RunFolder(Path(result["path"], control["trial"])).read_json("ranks.json").values()) == {1}


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
    result = run(load(name="asha", space=space, asha={"grace_epochs": 5, "reduction_factor": 2}, concurrent=2))
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
    search = {"name": "optuna", "search": "optuna", "space": space, "objectives": ["val_top1", "cost"]}
    first = run(load(**search, num_settings=3))
    assert len(first["settings"]) == 3
    more = run(load(**search, num_settings=5))
    assert [entry for entry in more["settings"] if entry in first["settings"]] == first["settings"]
    assert len(more["settings"]) == 5
    for entry in more["settings"]:
        assert 0.5 <= entry["setting"]["method.scaling"] <= 4
        assert entry["setting"]["method.warmup_epochs"] in range(4)


def test_a_search_over_text_goes_for_a_low_perplexity(tmp_path):
    recipe = {"task": "mlm", "data": {"path": "data/text"}, "model": {"name": "bert"}, "train": {"epochs": 20}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    space = {"method.scaling": {"min": 0.5, "max": 4}}
    content = {"recipe": "recipe.yaml", "name": "text", "search": "optuna", "space": space, "num_settings": 2}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content | {"asha": {"grace_epochs": 5}}))
    plan = load_sweep(str(tmp_path / "sweep.yaml"), [])
    asha, optuna = _asha(plan), _optuna(plan, [])
    assert asha is not None and (asha.metric, asha._metric_op) == ("val_perplexity", -1.0)
    assert (optuna.metric, optuna.mode) == ("val_perplexity", "min")
    entries = [
        {"trial": name, "val_perplexity": told, "cost": cost}
        for name, told, cost in (("a", 9.0, 1), ("b", 8.0, 2), ("c", 8.5, 3))
    ]
    assert on_front(plan.measure, entries) == ["a", "b"]


def test_notes_are_read_whole_and_a_torn_one_is_told(load, tmp_path):
    plan = load(settings=[{"method.tau": 1.0}])
    write_note(plan, {"method.tau": 1.0}, ended="finished")
    folder = Path(plan.folder, "settings")
    (folder / "a.json.0123.tmp").write_text('{"se')  # what a killed writer left
    assert [note["ended"] for note in read_notes(plan)] == ["finished"]
    (folder / "b.json").write_text('{"se')
    with pytest.raises(UserError, match=r"settings/b\.json is damaged"):
        read_notes(plan)


@pytest.fixture
def warmups() -> Plan:
    """A sweep of the project: five warmups behind one switch, after epoch 90 of 120."""
    return load_sweep(str(SWEEPS / "cifar10_warmup.yaml"), [])


def prices_of(plan: Plan, seconds: float = 3600.0) -> Prices:
    """An hour for each epoch of full training."""
    size = plan.trunk.image_size
    lines = [epoch_line(epoch, seconds=seconds, image_size=size(epoch)) for epoch in range(120)]
    return Prices("GPU-hours", 1.0, plan.trunk, lines)


(TOP1,) = measures_of("classification")


def entry(trial: str, val_top1: float, cost: float, **content) -> dict:
    setting = {"method.switch_epoch": 90, "method.warmup_epochs": 5}
    place = {"setting": setting, "switch_epoch": 90, "rate_left": 0.03, "ended": "finished"}
    return {**place, "trial": trial, "val_top1": val_top1, "cost": cost, **content}


@pytest.mark.parametrize(
    ("after", "cost", "end"), [(90, 105.4, 105), (90, 105.6, 106), (90, 105.5, 105), (60, 61.0, 61), (60, 30.0, 61)]
)
def test_full_training_of_equal_cost_ends_where_that_is_closest(warmups, after, cost, end):
    control = full_training_of_cost(full_training_costs(warmups, prices_of(warmups), after), after, cost)
    assert control == {"control": "full", "train.bend.after": after, "train.epochs": end}
    settings = warmups.settings_of(control, "control")
    assert (settings.train.epochs, settings.method.enabled, settings.checkpoint.keep_trunk) == (end, False, False)
    assert settings.train.bend == BendSettings(after=after, of=120)
    assert parse_settings(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(("after", "cost"), [(90, 119.6), (90, 130.0), (119, 119.2)])
def test_the_trunk_is_the_control_of_what_costs_as_much(warmups, after, cost):
    assert full_training_of_cost(full_training_costs(warmups, prices_of(warmups), after), after, cost) is None


def test_smaller_images_count_as_the_cheaper_epochs_that_they_are():
    """With half the images' side up to epoch 100 an epoch takes a quarter; after 90, 6 of 20 are small: 24 + 14."""
    resolution = "overrides={train.resolution: [{until: 100, image_size: 16}]}"
    plan = load_sweep(str(SWEEPS / "cifar10_warmup.yaml"), [resolution])
    lines = [epoch_line(epoch, seconds=900.0 if epoch < 100 else 3600.0) for epoch in range(120)]
    prices = Prices("GPU-hours", 1.0, plan.trunk, lines)
    assert prices.full(plan.trunk) == 25 + 20
    assert prices.full(plan.full_training(90, 110, "control")) == 96 / 4 + 14
    costs = full_training_costs(plan, prices, 90)
    assert full_training_of_cost(costs, 90, 38.1) == {"control": "full", "train.bend.after": 90, "train.epochs": 110}


@pytest.mark.parametrize(("full", "named"), [("front", [0]), ("all", [0, 1]), ("none", [])])
def test_which_runs_have_full_training_of_equal_cost_beside_them(full, named):
    """The first beats the second; the trunk is the control of the third, which costs more; a stopped run has none."""
    plan = load_sweep(str(SWEEPS / "cifar10_warmup.yaml"), [f"controls.full={full}"])
    entries = [
        entry("cheap", 0.88, 100.0),
        entry("beaten", 0.87, 110.0),
        entry("dear", 0.89, 125.0),
        entry("stopped", 0.5, 100.0, ended="stopped"),
        entry("trunk", 0.90, 120.0, switch_epoch=None, rate_left=None),
    ]
    trunk = Record([norms_line(epoch, {"a": 1.0}) for epoch in range(120)], plan.trunk.method, ramp_epochs=10)
    controls = name_controls(plan, entries, trunk, prices_of(plan))
    names = [f"full-90-to-{end}" for end in (100, 110)]
    assert [control["train.epochs"] for control in controls] == [[100, 110][i] for i in named]
    told = [name if i in named else None for i, name in enumerate(names)]
    assert [entry["full_control"] for entry in entries] == [*told, "trunk", None, None]
    assert {entry["rank_1_control"] for entry in entries} == {None}


def test_costs_of_full_training_are_computed_once_for_a_switch(warmups):
    """However many runs switch there: after each of the epochs 91 to 119, and to the trunk's end."""
    asked = []

    class CountingPrices(Prices):
        def full(self, settings: Settings) -> float:
            asked.append(settings.train.epochs)
            return super().full(settings)

    prices = CountingPrices(*vars(prices_of(warmups)).values())
    entries = [entry(f"run-{number}", 0.8, 100.0 + number) for number in range(5)]
    name_controls(warmups, entries, Record([], warmups.trunk.method, ramp_epochs=0), prices)
    assert asked == list(range(91, 121))


def test_a_control_that_settings_share_is_listed_once(tmp_path):
    """It was trained for the second setting, and is that of the first too: both switch at once, with the same ranks."""
    settings = [{"method.tau": tau} for tau in (1000, 500)]
    plan = load_over_recipe(tmp_path, tmp_path, settings=settings, controls={"full": "none", "rank_1": 1.0})
    trunk = RunFolder.of(plan.trunk)
    trunk.write_settings(plan.trunk)
    trunk.write_records(NormsLine, [norms_line(epoch, {"blocks.0.mlp.fc1": 1.0}) for epoch in range(7)])
    trained = {**settings[1], "control": "rank 1", "method.r_min": 1, "method.r_max": 1, "method.rank_pattern": None}
    trials = [outcome(plan, candidate, read_record(str(trunk))).trial for candidate in (*settings, trained)]
    for folder in (trunk, *(RunFolder(plan.folder) / trial for trial in trials)):
        folder.write_records(EpochLine, [epoch_line(epoch) for epoch in range(7)])
        folder.write_json("result.json", {})
    write_note(plan, trained, ended="finished")
    result = summarize_sweep(plan)
    assert [entry["rank_1_control"] for entry in result["settings"]] == [trials[2]] * 2
    assert [(entry["trial"], entry["ended"]) for entry in result["controls"]] == [(trials[2], "finished")]


def test_only_a_switch_that_leaves_little_of_the_learning_rate_has_adapters_of_rank_1_beside_it():
    """The trunk, which does not switch, has none; nor has a run that was stopped."""
    plan = load_sweep(str(SWEEPS / "cifar10_warmup.yaml"), ["controls.full=none", "controls.rank_1=0.1"])
    late, early = entry("late", 0.88, 100.0, rate_left=0.1), entry("early", 0.87, 110.0, rate_left=0.11)
    others = [entry("trunk", 0.90, 120.0, switch_epoch=None, rate_left=None), entry("stopped", 0.5, 9.0, ended="stopped")]
    trunk = Record([norms_line(epoch, {"a": 1.0}) for epoch in range(120)], plan.trunk.method, ramp_epochs=10)
    (control,) = name_controls(plan, [late, early, *others], trunk, prices_of(plan))
    method = plan.settings_of(control, "control").method
    assert (method.r_min, method.r_max, method.rank_pattern) == (1, 1, None)
    assert late["rank_1_control"].startswith("rank-1_switch-90_")
    assert [other["rank_1_control"] for other in (early, *others)] == [None] * 3


def test_full_training_takes_the_star_from_a_run_that_it_beats():
    trunk, control = entry("trunk", 0.9047, 120.0), entry("full-60-to-80", 0.8947, 80.0)
    runs = [entry("relaxed", 0.8945, 80.0), entry("late", 0.9025, 118.0), entry("dear", 0.91, 130.0)]
    assert on_front(TOP1, [trunk, *runs]) == ["relaxed", "late", "trunk", "dear"]
    assert on_front(TOP1, [trunk, *runs, control]) == ["full-60-to-80", "late", "trunk", "dear"]


@pytest.mark.parametrize(
    ("workers", "unit"),
    [({"gpu": True, "cpus": 4.0}, ("GPU-hours", 1.0)), ({"gpu": False, "cpus": 4.0}, ("CPU-hours", 4.0))],
)
def test_the_unit_of_a_cost_is_what_its_workers_take(workers, unit, tmp_path):
    plan = load_sweep(str(SWEEPS / "digits.yaml"), [], storage=str(tmp_path))
    run = plan.trunk.model_copy(update={"workers": plan.trunk.workers.model_copy(update=workers)})
    folder = RunFolder.of(run)
    folder.write_settings(run)
    folder.write_records(EpochLine, [epoch_line(epoch, seconds=1800.0, world_size=2) for epoch in range(40)])
    prices, forty = Prices.of(folder), run.model_copy(update={"train": run.train.model_copy(update={"epochs": 40})})
    assert (prices.unit, prices.straight(folder.epochs(), forty), prices.full(run)) == (unit[0], 40 * unit[1], 40 * unit[1])


def test_a_stopped_run_lacks_epochs_of_larger_images(warmups):
    """An hour an epoch at 16 pixels (0 to 53), two at 24 (to 83), four at 32; in the run's lora each takes half."""
    size = warmups.trunk.image_size
    hours = {16: 1, 24: 2, 32: 4}
    trunk = [epoch_line(epoch, seconds=3600.0 * hours[size(epoch)], image_size=size(epoch)) for epoch in range(120)]
    prices = Prices("GPU-hours", 1.0, warmups.trunk, trunk)
    lora = [epoch_line(epoch, phase="lora", seconds=1800.0, image_size=16) for epoch in range(40, 50)]
    assert prices.straight([*trunk[:40], *lora], warmups.trunk) == pytest.approx(40 + (10 + 4) * 0.5 + 30 * 1 + 36 * 2)
    grown = [epoch_line(epoch, phase="lora", seconds=5400.0, image_size=24) for epoch in range(54, 60)]  # as measured there
    more = [epoch_line(epoch, phase="lora", seconds=1800.0, image_size=16) for epoch in range(50, 54)]
    run = [*trunk[:40], *lora, *more, *grown]
    earlier = [replace(line, image_size=None) for line in run]  # as an earlier version wrote it
    for lines in (run, earlier):
        assert prices.straight(lines, warmups.trunk) == pytest.approx(40 + 14 * 0.5 + 30 * 1.5 + 36 * 3)


def test_a_stopped_control_lacks_epochs_of_its_own_sizes(warmups):
    """Bent behind epoch 40 to end after 80, it is at 24 pixels from 47 and at 32 from 62."""
    size, hours = warmups.trunk.image_size, {16: 1, 24: 2, 32: 4}
    trunk = [epoch_line(epoch, seconds=3600.0 * hours[size(epoch)], image_size=size(epoch)) for epoch in range(120)]
    prices, bent = Prices("GPU-hours", 1.0, warmups.trunk, trunk), warmups.full_training(40, 80, "check")
    assert [next(epoch for epoch in range(80) if bent.image_size(epoch) == px) for px in (24, 32)] == [47, 62]
    own = [(epoch, bent.image_size(epoch)) for epoch in range(50)]
    lines = [epoch_line(epoch, seconds=3600.0 * hours[pixels], image_size=pixels) for epoch, pixels in own]
    assert prices.straight(lines, bent) == prices.full(bent) == pytest.approx(47 + 15 * 2 + 18 * 4)


def test_controls_stand_in_the_table_beside_the_runs():
    full = {"trial": "trunk", "val_top1": 0.9047, "cost": 120.0}
    runs = [
        {**entry("late", 0.9025, 118.0, switch_epoch=102, rate_left=0.0094), "trainable_fraction": 0.1, "diagnosis": []},
        {**entry("relaxed", 0.8945, 80.0, switch_epoch=60, rate_left=0.217), "trainable_fraction": 0.1, "diagnosis": []},
    ]
    runs[0] |= {"full_control": "trunk", "rank_1_control": "rank-1"}
    runs[1] |= {"full_control": "full-60-to-80", "rank_1_control": None}
    controls = [
        entry(
            "full-60-to-80", 0.8947, 80.0, setting={"control": "full", "train.epochs": 80}, switch_epoch=None, rate_left=None
        ),
        entry(
            "rank-1", 0.9024, 117.0, setting={"control": "rank 1"}, switch_epoch=102, rate_left=0.0094, trainable_fraction=0.01
        ),
    ]
    sweep = {"unit": "GPU-hours", "measure": "val_top1", "full": full, "settings": runs, "controls": controls}
    sweep["pareto"] = on_front(TOP1, [full, *runs, *controls])
    head, rows = sweep_table(sweep)
    shown = [dict(zip([*head[:-3], "star", *head[-2:]], row, strict=True)) for row in rows]
    assert [row["run"] for row in shown] == ["trunk", "full-60-to-80", "rank-1", "late", "relaxed"]
    assert [row["star"] for row in shown] == ["*", "*", "*", "*", ""]
    assert [row["switch_epoch"] for row in shown[:3]] == ["full", "full, to 80", "rank 1"]
    assert [row["rate left, %"] for row in shown] == ["-", "-", "0.9", "0.9", "21.7"]
    assert [row["full, %"] for row in shown[3:]] == ["90.47", "89.47"]
    assert [row["rank 1, %"] for row in shown[3:]] == ["90.24", ""]
    assert [row["GPU-hours"] for row in shown] == ["120", "80", "117", "118", "80"]
    assert told_of_controls(sweep) == "0 of 2 runs end above full training that costs as much"
    controls[0] |= {"ended": "failed", "val_top1": 0.5}  # where it stood
    assert told_of_controls(sweep) == "0 of 1 run ends above full training that costs as much"
    assert sweep_table(sweep)[1][-1][head.index("full, %")] == ""


def test_a_sweep_of_an_earlier_version_is_read(tmp_path):
    settings = [{**entry("a", 0.9, 1.0), "trainable_fraction": 0.1, "diagnosis": [], "message": None, "gpu_hours": 2.0}]
    del settings[0]["cost"], settings[0]["rate_left"]
    before = {"full": {"val_top1": 0.8, "gpu_hours": 3.0}, "settings": settings, "pareto": [0], "trials": 1}
    RunFolder(tmp_path).write_json("sweep.json", {**before, "gpu_hours": 4.0, "naive_gpu_hours": 5.0})
    sweep = read_sweep(str(tmp_path))
    head, rows = sweep_table(sweep)
    assert [row[head.index("worker-hours")] for row in rows] == ["3", "2"]
    assert [row[head.index("")] for row in rows] == ["", "*"]
    assert (sweep["cost"], sweep["naive_cost"]) == (4.0, 5.0)


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
                "objectives": ["val_top1", "cost"],
                "asha": {"grace_epochs": 2},
            },
            "asha is not allowed with two objectives",
        ),
        ({"space": {"method.tau": [1]}, "asha": {"grace_epochs": 1000}}, r"asha.grace_epochs = 1000 is not allowed: .* = \d+$"),
        ({"space": {"method.tau": [1]}, "name": "../up"}, r"name = '../up' is not allowed"),
        ({"space": {"method.tau": [1]}, "recipe": "none.yaml"}, "none.yaml is no file"),
        (
            {"space": {"method.tau": [1]}, "controls": {"full": "some"}},
            r"controls.full = 'some' is not allowed: .* 'front', 'all'",
        ),
        (
            {"space": {"method.tau": [1]}, "overrides": {"train.bend": {"after": 3, "of": 9}}},
            "train.bend is not allowed in a sweep",
        ),
        ({"space": {"method.tau": [1]}, "serach": "grid"}, "serach = 'grid' is not allowed: .* did you mean search"),
    ],
)
def test_what_a_sweep_may_not_ask_is_one_sentence(load, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(**content)


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_of_the_project_is_sound(path):
    plan = load_sweep(str(path), [])
    assert plan.candidates() and plan.sweep.controls.full != "none"
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
    optuna = SweepSettings(**content, search="optuna", num_settings=5, seed=1, objectives=("val_top1", "cost"))
    assert keys_without_effect(optuna) == []
    assert keys_without_effect(SweepSettings(**content, trunk_only=True, concurrent=2)) == [
        "concurrent has no effect, as trunk_only runs no trial"
    ]
    assert keys_without_effect(SweepSettings(**content, trunk_only=True, controls={"full": "all"})) == [
        "controls has no effect, as trunk_only runs no trial"
    ]
