"""`--json`: a command's result as one JSON object."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, allow_nan=False))
