"""Which split a path names: the words and delimiters that Hugging Face documents."""

from __future__ import annotations

import pytest

from prelora_ray.data.sources.splits import Splits


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.parquet", "train"),
        ("my_train_file.csv", "train"),
        ("train1.csv", "train"),
        ("Training/00.tar", "train"),
        ("imagenet1k-train-0000.tar", "train"),
        ("default/partial-train/0000.parquet", "train"),
        ("imagenet1k-validation-00.tar", "val"),
        ("default/partial-validation/0000.parquet", "val"),
        ("VAL/a/1.jpg", "val"),
        ("data/valid.parquet", "val"),
        ("dev-0.tar", "val"),
        ("test.parquet", "test"),
        ("x/testing/1.jpg", "test"),
        ("eval_2.tar", "test"),
        ("evaluation 1.tar", "test"),
        ("train/validation-00.tar", "val"),  # the name that is nearest to the file
        ("trainer.tar", None),
        ("trainval.tar", None),
        ("value/constraint.tar", None),
        ("contest/0.parquet", None),
        ("data/0000.parquet", None),
    ],
)
def test_words(path: str, split: str | None):
    assert Splits().of(path) == split


@pytest.mark.parametrize("path", ["train-test.tar", "val_train/0.parquet", "x/test.valid.csv"])
def test_a_name_of_two_splits_is_refused(path: str):
    with pytest.raises(ValueError, match=r"names (test|train|val) and (train|val): rename it, or give --train-split"):
        Splits().of(path)


def test_given_patterns_stand_in_place_of_words():
    given = Splits(train="extra-*.parquet", val="holdout")
    assert given.of("extra-0.parquet") == "train"
    assert given.of("a/holdout/0.parquet") == "val"
    assert given.of("train.parquet") is None
    assert given.of("validation.parquet") is None
    val_alone = Splits(val="images/mini")
    assert val_alone.of("images/mini/a/1.jpg") == "val"
    assert val_alone.of("images/train/a/1.jpg") == "train"
    assert val_alone.of("val/a/1.jpg") is None
    with pytest.raises(ValueError, match="names train and val"):
        Splits(train="*", val="a*").of("abc")
