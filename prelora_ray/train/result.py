"""A run's result, from the records in its folder."""

from __future__ import annotations

from typing import Any

from prelora_ray.measures import best_value, last_value, measures_of
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import Freeze, Result, Switch, to_json
from prelora_ray.run_folder import RunFolder
from prelora_ray.summaries import phase_summaries, rank_counts, restarts, seconds_of_run


def summarize(folder: RunFolder) -> dict[str, Any]:
    """The contents of result.json, from the lines that stand."""
    run = RunRecords(folder)
    phases = phase_summaries(run.epochs)
    switch, freeze = run.last_of(Switch), run.last_of(Freeze)
    measures = measures_of(run.settings.task)
    values = {measure.key: last_value(run.epochs, measure.key) for measure in measures}
    values |= {measure.averaged: last_value(run.epochs, measure.averaged) for measure in measures if measure.averaged}
    values[f"best_{measures[0].key}"] = best_value(run.epochs, measures[0])
    result = Result(
        epochs=run.completed,
        switch_epoch=None if switch is None else switch.switch_epoch,
        freeze_epoch=None if freeze is None else freeze.freeze_epoch,
        **{"val_top1": None, "best_val_top1": None, **values},
        images_per_second={phase: summary.images_per_second for phase, summary in phases.items()},
        peak_memory_bytes={phase: summary.peak_memory_bytes for phase, summary in phases.items()},
        trainable_fraction={phase: summary.trainable_fraction for phase, summary in phases.items()},
        ranks=None if run.ranks is None else {str(rank): n for rank, n in rank_counts(run.ranks).items()},
        restarts=restarts(run.events),
        seconds=seconds_of_run(run.events),
        startup_seconds={phase: summary.startup_seconds for phase, summary in phases.items()},
        against_full={phase: summary.against_full for phase, summary in phases.items()},
    )
    return to_json(result)
