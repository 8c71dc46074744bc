"""One HTML file that needs no network, and pictures for slides."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from prelora_ray.errors import UserError
from prelora_ray.records import Diagnosis, Switch
from prelora_ray.report import figures
from prelora_ray.report.facts import facts, sweep_facts
from prelora_ray.report.phase_table import phase_rows
from prelora_ray.report.records import ReportedRun, differing_settings, read_runs, read_sweep, runs_of_sweep
from prelora_ray.report.sweep_table import sweep_table, told_of_controls, told_of_cost
from prelora_ray.storage import absolute
from prelora_ray.summaries import gain_note, memory_note
from prelora_ray.words import counted

Section = tuple[str, str, str, go.Figure | None]
"""Name of its picture, title, text in HTML, and its figure."""

_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; overflow-wrap: anywhere }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.9em } th, td { padding: 0.25em 0.7em; text-align: right }
th { border-bottom: 2px solid #888 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: #f5f5f5 }
.wide { overflow-x: auto; overflow-wrap: normal } .facts td, .facts th { text-align: left }
.finding, .healthy, .open { border-left: 4px solid #D55E00; padding-left: 0.8em }
.healthy { border-color: #009E73 } .open { border-color: #888 }
@media (max-width: 700px) { body { margin: 1em auto; padding: 0 0.6em } }
@media print { body { max-width: none } section { break-inside: avoid } }
"""
_CONFIG: dict[str, Any] = {"displaylogo": False, "responsive": True}


def write_report(paths: list[str], out: str, png: str | None = None, plotly: str | None = None) -> list[str]:
    """Writes the report of runs, or of a sweep, to the file `out`, and its figures into the folder `png`.

    What draws them is in the report itself, or in the file `plotly`, which many reports may share. Returns the names of
    the figures. Raises UserError where a path is neither, or both kinds are given.
    """
    sweeps = [sweep for path in paths if (sweep := read_sweep(path)) is not None]
    if sweeps and len(paths) > 1:
        raise UserError("a report is of one sweep, or of runs: give a sweep's folder by itself")
    runs = [] if sweeps else read_runs(paths)
    sections = _sweep_sections(sweeps[0], runs_of_sweep(paths[0], sweeps[0])) if sweeps else _run_sections(runs)
    title = f"Sweep {Path(absolute(paths[0])).name}" if sweeps else ", ".join(run.name for run in runs)
    _write(title, sections, out, plotly)
    pictures = {name: figure for name, _, _, figure in sections if figure is not None}
    if png is not None:
        _write_pictures(pictures, Path(absolute(png)))
    return list(pictures)


