"""The package without its extras: what works, and what a command says that needs one."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from prelora_ray.records import NormsLine
from prelora_ray.run_folder import RunFolder
from tests.command import ROOT, prelora_here, prelora_without
from tests.lines import norms_line

PACKAGE = ROOT / "prelora_ray"
WITH_ANOTHER = {"pydantic_core": "pydantic", "triton": "torch"}
"""Modules that come with the one named, and are of no use without it."""
DEVELOPING = {"dev", "docs"}
"""Extras that no command needs."""
NEED_AN_EXTRA = {
    *("prelora_ray.report.figures", "prelora_ray.report.page"),
    *("prelora_ray.monitor.mlflow_run", "prelora_ray.monitor.wandb_run"),
    *("prelora_ray.integrations.lightning", "prelora_ray.integrations.transformers", "prelora_ray.engine.text_model"),
}
"""What is imported only once it is known that its extra is there, or by whoever has it."""


def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return content


def name_of(requirement: str) -> str:
    """`torch` of `torch>=2.11,<2.14`, as package indexes normalise it."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return normalised(match[0])


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def extras() -> dict[str, set[str]]:
    """What each extra brings, by the names that indexes know; those of other extras that it names included."""
    given: dict[str, list[str]] = project()["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        own = [r for r in given[extra] if name_of(r) != "prelora-ray"]
        others = [other for r in given[extra] if r not in own for other in r.partition("[")[2].rstrip("]").split(",")]
        return {name_of(r) for r in own}.union(*map(brought, others))

    return {extra: brought(extra) for extra in given}


def libraries(path: Path) -> set[str]:
    """Modules of others that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"prelora_ray"}


@functools.cache
def installed() -> Mapping[str, list[str]]:
    """Names of what brought each module."""
    return metadata.packages_distributions()


def distributions(module: str) -> set[str]:
    """Names of what may have brought a module; of one that is not installed, its own."""
    return {normalised(name) for name in installed().get(module, [module])}


CASES = {
    "report": ("plotly", ["report", "runs/any"], "prelora report needs plotly", "report"),
    "report --png": ("kaleido", ["report", "runs/any", "--png", "x"], "prelora report needs kaleido", "report"),
    "plan --picture": ("plotly", ["plan", "digits", "--picture", "x.html"], "--picture needs plotly", "report"),
    "replay --picture": (
        "plotly",
        ["replay", "any", "--tau", "1,2", "--picture", "x.html"],
        "--picture needs plotly",
        "report",
    ),
    "bench network --picture": ("plotly", ["bench", "network", "--picture", "x.html"], "--picture needs plotly", "report"),
    "bench phases": ("peft", ["bench", "phases"], "prelora bench phases needs peft", "bench"),
    "sweep": (
        "optuna",
        ["sweep", "jobs/sweeps/digits.yaml", "--set", "search=optuna"],
        "prelora sweep with search = 'optuna' needs optuna",
        "sweep",
    ),
}


QUICK = {"report"}
"""The case that stands for the others in `make test`: each takes a process that imports all else."""


@pytest.mark.parametrize(
    ("missing", "arguments", "needs", "extra"),
    [pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow]) for name, case in CASES.items()],
)
def test_a_command_says_in_a_sentence_what_to_install(missing: str, arguments: list[str], needs: str, extra: str):
    told = prelora_without(missing, *arguments)
    assert told.stderr == f"prelora: {needs}: pip install 'prelora-ray[{extra}]'\n"
    assert (told.returncode, told.stdout) == (2, "")
    assert missing in extras()[extra]


@pytest.mark.slow
def test_a_map_without_a_picture_needs_no_plotly(tmp_path: Path):
    RunFolder(tmp_path).write_records(NormsLine, [norms_line(epoch, {"blocks.0.mlp.fc1": 1.0}) for epoch in range(9)])
    told = prelora_without("plotly", "replay", str(tmp_path / "norms.jsonl"), "--tau", "0.5,1", "--json")
    assert (told.returncode, told.stderr) == (0, "")
    assert len(json.loads(told.stdout)["settings"]) == 2


@pytest.mark.parametrize(
    ("form", "marker", "library"), [("onnx", "model.onnx", "onnxruntime"), ("peft", "adapter_config.json", "peft")]
)
def test_a_form_of_an_export_says_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, marker: str, library: str
):
    (tmp_path / marker).touch()
    monkeypatch.setitem(sys.modules, library, None)
    told = prelora_here("predict", str(tmp_path), "cat.png")
    assert told.stderr == f"prelora: {tmp_path / marker} needs {library}: pip install 'prelora-ray[{form}]'\n"
    assert (told.returncode, told.stdout) == (2, "")
    assert library in extras()[form]


def test_everything_else_is_imported_without_them():
    optional = set().union(*(names for extra, names in extras().items() if extra not in DEVELOPING))
    modules = [module for module in installed() if distributions(module) & optional]
    assert {"plotly", "optuna", "onnxruntime", "peft", "mlflow"} <= set(modules)
    command = [sys.executable, "-c", _IMPORT_ALL, ",".join(modules), ",".join(NEED_AN_EXTRA)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) > 100


_IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import prelora_ray
names = {module.name for module in pkgutil.walk_packages(prelora_ray.__path__, "prelora_ray.")}
names -= {*sys.argv[2].split(","), "prelora_ray.kernels.passes_triton"}
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    core = {name_of(requirement) for requirement in project()["dependencies"]}
    used = set().union(*map(libraries, PACKAGE.rglob("*.py")))
    found = {module: distributions(WITH_ANOTHER.get(module, module)) for module in used}
    declared = core.union(*(names for extra, names in extras().items() if extra not in DEVELOPING))
    assert {module for module, names in found.items() if not names & declared} == set()
    assert core - set().union(*found.values()) == set()


def test_the_core_has_nothing_of_an_extra():
    core = {name_of(requirement) for requirement in project()["dependencies"]}
    assert {extra: names & core for extra, names in extras().items() if names & core} == {}


def test_all_of_them_are_in_one_which_make_install_takes():
    found = extras()
    assert found["all"] == set().union(*(names for extra, names in found.items() if extra not in DEVELOPING))
    assert "--editable '.[all,dev,docs]'" in (ROOT / "Makefile").read_text()


def test_the_page_has_a_row_for_each():
    table = (ROOT / "docs" / "operations.md").read_text().partition("| extra | brings | for |")[2].partition("\n\n")[0]
    rows = {extra for line in table.splitlines() for extra in re.findall(r"`(\w+)`", line.split("|")[1] if line else "")}
    assert rows == set(extras()) - DEVELOPING


def test_pages_name_extras_that_there_are():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *PACKAGE.rglob("*.py")]
    named = {
        extra
        for page in pages
        for names in re.findall(r"prelora-ray\[([a-z,]+)\]", page.read_text())
        for extra in names.split(",")
    }
    assert {"heic", "mlflow", "report"} <= named <= set(extras())


@pytest.mark.parametrize("page", ["jobs/Dockerfile", "cluster.yaml"])
def test_nodes_have_what_jobs_need(page: str):
    """`jobs/` has a script for each command that runs there."""
    needed = {extra for _, arguments, _, extra in CASES.values() if (ROOT / "jobs" / f"{arguments[0]}.py").exists()}
    assert needed == {"report", "sweep"}
    (installed,) = re.findall(r"pip install .* '\.\[(.*)\]'$", (ROOT / page).read_text(), re.MULTILINE)
    assert set(installed.split(",")) == needed
