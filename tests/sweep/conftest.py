"""One sweep that the tests of this folder read, and whose trunk they fork from."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from prelora_ray.records import EpochLine
from prelora_ray.run_folder import RunFolder
from prelora_ray.sweep.run import sweep
from prelora_ray.sweep.settings import Plan, load_sweep
from tests.runs import settings

BASE = {"tau": 1000, "windows": 3, "warmup_epochs": 2, "adapter_learning_rate_scale": 1.5, "adapter_ramp_steps": 10}
"""What the recipe has, but for a pattern of ranks."""
GRID: dict[str, dict[str, Any]] = {
    "never": {"tau": 0},
    "like the recipe": {},
    "alike": {"tau": 500},
}
"""Settings of the sweep, by what they are for."""
DIVERGING = {"windows": 5, "warmup_epochs": 0, "adapter_learning_rate_scale": 1e30}


@dataclass
class Grid:
    folder: Path
    result: dict[str, Any]

    def entry(self, name: str) -> dict[str, Any]:
        """What the result says of a setting."""
        return self.result["settings"][list(GRID).index(name)]

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "grid" / self.entry(name)["trial"])


@pytest.fixture
def load(digits, tmp_path):
    """Reads a sweep over a recipe of 7 epochs with windows of 1, without controls unless it asks for them."""
    return lambda **content: load_over_recipe(digits, tmp_path, **content)


@pytest.fixture(scope="session")
def grid(digits, tmp_path_factory) -> Grid:
    folder = tmp_path_factory.mktemp("sweep")
    return Grid(folder, run(load_over_recipe(digits, folder, name="grid", settings=listed(GRID.values()))))


@pytest.fixture(scope="session")
def trunk(grid) -> RunFolder:
    """Full training with a checkpoint of every epoch."""
    return grid.run("never")


@pytest.fixture(scope="session")
def controlled(grid, digits, tmp_path_factory) -> tuple[Plan, dict[str, Any]]:
    """A sweep over the grid's own runs that trains the control of one, with its result.

    An epoch takes 10 s, and one of phase lora 1 s: a run of 7 with 2 of lora costs 52 s, full training of 5 50 s.
    """
    folder = shutil.copytree(grid.folder, tmp_path_factory.mktemp("controlled"), dirs_exist_ok=True)
    for name in ("never", "like the recipe"):
        run_folder = RunFolder(folder / "grid" / grid.entry(name)["trial"])
        lines = run_folder.epochs()
        run_folder.write_records(EpochLine, [replace(line, seconds=1.0 if line.phase == "lora" else 10.0) for line in lines])
    plan = load_over_recipe(digits, folder, name="grid", settings=listed([{}]), controls={"full": "all"})
    return plan, run(plan)


def listed(methods) -> list[dict[str, Any]]:
    """Settings, which say what they have instead of `BASE`, as a sweep's file has them."""
    settings = [{**BASE, "rank_pattern": None, **method} for method in methods]
    return [{f"method.{key}": value for key, value in setting.items()} for setting in settings]


def load_over_recipe(digits, folder: Path, **content) -> Plan:
    recipe = settings(digits, folder, "recipe", 1).model_dump(mode="json", exclude_unset=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    content = {"recipe": "recipe.yaml", "storage": str(folder), "controls": {"full": "none"}, **content}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_sweep(str(folder / "sweep.yaml"), [])


def run(plan: Plan) -> dict[str, Any]:
    return sweep(plan, lambda _: contextlib.nullcontext())
