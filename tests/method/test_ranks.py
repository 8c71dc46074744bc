"""Rank assignment against worked examples."""

import math

import pytest

from prelora_ray.method.ranks import assign_ranks, match_rank_pattern, rank_choices


def family(changes: list[float], name: str = "query") -> dict[str, float]:
    return {f"blocks.{i}.attn.{name}": change for i, change in enumerate(changes)}


def test_choices():
    assert rank_choices(8, 64) == [8, 16, 32, 64]
    assert rank_choices(4, 4) == [4]


def test_by_hand():
    # min 1, max 5: n = 0, 0.25, 0.5, 0.75, 1; four ranks: ceil(4 n) - 1 = -1, 0, 1, 2, 3, the first clipped to 0.
    assert list(assign_ranks(family([1, 2, 3, 4, 5]), 8, 64).values()) == [8, 8, 16, 32, 64]
    # Just over a quarter falls into the next bin.
    assert list(assign_ranks(family([0, 2.6, 10]), 8, 64).values()) == [8, 16, 64]


def test_equal_changes_get_the_smallest_rank():
    assert set(assign_ranks(family([3, 3, 3]), 8, 64).values()) == {8}


def test_infinite_change_is_the_largest_and_no_maximum():
    # Without the infinite one min 1 and max 3: n = 0, 0.5, 1.
    assert list(assign_ranks(family([1, 2, 3, math.inf]), 8, 64).values()) == [8, 16, 64, 64]
    assert list(assign_ranks(family([math.inf, 7]), 8, 64).values()) == [64, 8]


def test_family_against_overall():
    changes = family([0, 1]) | family([9, 10], "value")
    assert list(assign_ranks(changes, 8, 64, "family").values()) == [8, 64, 8, 64]
    # Overall: n = 0, 0.1, 0.9, 1.
    assert list(assign_ranks(changes, 8, 64, "overall").values()) == [8, 8, 64, 64]


def test_what_hardly_changes_gets_no_adapter():
    assert list(assign_ranks(family([0.1, 0.5, 1, 2]), 8, 64, floor_percent=0.5).values()) == [0, 8, 16, 64]
    assert list(assign_ranks(family([0.1, 0.2]), 8, 64, floor_percent=0.5).values()) == [0, 64]  # one is left


def test_order_of_modules_is_kept():
    changes = {"blocks.1.mlp.fc1": 1.0, "blocks.0.attn.query": 2.0, "blocks.0.mlp.fc1": 3.0}
    assert list(assign_ranks(changes)) == list(changes)


@pytest.mark.parametrize(("r_min", "r_max", "key"), [(6, 64, "r_min = 6"), (8, 60, "r_max = 60"), (64, 8, "r_min = 64")])
def test_refused_ranges(r_min, r_max, key):
    with pytest.raises(ValueError, match=key):
        rank_choices(r_min, r_max)


NAMES = ["blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]


def test_a_rank_of_0_by_hand_is_no_adapter():
    assert list(match_rank_pattern({"proj": 0, "fc1": 16}, NAMES).values()) == [0, 16, 0, 16]
    with pytest.raises(ValueError, match="gives every module rank 0: at least one needs an adapter"):
        match_rank_pattern({".*": 0}, NAMES)


def test_pattern_matches_suffixes_as_peft_does():
    ranks = match_rank_pattern({"proj": 8, r"blocks\.0\.mlp\.fc1": 16, r"1\.mlp\.fc1": 32}, NAMES)
    assert list(ranks.values()) == [8, 16, 8, 32]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"proj": 8, "fc1": 8, "fc2": 8}, "'fc2' matches no target module"),
        ({"proj": 8}, "'blocks.0.mlp.fc1' is matched by no key"),
        ({"proj": 8, "fc1": 8, r"blocks\.0\.attn\.proj": 16}, "matched by the keys"),
        ({"roj": 8, "fc1": 8}, "'roj' matches no target module"),  # a suffix begins at a dot
        ({"proj": 12, "fc1": 8}, "= 12 is not allowed"),
        ({"(": 8}, "no regular expression"),
    ],
)
def test_refused_patterns(pattern, message):
    with pytest.raises(ValueError, match=r".*" + message.replace("(", r"\(")):
        match_rank_pattern(pattern, NAMES)
