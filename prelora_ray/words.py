"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta


def counted(number: int, one: str, several: str | None = None) -> str:
    """`1 run`, `1,024 runs`: a number with the word for so many, by default with an `s` behind the word for one."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def number(value: float | None) -> str:
    """Four digits; `-` for what is not known."""
    return "-" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Of a share in 0..1."""
    return "-" if value is None else f"{value:.1%}"


def in_percent(value: float | None, digits: int = 1) -> str:
    """Of a share in 0..1, for a column whose head says `%`."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def modules_by_rank(counts: Mapping[int, int]) -> str:
    """`18 modules of rank 4, 1 module of rank 8`."""
    return ", ".join(f"{counted(count, 'module')} of rank {rank}" for rank, count in counts.items())


def clock(seconds: float | None) -> str:
    """`0:01:30`, `2 days, 0:00:00`."""
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))


def ago(seconds: float) -> str:
    """`30 s ago`, `5 min ago`, `3 h ago`, `12 days ago`."""
    for unit, most in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < most:
            return f"{max(0, seconds):.0f} {unit} ago"
        seconds /= 60 if unit != "h" else 24
    return f"{seconds:.0f} days ago"
