"""The wheel: what is in it, and that it trains where nothing else of this project is, with the core's libraries."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.command import ROOT


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this checkout, as building leaves its own beside them; with data and runs, as a user's has."""
    folder = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name, follow_symlinks=False)
    for name in ("data/digits/train-00000.parquet", "runs/digits/config.yaml"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    subprocess.run([*pip, str(source)], check=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_it_holds_the_whole_package_and_nothing_else(source: Path, wheel: Path):
    walked = os.walk(source / "prelora_ray", followlinks=True)
    files = [Path(folder, name) for folder, _, names in walked for name in names]
    package = {path.relative_to(source).as_posix(): path.read_bytes() for path in files}
    assert {"prelora_ray/py.typed", "prelora_ray/recipes/digits.yaml"} <= package.keys()
    assert any(name.startswith("prelora_ray/plan/measured/") for name in package)
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    about = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/"
    assert {name: content for name, content in held.items() if not name.startswith(about)} == package
    assert about + "licenses/LICENSE" in held


def test_the_files_beside_it_speak_of_its_version(wheel: Path):
    version = wheel.name.split("-")[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version in heads[:2]  # what is not released yet may come first


@functools.cache
def distribution(name: str) -> metadata.Distribution:
    return metadata.distribution(name)


def needed(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """What an installer would bring for these, and for what that needs, by name; out of this environment."""
    found: dict[str, metadata.Distribution] = {}
    done, left = set(), [(Requirement(text), "") for text in requirements]
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found[name] = distribution(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in done:
                done.add((name, wanted))
                left += [(Requirement(text), wanted) for text in found[name].requires or []]
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with links to the libraries that it asks for without an extra."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, timeout=120)
    (about,) = packages.glob("prelora_ray-*.dist-info")
    for library in needed(metadata.Distribution.at(about).requires or []).values():
        for name in {file.parts[0] for file in library.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(library.locate_file(name))))
    return folder


def call(environment: Path, folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of the environment, in a folder that holds nothing of this project."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(environment / "bin" / program), *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_it_trains_with_the_libraries_of_the_core(environment: Path, tmp_path: Path):
    there = (
        "import prelora_ray, importlib.util as u; print(prelora_ray.__file__, *map(u.find_spec, ('plotly', 'peft', 'onnx')))"
    )
    told = call(environment, tmp_path, "python", "-c", there).stdout.split()
    assert Path(told[0]).is_relative_to(environment)
    assert told[1:] == ["None"] * 3
    trained = call(environment, tmp_path, "prelora", "train", "digits", "--fast", "--json")
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert (result["switch_epoch"], result["freeze_epoch"], result["epochs"]) == (2, 3, 4)
    evaluated = call(environment, tmp_path, "prelora", "evaluate", result["path"], "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["top1"] == pytest.approx(result["val_top1"])
    planned = call(environment, tmp_path, "prelora", "plan", "digits", "--gpus", "1", "--images", "1000000", "--json")
    assert planned.returncode == 0, planned.stderr
    refused = call(environment, tmp_path, "prelora", "report", result["path"])
    assert (refused.returncode, refused.stderr) == (
        2,
        "prelora: prelora report needs plotly: pip install 'prelora-ray[report]'\n",
    )
