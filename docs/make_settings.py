"""Writes docs/settings.md from the settings' own descriptions: `python docs/make_settings.py`."""

from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from prelora_ray.config import Settings, acts, inner_section
from prelora_ray.sweep.settings import SweepSettings

HEAD = """# Settings

Every key of a recipe, with its default. `--set key.path=value` changes one on the command line; the keys of a mapping,
as in `--set 'train={epochs: 50}'`, go beside those that are there, and `--set key.path=null` in front makes room.
Written by `python docs/make_settings.py`.

Keys that do not act on the result may change when a run is resumed. A fork may differ from its trunk in those, and in
keys that act from the switch on.

"""
SWEEP_HEAD = """
## Sweeps

Every key of a sweep ([sweeps.md](sweeps.md)).

"""
TABLE = """| key | default | acts | meaning |
| --- | --- | --- | --- |
"""
SWEEP_TABLE = """| key | default | meaning |
| --- | --- | --- |
"""
ACTS = {"always": "from the start", "switch": "from the switch on", "never": "not on the result"}


def rows(section: type[BaseModel], prefix: str = "", *, tell_acts: bool = False) -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = inner_section(field.annotation)
        if inner is not None and inner is field.annotation:
            found += rows(inner, f"{prefix}{name}.", tell_acts=tell_acts)
            continue
        default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        when = f" {ACTS[acts(prefix + name)]} |" if tell_acts else ""
        meaning = [*(field.description or "").split(), *_told(field.annotation)]
        found.append(f"| `{prefix}{name}` | {default} |{when} {' '.join(meaning)} |")
        if inner is not None:
            found += rows(inner, f"{prefix}{name}.", tell_acts=tell_acts)
    return found


def _words(annotation: Any) -> list[str]:
    """The words that a key, or an entry of its list, may be."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.value for member in annotation]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _words(part)]


def _told(annotation: Any) -> list[str]:
    """One word alone stands beside numbers or yes and no, and the meaning says what it does there."""
    words, which = _words(annotation), "Any of" if get_origin(annotation) is tuple else "One of"
    return [f"{which} {', '.join(f'`{word}`' for word in words)}."] if len(words) > 1 else []


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def reference() -> str:
    run, sweep = rows(Settings, tell_acts=True), rows(SweepSettings)
    return HEAD + TABLE + "\n".join(run) + "\n" + SWEEP_HEAD + SWEEP_TABLE + "\n".join(sweep) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(reference())
