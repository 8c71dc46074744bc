"""A run's result, from the records in its folder."""

from __future__ import annotations

from typing import Any

from prelora_ray.records import (
    Freeze,
    Result,
    Switch,
    last_top1,
    phase_summaries,
    rank_counts,
    seconds_by_attempt,
    to_json,
    top1s,
)
from prelora_ray.run_folder import RunFolder


def summarize(folder: RunFolder) -> dict[str, Any]:
    """The contents of result.json, from the lines that stand."""
    epochs, events = folder.epochs(), folder.events()
    phases = phase_summaries(epochs)
    switches, freezes = folder.events_of(Switch), folder.events_of(Freeze)
    result = Result(
        epochs=epochs[-1].epoch + 1,
        switch_epoch=switches[-1].switch_epoch if switches else None,
        freeze_epoch=freezes[-1].freeze_epoch if freezes else None,
        val_top1=last_top1(epochs),
        best_val_top1=max(top1s(epochs), default=None),
        ema_top1=next((line.ema_top1 for line in reversed(epochs) if line.ema_top1 is not None), None),
        images_per_second={phase: summary.images_per_second for phase, summary in phases.items()},
        peak_memory_bytes={phase: summary.peak_memory_bytes for phase, summary in phases.items()},
        trainable_fraction={phase: summary.trainable_fraction for phase, summary in phases.items()},
        ranks={str(rank): n for rank, n in rank_counts(folder.read_json("ranks.json")).items()} if switches else None,
        restarts=max((event.attempt for event in events), default=0),
        seconds=sum(seconds_by_attempt(events).values()),
        startup_seconds={phase: summary.startup_seconds for phase, summary in phases.items()},
        against_full={phase: summary.against_full for phase, summary in phases.items()},
    )
    return to_json(result)