def write_switch_map(
    taus: list[float],
    zetas: list[float],
    maps: dict[str, list[list[float | None]]],
    out: str,
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Writes pictures over tau (rows) and zeta (columns), by title, to the file `out`; `marks`: (tau, zeta) by name."""
    sections: list[Section] = [
        (f"map-{index}", title, "", figures.switch_map(taus, zetas, values, title, marks or {}))
        for index, (title, values) in enumerate(maps.items())
    ]
    _write("Where tau and zeta switch", sections, out)


def write_scale(result: dict[str, Any], out: str) -> None:
    """Writes what `prelora bench scale` found as a picture to the file `out`."""
    text = "<p>All workers on one machine. What is dotted was not measured: it is what the growth would come to.</p>"
    title = f"{result['device']}, {result['cpus']} cores, {result['date']}"
    _write("What a run's parts cost", [("scale", title, text, figures.scale(result["rows"], result["far"]))], out)


def write_network(result: dict[str, Any], out: str) -> None:
    """Writes what `prelora bench network` found as a picture to the file `out`."""
    title = f"{result['options']['model']} on {result['options']['workers']} x {result['device']}, {result['date']}"
    text = "<p>A simulated link of each worker, behind the exchange that this machine makes without limit.</p>"
    _write("What a step costs over a network", [("network", title, text, figures.network(result["rows"]))], out)


def write_plan(name: str, by_switch: list[float], levels: dict[str, float], break_even: int | None, out: str) -> None:
    """Writes a picture of a plan to the file `out`; its values are those of `figures.plan`."""
    _write(f"Plan of {name}", [("plan", "GPU-hours by switch epoch", "", figures.plan(by_switch, levels, break_even))], out)


def _write(title: str, sections: list[Section], out: str, plotly: str | None = None) -> None:
    page = Path(absolute(out))
    script = f"<script>{get_plotlyjs()}</script>"
    if plotly is not None:
        shared = Path(absolute(plotly))
        shared.write_text(get_plotlyjs(), encoding="utf-8")
        script = f"<script src='{escape(quote(os.path.relpath(shared, page.parent)))}'></script>"
    page.write_text(_page(title, sections, script), encoding="utf-8")


def _run_sections(runs: list[ReportedRun]) -> list[Section]:
    switches = "".join(_switch(run) for run in runs)
    notes = "".join(_notes(run, len(runs) > 1) for run in runs)
    sections: list[Section] = [
        ("", "Summary", _table(*facts(runs), "facts"), None),
        ("", "Diagnosis", "".join(_diagnosis(run) for run in runs), None),
        ("", "By phase", _table(*_phases(runs)) + switches + notes, None),
    ]
    if len(runs) > 1:
        differing = differing_settings(runs)
        rows = [[key, *map(str, values)] for key, values in differing.items()]
        sections.append(("", "Settings that differ", _table(["setting", *(run.name for run in runs)], rows), None))
    sections.append(("learning", "Loss, accuracy, learning rate", "", figures.learning(runs)))
    for run in runs:
        of = f" of {run.name}" if len(runs) > 1 else ""
        suffix = f"-{run.name.replace('/', '-')}" if len(runs) > 1 else ""
        if any(line.change is not None for line in run.windows):
            method = run.settings.method
            text = (
                f"<p>The run switches when, for the last {counted(method.windows - 1, 'step')} between windows of "
                f"{counted(method.window_epochs, 'epoch')}, every family is under tau, and the loss at most at zeta.</p>"
            )
            title = f"Partial convergence test{of}"
            sections.append((f"convergence{suffix}", title, text, figures.convergence(run)))
        if run.ranks:
            sections.append((f"ranks{suffix}", f"Ranks{of}", "", figures.ranks(run)))
    sections.append(("speed", "Speed and memory", "", figures.speed(runs)))
    return sections


def _sweep_sections(sweep: dict[str, Any], runs: list[ReportedRun]) -> list[Section]:
    told = [told_of_cost(sweep), told_of_controls(sweep)]
    text = "".join(f"<p>{escape(sentence)}.</p>" for sentence in told if sentence is not None)
    return [
        ("", "Summary", _table(*sweep_facts(sweep, runs), "facts"), None),
        ("pareto", "Accuracy and cost", text, figures.pareto(sweep)),
        ("", "Settings", _table(*sweep_table(sweep)), None),
    ]


def _diagnosis(run: ReportedRun) -> str:
    """Green is a whole run alone that has finished, switched, and shows nothing."""
    of = f"<b>{escape(run.name)}</b>: "
    found = [*run.state.remarks, *(event.message for event in run.events_of(Diagnosis))]
    told = [("finding", message) for message in found]
    if not run.state.is_finished:
        progress = run.state.progress + ("" if found else "; no failure signature so far")
        told = [("open", progress), *(("open", message) for message in run.state.so_far), *told]
    elif not run.settings.method.enabled:
        told.append(("open", "full training, as method.enabled is false; the failure signatures are of runs that switch"))
    elif run.settings.data.max_batches is not None:
        told.append(("open", "a few batches an epoch, as data.max_batches is set; the failure signatures are of whole runs"))
    elif not found:
        told.append(("healthy", "none of the failure signatures shows"))
    return "".join(f"<p class='{kind}'>{of}{escape(message)}.</p>" for kind, message in told)


def _notes(run: ReportedRun, is_one_of_several: bool) -> str:
    """What is to be said to the numbers of its phases."""
    notes = [gain_note(run.epochs), None if run.on_gpu else memory_note(run.epochs)]
    of = f"{escape(run.name)}: " if is_one_of_several else ""
    return "".join(f"<p>{of}{escape(note)}.</p>" for note in notes if note is not None)


def _switch(run: ReportedRun) -> str:
    switch = run.last_of(Switch)
    if switch is None:
        return ""
    told = f"{run.name} switched after epoch {switch.switch_epoch} of {run.settings.train.epochs}"
    if switch.rate_left is not None:
        told += f", with {switch.rate_left:.1%} of the learning rate's sum left: the less, the less it says of adapters"
    return f"<p>{escape(told)}.</p>"


def _phases(runs: list[ReportedRun]) -> tuple[list[str], list[list[str]]]:
    rows = [{"run": run.name, **row} for run in runs for row in phase_rows(run)]
    return list(rows[0]), [list(row.values()) for row in rows]


def _table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    table = f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
    return f"<div class='wide {kind}'>{table}</div>"


def _page(title: str, sections: list[Section], script: str) -> str:
    parts = []
    for number, (name, heading, text, figure) in enumerate(sections):
        place = name if re.fullmatch(r"[\w.-]*", name) else f"figure-{number}"  # plotly writes it as it is
        drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=place, config=_CONFIG) if figure else ""
        parts.append(f"<section><h2>{escape(heading)}</h2>{text}{drawn}</section>")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><style>{_STYLE}</style>{script}</head>"
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _write_pictures(pictures: dict[str, go.Figure], folder: Path) -> None:
    """Raises UserError where there is no browser to draw them."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("choreographer").setLevel(logging.CRITICAL)  # it logs half-read messages, then reads them again
    try:
        for name, figure in pictures.items():
            figure.write_image(folder / f"{name}.png", width=1100, scale=2)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--png needs Chrome or Chromium (its path may stand in BROWSER_PATH): {error}") from None
