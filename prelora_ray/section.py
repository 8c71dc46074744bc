"""What settings are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
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
