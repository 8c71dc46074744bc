"""What was measured is told, and what is told was measured: files of benchmarks/results and pages that name them."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir())
NAMES = sorted({name for page in ROOT.glob("docs/**/*.md") for name in re.findall(r"20\d\d-[\w*-]+\.jsonl?", page.read_text())})


def test_every_file_of_figures_is_named_on_a_page():
    assert [file for file in FILES if not any(fnmatch(file, name) for name in NAMES)] == []


def test_every_file_that_a_page_names_is_there():
    assert len(NAMES) > 10
    assert [name for name in NAMES if not any(fnmatch(file, name) for file in FILES)] == []
