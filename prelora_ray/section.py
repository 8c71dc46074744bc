"""What settings are made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails

_LARGEST = 2**53
"""Up to here a float has every whole number, so that a share of one can be taken."""
Count = Annotated[int, Field(ge=1, le=_LARGEST, strict=True)]
Whole = Annotated[int, Field(ge=0, le=_LARGEST, strict=True)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Acts:
    """Marks a key, or a section for the keys in it, with when it acts on what a run computes; `acts` tells.

    `always` is from the start on, and needs no mark; `switch` is from the switch on, so that forks of one trunk may
    differ in it; `never` is speed, place and watching, which may change whenever a run is resumed.
    """

    when: Literal["always", "switch", "never"]


class Section(BaseModel):
    """Settings with a sentence under each key; an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


_BEGIN = re.compile(r"^(Value error, )?(Input should be|must be)? ?")
_HOW_IT_FAILED = re.compile(r", (unable to|got) .*")


def rule(details: ErrorDetails) -> str:
    """What a value that pydantic refuses must be, in the words behind `it must be`.

    A rule between the keys of a section is a sentence of its own.
    """
    limits = details.get("ctx", {})
    match details["type"]:
        case "model_type" | "dict_type":
            return "a mapping, such as {key: value}"
        case "list_type" | "tuple_type":
            return "a list, such as [a, b]"
        case "too_short":
            return f"a list of at least {limits['min_length']}"
        case "too_long":
            return f"a list of at most {limits['max_length']}"
        case "missing":
            return "given"
    return _HOW_IT_FAILED.sub("", _BEGIN.sub("", details["msg"]))
