"""Numbers as a person reads them, and that text takes its plurals from one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from prelora_ray.words import accuracy, ago, counted, modules_by_rank

ROOT = Path(__file__).parent.parent
COUNTED = re.compile(
    r" (?:epochs|steps|windows|runs|images|workers|GPUs|files|classes|modules|cells|attempts|settings|nodes|shards|"
    r"bytes|trials|controls|channels|labels|figures|findings|restarts|pixels)\b(?!/s)"
)
"""What follows a number of things."""


def test_one_is_not_several():
    assert (counted(1, "run"), counted(2, "run"), counted(1024, "run")) == ("1 run", "2 runs", "1,024 runs")
    assert counted(1, "class", "classes") == "1 class" and counted(3, "class", "classes") == "3 classes"
    assert modules_by_rank({4: 18, 8: 1}) == "18 modules of rank 4, 1 module of rank 8"


@pytest.mark.parametrize(("seconds", "told"), [(-1, "0 s"), (59, "59 s"), (90, "2 min"), (7200, "2 h"), (3 * 86400, "3 days")])
def test_how_long_ago_is_told_in_one_unit(seconds: float, told: str):
    assert ago(seconds) == f"{told} ago"


def test_an_accuracy_that_is_not_known_is_told_as_that():
    assert (accuracy(0.5, 0.625), accuracy(None, None)) == ("top-1 50.0% (best 62.5%)", "top-1 -")


def uncounted(path: Path) -> Iterator[str]:
    """F-strings in which a number stands in front of a plural, so that one thing would be told as several.

    Ends of a range, constants, pairs of sides and `no files` stand as they are. `method/` imports nothing that counts.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.JoinedStr):
            continue
        for place, (value, text) in enumerate(zip(node.values, node.values[1:], strict=False)):
            if isinstance(value, ast.Constant) or not isinstance(text, ast.Constant) or not COUNTED.match(str(text.value)):
                continue
            before = str(node.values[place - 1].value) if place and isinstance(node.values[place - 1], ast.Constant) else ""
            told = ast.unparse(value.value)
            if not (
                before.endswith((" to ", " x ")) or told.isupper() or told.startswith("counted(") or told.endswith("or 'no'")
            ):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {{{told}}}{text.value}"


def test_what_is_counted_has_the_word_for_so_many():
    paths = [path for part in ("prelora_ray", "jobs", "examples") for path in (ROOT / part).rglob("*.py")]
    assert [found for path in paths if path.parent.name != "method" for found in uncounted(path)] == []
