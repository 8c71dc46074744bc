"""Who may import whom: docs/architecture.md's rules, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "prelora_ray"
MAY_IMPORT = {
    "method": {"method"},
    "data/draws.py": set(),
    "data/order.py": {"data/draws.py"},
    "data": {"data", "storage.py", "errors.py"},
    "errors.py": set(),
    "storage.py": set(),
    "torchvision_ops.py": set(),
    "config.py": {"method", "storage.py"},
    "nodes.py": set(),
    "config_file.py": {"config.py", "storage.py", "errors.py"},
    "run_folder.py": {"config.py", "config_file.py", "storage.py", "errors.py"},
    "schedule.py": {"method", "config.py"},
    "kernels": {"kernels"},
    "monitor": {"monitor"},
    "train": {
        "train",
        "nodes.py",
        "kernels",
        "method",
        "schedule.py",
        "data",
        "monitor",
        "config.py",
        "config_file.py",
        "run_folder.py",
        "storage.py",
        "errors.py",
        "torchvision_ops.py",
    },
    "trained.py": {"train", "config.py", "run_folder.py", "storage.py"},
    "evaluate.py": {"trained.py", "train", "data", "nodes.py", "storage.py"},
    "doctor.py": {"train", "data", "run_folder.py", "errors.py"},
    "export.py": {"trained.py", "method", "data", "storage.py", "errors.py", "torchvision_ops.py"},
    "sweep": {
        "sweep",
        "train",
        "method",
        "schedule.py",
        "config.py",
        "config_file.py",
        "run_folder.py",
        "storage.py",
        "errors.py",
    },
    "report": {"report", "config.py", "run_folder.py", "storage.py"},
    "bench": {"bench", "train", "method", "data", "errors.py", "config.py", "config_file.py", "run_folder.py", "storage.py"},
    "bench/commands.py": {"bench", "console.py", "errors.py", "json_output.py", "storage.py"},
    "json_output.py": set(),
    "console.py": {"config.py", "data", "run_folder.py", "sweep", "report", "evaluate.py"},
    "cli.py": {
        "console.py",
        "config.py",
        "config_file.py",
        "run_folder.py",
        "errors.py",
        "nodes.py",
        "evaluate.py",
        "export.py",
        "doctor.py",
        "data",
        "train",
        "sweep",
        "report",
        "bench",
        "json_output.py",
        "storage.py",
    },
    "__main__.py": {"cli.py"},
    "__init__.py": set(),
}
METHOD_LIBRARIES = {"torch", "hashlib", "itertools", "math", "re", "collections", "dataclasses", "enum", "typing", "__future__"}


def room(path: Path) -> str:
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
    allowed = MAY_IMPORT[room(path)]
    for module in imported(path):
        target = file_of(module) if module.startswith("prelora_ray.") else None
        if target is None:
            continue
        name = target.relative_to(ROOT).as_posix()
        assert name in allowed or name.split("/")[0] in allowed, f"{path.name} imports {module}"


def test_the_method_is_plain_torch():
    for path in (ROOT / "method").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - {"prelora_ray"}
        assert outside <= METHOD_LIBRARIES, path
