"""How figures grow with workers: fits of figures that were made up, by hand."""

from __future__ import annotations

import pytest

from prelora_ray.bench.growth import Growth, fit

WORKERS = [8, 16, 32, 64]


@pytest.mark.parametrize(
    "grown",
    [Growth(3.0, 0.0, 0.0), Growth(0.0, 0.25, 0.0), Growth(5.0, 0.5, 0.0), Growth(4.0, 0.0, 0.01), Growth(1.0, 0.5, 0.02)],
)
def test_it_finds_what_made_the_figures(grown):
    found = fit(WORKERS, [grown.at(n) for n in WORKERS])
    assert vars(found) == pytest.approx(vars(grown), abs=1e-9)
    assert found.at(512) == pytest.approx(grown.fixed + 512 * grown.per_worker + 512**2 * grown.per_worker_squared)


def test_no_square_where_a_line_is_close():
    values = [1.0 + 0.1 * n for n in WORKERS]
    assert fit(WORKERS, [values[0], 1.08 * values[1], 0.97 * values[2], values[3]]).per_worker_squared == 0


def test_no_square_of_too_few_numbers_of_workers():
    assert fit([1, 2, 3], [1.0, 4.0, 9.0]).per_worker_squared == 0
    assert vars(fit([7], [5.0])) == {"fixed": 5.0, "per_worker": 0.0, "per_worker_squared": 0.0}


def test_what_falls_is_taken_for_fixed():
    assert vars(fit(WORKERS, [4.0, 3.0, 2.0, 1.0])) == pytest.approx(
        {"fixed": 2.5, "per_worker": 0.0, "per_worker_squared": 0.0}
    )
