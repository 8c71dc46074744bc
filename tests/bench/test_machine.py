"""What was measured before a benchmark's end stands, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from prelora_ray.bench.machine import measure_rows


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (RuntimeError("CUDA error: an illegal memory access\nCompile with ..."), "CUDA error: an illegal memory access"),
        (RuntimeError(), "RuntimeError"),
        (KeyboardInterrupt(), "interrupted"),
        (None, None),
    ],
)
def test_what_was_measured_before_the_end_stands(end, told):
    def rows() -> Iterator[Row]:
        yield Row("first", 1.0)
        if end is not None:
            raise end

    assert measure_rows(rows(), str) == {"rows": [{"name": "first", "seconds": 1.0}], "failed": told}
