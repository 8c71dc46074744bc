"""Lines of prose are at most 120 characters; in docstrings and comments of Python, `ruff check` sees to it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT / name for name in ("docs", "jobs", "dashboards")]


def is_prose(path: Path, line: str) -> bool:
    """Neither a table nor a block of code; of YAML, comments alone."""
    return not line.startswith(("|", "    ")) if path.suffix == ".md" else line.lstrip().startswith("#")


def test_lines_of_prose_are_at_most_120_characters():
    paths = [*ROOT.iterdir(), *(path for folder in FOLDERS for path in folder.rglob("*"))]
    pages = [path for path in paths if path.suffix in (".md", ".yaml", ".yml")]
    assert {"README.md", "cluster.yaml", "digits.yaml", "alerts.yml"} <= {path.name for path in pages}
    for path in pages:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120 or not is_prose(path, line), f"{path.relative_to(ROOT)}:{number} has {len(line)} characters"
