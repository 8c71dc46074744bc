"""Every command of README.md and docs/ can be typed as it stands: its files, options and settings exist."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from prelora_ray.cli import app
from prelora_ray.config_file import load_settings
from prelora_ray.errors import UserError
from prelora_ray.sweep.settings import load_sweep
from tests.command import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = Path(sys.executable).parent
"""Where `make install` puts the programs of the project's environment."""
ELSEWHERE = {"docker", "kubectl", "make", "prometheus", "promtool"}
"""Programs that are not the project's."""
OWN = {"prelora", "python", "ray", "tensorboard"}
"""Programs of the project's environment that pages name."""
COMMAND = re.compile(rf"(?:[A-Za-z_]+=\S+ )*((?:{'|'.join(sorted(OWN | ELSEWHERE))}) (?!=).+)")
"""Variables, a program, and its arguments."""
PLACE = re.compile(r"(jobs|docs|dashboards|benchmarks|examples)/[\w./-]+|cluster\.yaml|constraints\.txt")
"""A file of this repository in an argument."""
PLACEHOLDER = re.compile(r"[A-Z_]+")
"""A word that stands for the reader's own; as a number it will do for any type."""
RECIPE = "jobs/configs/digits.yaml"
"""Stands in for a recipe of the reader's own."""
Command = tuple[str, tuple[str, ...]]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in a page's blocks, and of each one with arguments in its sentences."""
    text = re.sub(r"^```yaml.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    for line in re.sub(r"\\\n\s*", "", "\n".join(blocks + inline)).splitlines():
        for part in re.split(r"&&|;", re.sub(r"\s#.*", "", line)):
            if match := COMMAND.match(part.strip("() ")):
                yield shlex.split(re.sub(r"(?<!\S)\[(.*?)\](?!\S)", r"\1", match[1]))


def all_commands() -> list[Any]:
    found = {(path.relative_to(ROOT).as_posix(), tuple(words)) for path in PAGES for words in commands(path.read_text())}
    return [pytest.param(words, id=f"{page}: {' '.join(words)}") for page, words in sorted(found)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_is_python(page: Path):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        ast.parse(code)


@pytest.mark.parametrize("words", all_commands())
def test_it_can_be_typed_as_it_stands(words: tuple[str, ...]):
    for word in words:
        for place in PLACE.finditer(word):
            assert (ROOT / place[0]).exists() or place[0].endswith(".png"), place[0]
    check(words)


def check(words: tuple[str, ...]) -> None:
    program, *arguments = words
    if program in OWN:
        assert (PROGRAMS / program).exists()
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "prelora":
        check_prelora(arguments)
    elif program == "python":
        check_python(arguments)
    elif program == "ray":
        check_ray(arguments)


def check_prelora(arguments: list[str]) -> None:
    values = parsed(typer.main.get_command(app), arguments)
    if values is None:
        return
    recipe = values.get("config") or values.get("recipe")
    if recipe is None:
        return
    given = [override for override in values["overrides"] or () if "=" in override]
    if arguments[0] == "sweep":
        assert load_sweep(recipe, given)
    else:
        assert load_settings(recipe if (ROOT / recipe).is_file() else RECIPE, given)


def check_python(arguments: list[str]) -> None:
    script = ROOT / (f"{arguments[1].replace('.', '/')}.py" if arguments[0] == "-m" else arguments[0])
    assert script.is_file()
    if script.parent.name == "jobs":
        check_prelora([script.stem, *arguments[1:]])
        return
    text = script.read_text()
    for word in arguments[1:]:
        assert not word.startswith("--") or f'"{word}"' in text, f"{script.name} takes no {word}"


def check_ray(arguments: list[str]) -> None:
    from ray.scripts.scripts import cli

    own, _, entrypoint = " ".join(arguments).partition(" -- ")
    parsed(cli, [*own.split(), *(["--", *entrypoint.split()] if entrypoint else [])])
    if entrypoint:
        check(tuple(entrypoint.split()))


def parsed(group: Any, arguments: list[str]) -> dict[str, Any] | None:
    """The values of a command's parameters; None where the page leaves some out, as a sentence may."""
    command, rest = group, ["1" if PLACEHOLDER.fullmatch(word) else word for word in arguments]
    if rest[0].startswith("--"):  # parsing it would do it
        assert any(rest[0] in parameter.opts for parameter in command.params), f"there is no option {rest[0]}"
        return None
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands, f"there is no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        with command.make_context(command.name, rest) as context:
            return dict(context.params)
    except Exception as error:  # typer has a click of its own, and Ray the real one
        if type(error).__name__ in ("MissingParameter", "BadOptionUsage", "NoArgsIsHelpError"):
            return None
        raise AssertionError(f"{type(error).__name__}: {error}") from error


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_the_environment_is_activated_before_its_programs_are_used(page: str):
    text = (ROOT / page).read_text()
    first = min(text.index(f"\n    {program} ") for program in ("prelora", "ray") if f"\n    {program} " in text)
    assert text.index(". .venv/bin/activate") < first
    assert ".venv/bin/prelora" not in text


def test_commands_are_found():
    """In blocks, over several lines, behind variables, in sentences, without comments."""
    page = "Type `ray status --x` or:\n\n    A=b ray job submit -- \\\n        python jobs/train.py x.yaml   # a comment\n"
    assert list(commands(page)) == [
        ["ray", "job", "submit", "--", "python", "jobs/train.py", "x.yaml"],
        ["ray", "status", "--x"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "prelora train jobs/configs/digits.yaml --sett a=1",
        "prelora train jobs/configs/digits.yaml --set train.epoch=1",
        "prelora trian",
        "prelora --instal-completion",
        "python jobs/training.py x",
        "python jobs/train.py jobs/configs/digits.yaml --workers 3",
        "ray job submit --work-dir . -- python jobs/train.py jobs/configs/digits.yaml",
        "ray dashboard cluster.yaml --prot 8265",
        "make demos",
    ],
)
def test_a_command_that_cannot_be_typed_is_found(command: str):
    with pytest.raises((AssertionError, UserError)):
        check(tuple(command.split()))
