"""Options of a command line that are the fields of settings."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from prelora_ray.errors import UserError
from prelora_ray.section import Section, rule


def options_of(section: type[Section]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each key of a section: its default, and its docstring as the help.

    The command gets them as one object, its keyword `settings`. Raises UserError where a value is not allowed.
    """
    fields = section.model_fields
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[field.annotation, typer.Option(help=field.description)],
        )
        for name, field in fields.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**values: Any) -> None:
            chosen = {name: values.pop(name) for name in fields if name in values}
            command(**values, settings=_checked(section, chosen))

        own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "settings"]
        call.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in (*own, *options)}
        return call

    return decorate


def _checked(section: type[Section], values: dict[str, Any]) -> Section:
    try:
        return section(**values)
    except ValidationError as error:
        raise UserError("\n".join(map(_sentence, error.errors()))) from None


def _sentence(details: ErrorDetails) -> str:
    option = str(details["loc"][0]).replace("_", "-")
    return f"--{option} {details['input']} is not allowed: it must be {rule(details)}"
