"""Lines of prose are at most 120 characters; in docstrings and comments of Python, `ruff check` sees to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT / name for name in ("docs", "jobs", "dashboards")]


def lines_of_prose(path: Path) -> Iterator[tuple[int, str]]:
    """Those of a Markdown page outside of tables and code, and YAML's comments, each with its number."""
    is_code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("```"):
            is_code = not is_code
        elif line.lstrip().startswith("#") if path.suffix != ".md" else not is_code and not line.startswith(("|", "    ")):
            yield number, line


def test_lines_of_prose_are_at_most_120_characters():
    paths = [*ROOT.iterdir(), *(path for folder in FOLDERS for path in folder.rglob("*"))]
    pages = [path for path in paths if path.suffix in (".md", ".yaml", ".yml")]
    assert {"README.md", "cluster.yaml", "digits.yaml", "alerts.yml"} <= {path.name for path in pages}
    for path in pages:
        for number, line in lines_of_prose(path):
            assert len(line) <= 120, f"{path.relative_to(ROOT)}:{number} has {len(line)} characters"
