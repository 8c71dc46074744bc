"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from prelora_ray.words import ago, counted, modules_by_rank


def test_one_is_not_several():
    assert (counted(1, "run"), counted(2, "run"), counted(1024, "run")) == ("1 run", "2 runs", "1,024 runs")
    assert counted(1, "class", "classes") == "1 class" and counted(3, "class", "classes") == "3 classes"
    assert modules_by_rank({4: 18, 8: 1}) == "18 modules of rank 4, 1 module of rank 8"


@pytest.mark.parametrize(("seconds", "told"), [(-1, "0 s"), (59, "59 s"), (90, "2 min"), (7200, "2 h"), (3 * 86400, "3 days")])
def test_how_long_ago_is_told_in_one_unit(seconds: float, told: str):
    assert ago(seconds) == f"{told} ago"
