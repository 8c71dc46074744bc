"""The site of docs/ builds without a warning, and needs nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import prelora_ray
from tests.command import ROOT

pytest.importorskip("furo", reason="sphinx and its theme come with the extra `docs`")
pytestmark = [pytest.mark.slow]


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", str(source), str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_builds_and_has_every_page_and_every_function(tmp_path):
    built = build(ROOT / "docs", tmp_path)
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(tmp_path).with_suffix(".md") for path in tmp_path.rglob("*.html")}
    assert {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")} <= pages
    api = (tmp_path / "api.html").read_text()
    for name in (*prelora_ray.__all__, "inference.load.TrainedModel.predict", "inference.predict.Prediction.labels"):
        assert f'id="prelora_ray.{name}"' in api or f'id="prelora_ray.engine.prelora.{name}"' in api, name
    assert "pre-trains vision transformers" in (tmp_path / "index.html").read_text().lower()
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>", page.read_text()), page


def test_a_link_to_nowhere_fails(tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text())
    (source / "site.css").touch()
    (tmp_path / "README.md").write_text("# Front\n\nSee [a page](docs/no.md).\n")
    (source / "index.md").touch()
    built = build(source, tmp_path / "out")
    assert built.returncode != 0
    assert "cross-reference target not found: 'no.md'" in built.stderr
