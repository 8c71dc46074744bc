"""Writes docs/settings.md from the settings' own descriptions: `python docs/make_settings.py`."""

from pathlib import Path

from pydantic import BaseModel

from prelora_ray.config import Settings
from prelora_ray.sweep.settings import AshaSettings, SweepSettings

HEAD = """# Settings

Every key of a recipe, with its default. `--set key.path=value` changes one on the command line. Written by
`python docs/make_settings.py`.

"""
SWEEP_HEAD = """
## Sweeps

Every key of a sweep ([sweeps.md](sweeps.md)).

"""
TABLE = """| key | default | meaning |
| --- | --- | --- |
"""


def rows(section: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += rows(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        found.append(f"| `{prefix}{name}` | {default} | {' '.join((field.description or '').split())} |")
    return found


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def reference() -> str:
    sweep = rows(SweepSettings) + rows(AshaSettings, "asha.")
    tables = [TABLE + "\n".join(found) + "\n" for found in (rows(Settings), sweep)]
    return HEAD + tables[0] + SWEEP_HEAD + tables[1]


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(reference())
