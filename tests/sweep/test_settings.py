"""A sweep's file with what the command line changes in it. Nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prelora_ray.errors import UserError
from prelora_ray.sweep.settings import Plan, load_sweep

RECIPE = {"data": {"path": "x"}, "train": {"epochs": 30, "learning_rate": 2e-3, "ramp_epochs": 4}, "method": {"r_max": 32}}
SWEEP = {
    "recipe": "recipe.yaml",
    "overrides": {"train.epochs": 40, "train.seed": 3},
    "space": {"method.tau": [1.0, 2.0], "method.zeta": [5.0]},
}


def loaded(folder: Path, *overrides: str) -> Plan:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return load_sweep(str(folder / "sweep.yaml"), list(overrides))


@pytest.mark.parametrize(
    ("overrides", "epochs", "seed"),
    [
        ((), 40, 3),
        (("overrides.train.epochs=24",), 24, 3),
        (("overrides={train.epochs: 24}",), 24, 3),
        (("overrides.train={epochs: 24}", "overrides.train.seed=5"), 24, 5),
        (("overrides=null", "overrides={train.epochs: 24}"), 24, 0),
    ],
)
def test_an_override_leaves_the_recipes_and_the_sweeps_others(tmp_path, overrides, epochs, seed):
    train = loaded(tmp_path, *overrides).trunk.train
    assert (train.epochs, train.seed, train.learning_rate, train.ramp_epochs) == (epochs, seed, 2e-3, 4)


@pytest.mark.parametrize(
    ("override", "space"),
    [
        ("space.method.tau=[4.0]", {"method.tau": [4.0], "method.zeta": [5.0]}),
        ("space.method.windows=[3]", {"method.tau": [1.0, 2.0], "method.zeta": [5.0], "method.windows": [3]}),
        ("space={method.zeta: [2.0]}", {"method.tau": [1.0, 2.0], "method.zeta": [2.0]}),
    ],
)
def test_a_key_of_the_space_is_set_by_its_path(tmp_path, override, space):
    assert loaded(tmp_path, override).sweep.space == space


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("space.method.tau=3", "space.method.tau = 3 is not allowed: it must be a list, such as [a, b], or a mapping, such as"),
        ("space.method.tau={min: 1}", "space.method.tau.max is missing: it must be given"),
        ("space.method.tau={min: 1, max: 2, x: 3}", "space.method.tau.x = 3 is not allowed: there is no such key"),
        (
            "space.method.tau={min: 2, max: 1}",
            "space.method.tau = {'min': 2, 'max': 1} is not allowed: it must be a list, such as [a, b], or a range whose min",
        ),
        ("space.method.tau=[x]", "method.tau = 'x' is not allowed: it must be a valid number"),
        ("space.train.seed=[1]", "space.train.seed is not allowed: trials share their trunk, so they differ in method.tau"),
        ("asha={grace_epochs: 0}", "asha.grace_epochs = 0 is not allowed: it must be greater than or equal to 1"),
        ("overrides.data.path.x=1", "data.path = {'x': 1} is not allowed: it must be a valid string"),
        (
            "overrides.train.epochs=2026-01-01",
            "train.epochs = datetime.date(2026, 1, 1) is not allowed: it must be a valid integer",
        ),
        ("objectives=[]", "objectives = [] is not allowed: it must be a list of at least 1"),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(tmp_path, override, sentence):
    with pytest.raises(UserError) as error:
        loaded(tmp_path, override)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)
