"""Writes the tables of docs/run-folder.md from the records' own docstrings: `python docs/make_records.py`."""

from __future__ import annotations

import ast
import inspect
import itertools
from dataclasses import fields
from pathlib import Path

from prelora_ray import records
from prelora_ray.records import EVENTS, EpochLine, Event, NormsLine, Progress, Result, Starting, WindowLine

PAGE = Path(__file__).with_name("run-folder.md")
BEGIN = "<!-- Written by `python docs/make_records.py`. -->\n"
END = "<!-- Written by hand again. -->\n"
JSON_TYPES = {
    **{"int": "integer", "float": "number", "str": "string", "bool": "boolean", "None": "`null`"},
    **{"dict[str, str]": "object of strings", "dict[str, float]": "object of numbers", "dict[str, int]": "object of integers"},
    "dict[str, list[float]]": "object of lists of numbers",
    "dict[str, float | None]": "object of numbers, each may be `null`,",
}
_MODULE = ast.parse(inspect.getsource(records))


def page(text: str) -> str:
    """The page with its tables as they are to be; all else of it is written by hand."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + tables() + END + rest.split(END)[1]


def tables() -> str:
    parts = [_table(kind) for kind in (NormsLine, WindowLine, EpochLine, Starting, Progress, Result, Event)]
    rows = [f"| `{name}` | {_sentence(kind)} | {_own_keys(kind)} |" for name, kind in EVENTS.items()]
    parts.append("| event | what happened | keys of its own |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def _table(kind: type) -> str:
    meanings = _meanings(kind)
    rows = [f"| `{f.name}` | {_json_type(str(f.type))} | {meanings[f.name]} |" for f in fields(kind)]
    head = f"**`{kind.FILE}`**: {_sentence(kind)}\n\n| key | type | meaning |\n| --- | --- | --- |\n"  # type: ignore[attr-defined]
    return head + "\n".join(rows) + "\n"


def _own_keys(kind: type) -> str:
    types = {f.name: _json_type(str(f.type)) for f in fields(kind)}
    return "; ".join(f"`{key}` ({types[key]}): {told.rstrip('.')}" for key, told in _meanings(kind).items())


def _sentence(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def _json_type(annotation: str) -> str:
    if annotation in JSON_TYPES:
        return JSON_TYPES[annotation]
    return f"{JSON_TYPES[annotation.removesuffix(' | None')]} or `null`"


def _meanings(kind: type) -> dict[str, str]:
    """What stands under each field that the class itself describes."""
    body = next(node for node in _MODULE.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__).body
    return {
        node.target.id: " ".join(text.value.value.split())
        for node, text in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
