"""A smoke run of a recipe goes through all phases in little time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prelora_ray.config import flat
from prelora_ray.config_file import load_settings
from prelora_ray.errors import UserError
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.no_effect import without_effect
from prelora_ray.train.run import train
from prelora_ray.train.smoke import smoke_run
from tests.runs import TINY_VIT
from tests.test_config import CONFIGS

DIGITS = next(path for path in CONFIGS if path.stem == "digits")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_any_recipe_keeps_all_but_its_length(path):
    """What a user sets beside it counts before that."""
    own, short = load_settings(path), smoke_run(str(path), ["train.seed=7", "train.epochs=5"])
    assert [own.image_size(0), own.image_size(299)] == [short.image_size(0), short.image_size(4)]
    recipe, smoke = flat(own), flat(short)
    changed = {key for key in recipe if smoke.get(key) != recipe[key]}
    lengths = {"max_batches", "epochs", "ramp_epochs", "window_epochs", "switch_epoch", "warmup_epochs"}
    others = {"name", "seed", "validate_every", "every_epochs", "min", "resolution"}
    assert {key.rpartition(".")[2] for key in changed} <= lengths | others
    assert (smoke["train.epochs"], smoke["train.seed"]) == (5, 7)
    assert smoke["name"].startswith(f"{path.stem}-fast-")
    assert without_effect(smoke_run(str(path), [])) == []


@pytest.mark.parametrize(
    "train",
    ["epochs: 8", "epochs: 8, bend: {after: 6, of: 10}", "schedule: constant-then-decay, decay_share: 0.9"],
)
def test_a_recipe_that_is_too_short_for_its_test_or_has_none_or_a_bend_or_a_long_decay_is_no_exception(tmp_path, train):
    (tmp_path / "short.yaml").write_text(f"data: {{path: x}}\ntrain: {{{train}}}\nmethod: {{enabled: false}}\n")
    assert smoke_run(str(tmp_path / "short.yaml"), [], name="mine").name == "mine"


def test_its_images_grow_by_an_epoch_a_step_as_far_as_there_are_epochs(tmp_path, caplog):
    """What a user sets beside it counts here too."""
    caplog.set_level("INFO", "prelora_ray")
    steps = [{"until": 10 * number, "image_size": 16 * number, "policy": f"rand-m{number}"} for number in range(1, 6)]
    for count, expected in ((2, [16, 32, 224, 224]), (5, [48, 64, 80, 224])):
        recipe = {"data": {"path": "x"}, "train": {"epochs": 90, "resolution": steps[:count]}}
        (tmp_path / "grows.yaml").write_text(json.dumps(recipe))
        smoke = smoke_run(str(tmp_path / "grows.yaml"), [])
        assert [smoke.image_size(epoch) for epoch in range(4)] == expected
        assert [step.policy for step in smoke.train.resolution] == [f"rand-m{size // 16}" for size in expected if size < 224]
    assert [record.message for record in caplog.records] == ["so short a run leaves out the first 2 steps of train.resolution"]
    assert smoke_run(str(tmp_path / "grows.yaml"), ["train.resolution=[]"]).image_size(0) == 224


def test_what_a_user_sets_may_mend_the_recipe(tmp_path):
    (tmp_path / "rate.yaml").write_text("data: {path: x}\ntrain: {learning_rate: null}\n")
    assert smoke_run(str(tmp_path / "rate.yaml"), ["train.learning_rate=0.5"]).train.learning_rate == 0.5


def test_a_recipe_that_is_none_is_told(tmp_path):
    (tmp_path / "none.yaml").write_text("data: {path: x}\ntrain: 5\n")
    with pytest.raises(UserError, match=r"^train = 5 is not allowed: it must be a mapping"):
        smoke_run(str(tmp_path / "none.yaml"), [])


@pytest.mark.slow
def test_a_smoke_run_sees_a_few_batches_in_each_phase(digits: Path, storage: Path):
    small = {"data.path": str(digits), "model.options": json.dumps(TINY_VIT), "method.r_min": 2, "method.r_max": 8}
    small |= {"workers.max": 1}
    run = smoke_run(str(DIGITS), [f"{key}={value}" for key, value in small.items()], name="smoke", storage=str(storage))
    result = train(run)
    lines = RunFolder.of(run).epochs()
    assert [line.phase for line in lines] == ["full", "full", "warmup", "lora"]
    assert [line.images for line in lines] == [4 * run.data.batch_size] * 4
    assert (result["switch_epoch"], result["freeze_epoch"]) == (2, 3)
    assert lines[-1].val_top1 is not None
    assert len(RunFolder.of(run).read_json("ranks.json")) == 18
