"""From a YAML file, a command line or a dictionary to settings, with one sentence for each mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from prelora_ray.config import MethodSettings, Settings, inner_section
from prelora_ray.errors import UserError, one_line
from prelora_ray.section import Section, rule
from prelora_ray.storage import without_keys

SectionT = TypeVar("SectionT", bound=Section)
Override = str | tuple[str, Any]
"""`key.path=value` with the value in YAML, as a command line has it; or the key and the value."""


_RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: the path as it is, or by its name one that comes with the package.

    Raises UserError where it is neither.
    """
    path, names = Path(recipe), recipe_names()
    if str(recipe) in names and (path.is_dir() or not path.exists()):
        return _RECIPES / f"{recipe}.yaml"
    if not path.exists():
        raise UserError(f"{recipe} is no file: give the path of a recipe, or the name of one of ours: {', '.join(names)}")
    return path


def load_settings(
    path: str | Path, overrides: Iterable[Override] = (), *, name: str | None = None, storage: str | None = None
) -> Settings:
    """Reads a recipe: a file, or by its name one that comes with the package.

    Raises UserError with one sentence a mistake, naming the key, the value and what is allowed.
    """
    return parse_settings(read_named(find_recipe(path), overrides, name=name, storage=storage))


def read_named(
    path: str | Path, overrides: Iterable[Override] = (), *, name: str | None = None, storage: str | None = None
) -> dict[str, Any]:
    """What a YAML file holds, with what a command line changes in it; the name is by default the file's own.

    Raises UserError where it is no such file.
    """
    path = Path(path)
    try:
        content = parse_yaml(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is no file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: it must be a mapping such as `data: {{path: ...}}`")
    content = with_overrides(content, overrides)
    content.setdefault("name", path.stem)
    if name is not None:
        content["name"] = name
    if storage is not None:
        content["storage"] = storage
    return content


def with_overrides(content: dict[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """Settings with what a command line changes in them. Raises UserError for what is no `key.path=value`."""
    content = dict(content)
    for override in overrides:
        set_key(content, *(_parse_override(override) if isinstance(override, str) else override))
    return content


def parse_settings(content: dict[str, Any]) -> Settings:
    """Checks settings given as nested dictionaries. Raises UserError as `load_settings` does."""
    return parse_section(Settings, content)


def parse_method(content: dict[str, Any]) -> MethodSettings:
    """Checks the settings of the method alone. Raises UserError as `load_settings` does."""
    return parse_section(MethodSettings, content, "method.")


def parse_section(section: type[SectionT], content: dict[str, Any], prefix: str = "") -> SectionT:
    """Checks a section whose keys are told with `prefix` in front. Raises UserError as `load_settings` does."""
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(_sentences(error.errors(), content, _known_keys(section, prefix), prefix))) from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key that stands twice is a mistake, of which plain YAML would keep the second silently.

    It is looked for in a mapping as it is written: one that stands in place of a merged one (`<<: *other`) is none.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return node


def parse_yaml(text: str) -> Any:
    """The content of a YAML text. Raises yaml.YAMLError where it is no YAML, or holds an invalid date or number."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except (ValueError, KeyError, AttributeError) as error:  # of YAML's own constructors, such as for 2026-13-01
        raise yaml.YAMLError(f"a value cannot be read ({one_line(error)}); text goes between quotes") from None


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r} is not allowed: write key.path=value, such as train.epochs=20")
    try:
        return key.strip(), parse_yaml(value)
    except yaml.YAMLError as error:
        reason = one_line(error)
        raise UserError(f"--set {override!r} is not allowed: the value is not YAML: {reason}") from None


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets what a key.path leads to; the keys of a mapping go beside those that are there.

    Raises UserError where the path leads through a value.
    """
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        inner = section.pop(parent, None)  # which comes to stand last: of keys that mean the same, the last one counts
        if not isinstance(inner, dict | None):
            raise UserError(f"{key} = {value!r} is not allowed: {parent} is no section")
        section[parent] = dict(inner or {})  # of its own, as an alias may have it stand elsewhere too
        section = section[parent]
    section[last] = _merged(section.pop(last, None), value)


def _merged(before: Any, now: Any) -> Any:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return now
    return before | {key: _merged(before.get(key), value) for key, value in now.items()}


def _sentences(errors: list[ErrorDetails], content: Any, known: list[str], prefix: str) -> list[str]:
    """One sentence a key and entry: the errors of a union's members (an integer, or `auto`) are one mistake.

    Where one of them is further inside, the value was meant for that member.
    """
    found: dict[tuple[str | int, ...], list[tuple[str, ErrorDetails]]] = {}
    for details in errors:
        place = _place(details, content)
        key = (prefix + ".".join(str(part) for part in place if not isinstance(part, int))).rstrip(".")
        found.setdefault(place, []).append((key, details))
    innermost = [place for place in found if not any(place == other[: len(place)] != other for other in found)]
    sentences = (_sentence(found[place][0][0], [details for _, details in found[place]], known) for place in innermost)
    return [" ".join(without_keys(sentence).splitlines()) for sentence in sentences]


def _place(details: ErrorDetails, content: Any) -> tuple[str | int, ...]:
    """Keys, and numbers of lists' entries, that lead to what is wrong. What else pydantic has in between, such as the
    member of a union, the user did not write."""
    place: list[str | int] = []
    for part in details["loc"]:
        if isinstance(content, dict) and part in content:
            content = content[part]
            place.append(str(part))
        elif isinstance(content, (list, tuple)) and isinstance(part, int) and part < len(content):
            content = content[part]
            place.append(part)
    missing = details["loc"][-1] if details["type"] == "missing" else None
    return (*place, missing) if isinstance(missing, str) else tuple(place)


def _sentence(key: str, errors: list[ErrorDetails], known: list[str]) -> str:
    """`errors`: of one value, one of each member of its union."""
    details, value, kinds = errors[0], errors[0]["input"], {error["type"] for error in errors}
    if "extra_forbidden" in kinds:
        close = difflib.get_close_matches(key, known, 1)
        close = close or [other for other in known if other.split(".")[-1] == key.split(".")[-1]]
        siblings = _siblings(key, known)
        hint = f", did you mean {close[0]}?" if close else f", its section knows {siblings}" if siblings else ""
        return f"{key} = {value!r} is not allowed: there is no such key{hint}"
    if "missing" in kinds and isinstance(details["loc"][-1], int):
        return f"{key} = {value!r} is not allowed: it has too few entries"
    if "missing" in kinds:
        return f"{key} is missing: it must be given"
    if "invalid_key" in kinds or details["loc"][-1:] == ("[key]",):
        return f"{key} is not allowed as a key: it must be text, between quotes"
    if details["type"] == "value_error" and isinstance(value, dict) and not details["msg"].startswith("Value error, must be"):
        return rule(details)  # between keys, which it names itself
    return f"{key} = {value!r} is not allowed: it must be {', or '.join(dict.fromkeys(map(rule, errors)))}"


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if (inner := inner_section(field.annotation)) is not None:
            keys += _known_keys(inner, f"{prefix}{name}.")
    return keys


def _siblings(key: str, known: list[str]) -> str:
    prefix = key[: key.rfind(".") + 1]
    names = [other[len(prefix) :] for other in known if other.startswith(prefix)]
    return ", ".join(name for name in names if "." not in name)
