"""Each program of examples/ runs as it stands, and tells its phases."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "digits.py")
PHASES = ["full"] * 5 + ["warmup"] * 2 + ["lora"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_and_learns(path: Path):
    run = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    epochs = re.findall(r"^epoch (\d+): phase (\w+), loss (\d\.\d+)", run.stdout, re.MULTILINE)
    assert [(int(epoch), phase) for epoch, phase, _ in epochs] == list(enumerate(PHASES, 1)), run.stdout
    assert float(epochs[-1][2]) < 1 < float(epochs[0][2]), run.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_named_by_a_page(path: Path):
    assert len(path.read_text().splitlines()) < 60
    assert f"examples/{path.name}" in (ROOT / "docs" / "own-loop.md").read_text()
