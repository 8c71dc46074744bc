"""A smoke run of a recipe goes through all phases in little time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prelora_ray.config import flat, without_effect
from prelora_ray.config_file import load_settings
from prelora_ray.run_folder import RunFolder
from prelora_ray.train.run import train
from prelora_ray.train.smoke import smoke_run
from tests.runs import TINY_VIT
from tests.test_config import CONFIGS

DIGITS = next(path for path in CONFIGS if path.stem == "digits")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_any_recipe_keeps_all_but_its_length(path):
    """What a user sets beside it counts before that."""
    recipe, smoke = flat(load_settings(path)), flat(smoke_run(str(path), ["train.seed=7", "train.epochs=5"]))
    changed = {key for key in recipe if smoke.get(key) != recipe[key]}
    lengths = {"max_batches", "epochs", "ramp_epochs", "window_epochs", "switch_epoch", "warmup_epochs"}
    others = {"name", "seed", "validate_every", "every_epochs", "min", "resolution"}
    assert {key.rpartition(".")[2] for key in changed} <= lengths | others
    assert (smoke["train.epochs"], smoke["train.seed"]) == (5, 7)
    assert smoke["name"].startswith(f"{path.stem}-fast-")
    assert without_effect(smoke_run(str(path), [])) == []


@pytest.mark.parametrize("train", ["epochs: 8", "epochs: 8, bend: {after: 6, of: 10}"])
def test_a_recipe_that_is_too_short_for_its_test_or_has_none_or_a_bend_is_no_exception(tmp_path, train):
    (tmp_path / "short.yaml").write_text(f"data: {{path: x}}\ntrain: {{{train}}}\nmethod: {{enabled: false}}\n")
    assert smoke_run(str(tmp_path / "short.yaml"), [], name="mine").name == "mine"


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
