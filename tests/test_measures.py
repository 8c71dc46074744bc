"""What a task is validated by."""

from __future__ import annotations

from prelora_ray.measures import best_value, last_value, measure_named, measures_of
from tests.lines import epoch_line


def test_each_task_is_told_by_its_own_measures():
    (top1,) = measures_of("classification")
    assert (top1.key, top1.column, top1.cell(0.98765), top1.told(0.98765)) == ("val_top1", "top-1, %", "98.77", "98.8%")
    perplexity, loss, accuracy = measures_of("mlm")
    assert perplexity.told_with_best(12.345678, 11.0) == "perplexity 12.35 (best 11)"
    assert (loss.column, accuracy.column) == ("loss per masked token", "accuracy, %")
    assert measure_named("val_accuracy") is accuracy


def test_what_is_not_known_is_told_as_that():
    (top1,) = measures_of("classification")
    assert (top1.told_with_best(0.5, 0.625), top1.told_with_best(None, None)) == ("top-1 50.0% (best 62.5%)", "top-1 -")


def test_the_best_perplexity_is_the_lowest_and_the_best_top1_the_highest():
    lines = [epoch_line(i, val_top1=v, val_perplexity=v) for i, v in enumerate((0.5, 0.2, 0.9, None))]
    assert best_value(lines, measure_named("val_perplexity")) == 0.2
    assert best_value(lines, measure_named("val_top1")) == 0.9
    assert last_value(lines, "val_top1") == 0.9 and last_value(lines[3:], "val_top1") is None
    perplexity = measure_named("val_perplexity")
    assert perplexity.rank(3.0) > perplexity.rank(4.0) > perplexity.rank(None)
