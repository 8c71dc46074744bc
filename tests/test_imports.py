"""Who may import whom: docs/architecture.md's rules, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "prelora_ray"
MAY_IMPORT = {
    "errors.py": set(),
    "extras.py": {"errors.py"},
    "storage.py": {"errors.py"},
    "nodes.py": {"errors.py"},
    "environment.py": set(),
    "records.py": set(),
    "words.py": set(),
    "measures.py": {"records.py", "words.py"},
    "summaries.py": {"records.py", "measures.py"},
    "section.py": set(),
    "json_output.py": set(),
    "options.py": {"section.py", "errors.py"},
    "torchvision_ops.py": set(),
    "method": {"method"},
    "kernels": {"kernels"},
    "data/augment_settings.py": {"section.py"},
    "data/prepare_settings.py": {"section.py"},
    "config.py": {"method", "data/augment_settings.py", "data/prepare_settings.py", "section.py", "storage.py", "words.py"},
    "config_file.py": {"config.py", "section.py", "storage.py", "errors.py"},
    "run_folder.py": {"records.py", "config.py", "config_file.py", "section.py", "storage.py", "errors.py"},
    "schedule.py": {"method", "records.py", "config.py", "errors.py"},
    "data/draws.py": set(),
    "data/order.py": {"data/draws.py"},
    "data": {"data", "section.py", "storage.py", "errors.py", "extras.py", "words.py"},
    "tasks": {"tasks", "data", "config.py", "words.py"},
    "engine": {
        *("engine", "tasks", "method", "kernels", "data/batch.py", "data/draws.py", "data/token_rows.py", "data/tokenizer.py"),
        *(
            "extras.py",
            "schedule.py",
            "config.py",
            "config_file.py",
            "storage.py",
            "errors.py",
            "words.py",
            "torchvision_ops.py",
        ),
    },
    "integrations": {"integrations", "engine/prelora.py", "method/phases.py", "torchvision_ops.py", "errors.py"},
    "fault_tolerance": {
        *("fault_tolerance", "engine/agreement.py", "engine/optim.py", "engine/snapshot.py", "data/damage.py"),
        *("run_folder.py", "records.py", "config.py", "storage.py", "errors.py", "words.py"),
    },
    "recorded": {
        *("recorded", "schedule.py", "engine/optim.py", "fault_tolerance", "method"),
        *("run_folder.py", "records.py", "measures.py", "summaries.py", "config.py", "config_file.py", "errors.py", "words.py"),
    },
    "monitor": {
        *("monitor", "engine/flops.py", "method", "fault_tolerance/background.py", "fault_tolerance/end.py"),
        *("run_folder.py", "records.py", "measures.py", "config.py", "storage.py", "extras.py"),
    },
    "ray_session.py": {"fault_tolerance/ray_private.py", "errors.py"},
    "inference": {
        *("inference", "fault_tolerance/checkpoint.py", "engine", "tasks", "method", "data"),
        *("run_folder.py", "records.py", "measures.py", "summaries.py", "config.py"),
        *("storage.py", "errors.py", "extras.py", "nodes.py", "torchvision_ops.py", "words.py"),
    },
    "train": {
        *("train", "recorded/run.py", "ray_session.py", "inference/load.py", "inference/fit.py", "fault_tolerance", "monitor"),
        *(
            "engine",
            "tasks",
            "method",
            "data",
            "run_folder.py",
            "records.py",
            "measures.py",
            "summaries.py",
            "config.py",
            "config_file.py",
        ),
        *("environment.py", "storage.py", "errors.py", "nodes.py", "words.py"),
    },
    "sweep": {
        *("sweep", "ray_session.py", "train", "fault_tolerance", "engine", "method"),
        *("recorded", "schedule.py", "run_folder.py", "records.py", "measures.py", "summaries.py"),
        *("config.py", "config_file.py", "section.py", "storage.py", "errors.py", "extras.py", "words.py"),
    },
    "report": {
        *(
            "report",
            "method/architecture.py",
            "recorded",
            "run_folder.py",
            "records.py",
            "measures.py",
            "summaries.py",
            "words.py",
        ),
        *("config.py", "storage.py", "errors.py"),
    },
    "cluster_doctor.py": {"storage.py", "errors.py", "words.py"},
    "doctor.py": {"fault_tolerance", "data", "run_folder.py", "records.py", "errors.py"},
    "bench": {
        *("bench", "environment.py", "ray_session.py", "train", "fault_tolerance", "monitor", "engine", "method", "data"),
        *("run_folder.py", "records.py", "config.py", "config_file.py", "storage.py", "errors.py", "extras.py", "words.py"),
    },
    "plan": {
        *("plan", "recorded/run.py", "engine", "method", "data/manifest.py", "schedule.py"),
        *("run_folder.py", "records.py", "measures.py", "summaries.py"),
        *("config.py", "config_file.py", "section.py", "storage.py", "errors.py", "words.py"),
    },
    "terminal": {
        *("terminal", "report", "sweep", "plan", "inference", "train/dry_run.py", "data", "recorded", "schedule.py", "method"),
        *("run_folder.py", "records.py", "measures.py", "summaries.py", "config.py", "words.py"),
    },
    "bench/commands.py": {"bench", "report", "terminal", "json_output.py", "storage.py", "errors.py", "extras.py"},
    "api.py": {
        *("terminal", "ray_session.py", "recorded", "inference", "train"),
        *("run_folder.py", "config.py", "config_file.py"),
    },
    "first_recipe.py": {"data", "config_file.py", "storage.py", "errors.py", "words.py"},
    "cli.py": {
        *(
            "api.py",
            "engine/known_models.py",
            "first_recipe.py",
            "method/architecture.py",
            "terminal",
            "recorded",
            "ray_session.py",
            "json_output.py",
            "options.py",
            "bench",
            "cluster_doctor.py",
            "doctor.py",
            "report",
            "plan",
            "sweep",
            "inference",
            "train",
            "data",
        ),
        *(
            "run_folder.py",
            "records.py",
            "measures.py",
            "summaries.py",
            "config.py",
            "config_file.py",
            "storage.py",
            "errors.py",
            "nodes.py",
        ),
        *("extras.py", "words.py", "__init__.py"),
    },
    "__main__.py": {"cli.py"},
    "__init__.py": {"api.py", "engine/prelora.py", "train/__init__.py"},
}
"""Lower layers first; what each may import, itself included."""
LAYERS = list(MAY_IMPORT)
METHOD_LIBRARIES = {
    *("torch", "abc", "functools", "hashlib", "itertools", "math", "re"),
    *("collections", "dataclasses", "enum", "typing", "__future__"),
}


def layer(path: Path) -> str:
    """The most exact entry of MAY_IMPORT for a file."""
    name = path.relative_to(ROOT).as_posix()
    return name if name in MAY_IMPORT else name.split("/")[0]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def file_of(module: str) -> Path | None:
    path = ROOT.parent.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_imports_upwards(path: Path):
    allowed = MAY_IMPORT[layer(path)]
    for module in imported(path):
        target = file_of(module) if module.startswith("prelora_ray.") else None
        if target is None:
            continue
        name = target.relative_to(ROOT).as_posix()
        assert name in allowed or name.split("/")[0] in allowed, f"{path.name} imports {module}"
        assert LAYERS.index(layer(target)) <= LAYERS.index(layer(path)), f"{path.name} imports {module} from above"


def test_the_method_is_plain_torch():
    for path in (ROOT / "method").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - {"prelora_ray"}
        assert outside <= METHOD_LIBRARIES, path


def test_the_engine_knows_no_ray():
    run = subprocess.run(
        [sys.executable, "-c", _IMPORT_ENGINE], cwd=ROOT.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.split() == ["no", "ray"], run.stdout + run.stderr


_IMPORT_ENGINE = """
import importlib, pkgutil, sys
import prelora_ray.engine
for module in pkgutil.iter_modules(prelora_ray.engine.__path__):
    importlib.import_module("prelora_ray.engine." + module.name)
print("ray" if "ray" in sys.modules else "no ray")
"""


def test_no_circles():
    imports = {path: {file_of(module) for module in imported(path) if module.startswith("prelora_ray.")} - {None, path}
               for path in ROOT.rglob("*.py")}  # fmt: skip
    done: set[Path] = set()

    def visit(path: Path, trail: list[Path]) -> None:
        assert path not in trail, " -> ".join(p.relative_to(ROOT).as_posix() for p in [*trail[trail.index(path) :], path])
        if path not in done:
            for other in imports[path]:
                visit(other, [*trail, path])
            done.add(path)

    for path in imports:
        visit(path, [])
