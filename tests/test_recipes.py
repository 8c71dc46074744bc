"""The recipes of jobs/configs come with the package, by their names."""

from __future__ import annotations

import pytest

from prelora_ray.config_file import find_recipe, load_settings, recipe_names
from prelora_ray.errors import UserError
from tests.command import ROOT

CONFIGS = ROOT / "jobs" / "configs"


def test_a_name_is_a_recipe_anywhere_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == sorted(path.stem for path in CONFIGS.iterdir())
    for name in recipe_names():
        assert find_recipe(name).samefile(CONFIGS / f"{name}.yaml")
        assert load_settings(name) == load_settings(CONFIGS / f"{name}.yaml")
    (tmp_path / "digits").mkdir()
    assert load_settings("digits").name == "digits"
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text("{name: own, data: {path: x}}")
    assert load_settings("digits").name == "own"
    with pytest.raises(
        UserError, match=r"^\./digitz is no file: give the path of a recipe, or the name of one of ours: bert_base, "
    ):
        load_settings("./digitz")
