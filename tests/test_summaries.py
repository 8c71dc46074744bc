"""What is computed from lines, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prelora_ray.records import EpochLine
from prelora_ray.summaries import gain_note, phase_summaries, rank_counts, restarts, seconds_of_run, table_summaries
from tests.lines import epoch_line, event


def run_of(*epochs: tuple[str, float], waits: float = 0) -> list[EpochLine]:
    """Epochs of 60 images, each (phase, images/s), that wait for so many seconds."""
    return [
        epoch_line(epoch, phase=phase, images_per_second=rate, train_seconds=60 / rate, data_wait_seconds=waits)
        for epoch, (phase, rate) in enumerate(epochs)
    ]


def test_a_phase_is_summed_over_its_epochs():
    """By hand: the first epoch, with its waiting, counts in seconds alone."""
    lines = [
        epoch_line(0, train_seconds=9, seconds=10, data_wait_seconds=8, val_top1=0.25, peak_memory_bytes=9),
        epoch_line(1, train_seconds=3, seconds=4, data_wait_seconds=1, val_top1=None, peak_memory_bytes=8),
        epoch_line(2, train_seconds=1, seconds=2, data_wait_seconds=0, val_top1=None, peak_memory_bytes=8),
        epoch_line(3, phase="lora", trainable_parameters=1, parameters=4, val_top1=None, loss=0.5),
    ]
    full, lora = phase_summaries(lines).values()
    assert (full.phase, full.epochs, full.seconds, full.data_wait_fraction) == ("full", 3, 16, 0.25)
    assert (full.measures["val_top1"], full.peak_memory_bytes, full.trainable_fraction) == (0.25, 9, 1)
    assert (lora.phase, lora.loss, lora.measures["val_top1"], lora.trainable_fraction) == ("lora", 0.5, None, 0.25)


def test_a_phases_speed_is_that_behind_its_start():
    """By hand: 60 images at 5/s are 12 s, of which 6 s are what they take at 10/s; those of lora, 15 s, 12 at 5/s."""
    full, warmup, lora = phase_summaries(
        run_of(("full", 5), ("full", 9), ("full", 10), ("full", 30), ("warmup", 2), ("lora", 4), ("lora", 5))
    ).values()
    assert (full.images_per_second, full.against_full, full.startup_seconds) == (10, 1, 6)
    assert (warmup.images_per_second, warmup.against_full, warmup.startup_seconds) == (2, None, None)
    assert (lora.images_per_second, lora.against_full, lora.startup_seconds) == (5, 0.5, pytest.approx(3))


def test_the_first_epoch_of_an_attempt_starts_too():
    """Also after a restart in the middle of a phase, with fewer workers: speeds are compared by worker."""
    lines = run_of(("full", 2), ("full", 20), ("full", 1), ("full", 10), ("lora", 5), ("lora", 10))
    attempts = [0, 0, 1, 1, 1, 1]
    lines = [replace(line, attempt=a, world_size=2 - a) for line, a in zip(lines, attempts, strict=True)]
    full, lora = phase_summaries(lines).values()
    assert (full.images_per_second, lora.against_full) == (15, 1)
    # At 10/s a worker's 60 images take 6 s, and those of two 3 s.
    assert full.startup_seconds == pytest.approx(30 - 3 + 60 - 6)


def test_no_speed_gained_is_told_with_what_is_the_reason():
    slow = ("full", 5), ("full", 10), ("lora", 5), ("lora", 8)
    assert (
        gain_note(run_of(*slow)) == "phase lora trains 0.80 times as fast as full training: at this size freezing saves no time"
    )
    waits = "phase lora trains 0.80 times as fast as full training: it waits for images 40% of its time"
    assert gain_note(run_of(*slow, waits=3)) == waits
    assert gain_note(run_of(("full", 5), ("full", 10), ("lora", 5), ("lora", 12))) is None
    assert gain_note(run_of(*slow[:3])) is None  # an epoch that starts tells no speed
    assert gain_note(run_of(*slow[:2])) is None


def test_where_images_grew_a_table_tells_their_sizes_apart():
    lines = [
        epoch_line(epoch, phase=phase, image_size=size, images_per_second=size)
        for epoch, (phase, size) in enumerate([("full", 160), ("full", 160), ("full", 224), ("lora", 224)])
    ]
    told = {name: (summary.epochs, summary.images_per_second) for name, summary in table_summaries(lines).items()}
    assert told == {"full, 160 px": (2, 160), "full, 224 px": (1, 224), "lora, 224 px": (1, 224)}
    assert phase_summaries(lines)["full"].images_per_second == pytest.approx(3 / (2 / 160 + 1 / 224))
    assert table_summaries(lines[2:]) == phase_summaries(lines[2:])
    earlier = [replace(line, image_size=None) for line in lines[2:3]]  # as an earlier version wrote it
    assert list(table_summaries([*earlier, *lines[3:]])) == ["full", "lora"]


def test_ranks_are_counted_in_their_order():
    assert list(rank_counts({"a": 16, "b": 8, "c": 16, "d": 0}).items()) == [(0, 1), (8, 1), (16, 2)]


def test_a_runs_time_is_that_of_its_attempts_and_a_fork_is_no_attempt():
    """By hand: 2 s of the trunk's, 10 s and 5 s."""
    times = [(-1, 1.0), (-1, 3.0), (0, 100.0), (0, 110.0), (1, 200.0), (1, 205.0)]
    events = [event("stop", attempt=attempt, time=time) for attempt, time in times]
    assert (seconds_of_run(events), restarts(events)) == (17, 1)
    assert (seconds_of_run([]), restarts([]), restarts(events[:2])) == (0, 0, 0)
