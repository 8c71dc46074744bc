"""A run's phases as a table, for the terminal and for the report."""

from __future__ import annotations

from prelora_ray.measures import measures_of
from prelora_ray.recorded.run import RunRecords
from prelora_ray.summaries import table_summaries
from prelora_ray.words import in_percent, number


def phase_rows(run: RunRecords) -> list[dict[str, str]]:
    """A row for each phase, or where its images grew for each of their sizes: cells by column, in order.

    Memory is told of GPUs alone, as `summaries.memory_note` says.
    """
    measures = measures_of(run.settings.task)
    return [
        {
            "phase": name,
            "epochs": str(summary.epochs),
            "loss": number(summary.loss),
            **{measure.column: measure.cell(summary.measures[measure.key]) for measure in measures},
            f"{run.settings.sample}s/s": f"{summary.images_per_second:,.0f}",
            "against full": "-" if summary.against_full is None else f"{summary.against_full:.2f}",
            "start-up, s": "-" if summary.startup_seconds is None else f"{summary.startup_seconds:,.1f}",
            "waits, %": in_percent(summary.data_wait_fraction),
            "trains, %": in_percent(summary.trainable_fraction),
            "memory, GiB": f"{summary.peak_memory_bytes / 2**30:.2f}" if run.on_gpu else "-",
            "seconds": f"{summary.seconds:,.0f}",
        }
        for name, summary in table_summaries(run.epochs).items()
    ]
