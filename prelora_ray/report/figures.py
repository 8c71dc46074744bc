"""The figures of a report, drawn by plotly, which reads some tags as markup: texts from records are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prelora_ray.method.architecture import FAMILIES, family_of, layer_of
from prelora_ray.records import Resize
from prelora_ray.report.records import RunRecords

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers tell apart (jfly.uni-koeln.de/color)."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""With the colours: runs beyond the palette stay apart, on grey paper too."""
_BANDS = {"full": "rgba(0,0,0,0)", "warmup": "rgba(230,159,0,0.13)", "lora": "rgba(86,180,233,0.13)"}
_MARKS = {"restart": "#D55E00", "resize": "#009E73", "preemption": "#CC79A7"}
_SIZE_MARK = "#000000"


def learning(runs: Sequence[RunRecords]) -> go.Figure:
    """Loss and top-1 over the epochs."""
    figure = _panels(["loss", "top-1, %", "learning rate"])
    for index, run in enumerate(runs):
        of = f"{escape(run.name)}: " if len(runs) > 1 else ""
        losses, val_losses = [line.loss for line in run.epochs], [line.val_loss for line in run.epochs]
        top1 = [None if line.val_top1 is None else line.val_top1 * 100 for line in run.epochs]
        rates = [line.learning_rate for line in run.epochs]
        _line(figure, 1, run.done, losses, f"{of}training", index)
        _line(figure, 1, run.done, val_losses, f"{of}validation", index, opacity=0.55, markers=True)
        _line(figure, 2, run.done, top1, f"{of}top-1", index, legend=False)
        _line(figure, 3, run.done, rates, f"{of}learning rate", index, legend=False)
    return _with_marks(figure, runs, 3)


def convergence(run: RunRecords) -> go.Figure:
    """What the partial convergence test saw: norm changes against tau, loss changes against zeta, its verdicts."""
    method = run.settings.method
    figure = _panels([f"norm change, % (tau {method.tau:g})", f"loss change, % (zeta {method.zeta:g})"])
    windows = [(line, line.change) for line in run.windows if line.change is not None]
    ends = [line.epoch_end for line, _ in windows]
    verdicts = ["in the ramp" if w.in_ramp else "converged" if w.converged else "not yet" for w, _ in windows]
    for index, family in enumerate(family for family in FAMILIES if windows and family in windows[0][1]):
        changes = [change[family] for _, change in windows]
        _line(figure, 1, ends, changes, family, index, markers=True, hover=verdicts)
    _line(figure, 2, ends, [line.loss_change for line, _ in windows], "loss", 6, markers=True, hover=verdicts)
    for row, limit in ((1, method.tau), (2, method.zeta)):
        figure.add_hline(limit, row=row, col=1, line={"color": "black", "dash": "dash", "width": 1})
        figure.update_yaxes(type="log", dtick="D2", row=row, col=1)
    return _with_marks(figure, [run], 2)


def ranks(run: RunRecords) -> go.Figure:
    """Ranks by layer and family."""
    assert run.ranks
    places = {name: (layer_of(name), family_of(name)) for name in run.ranks}
    layers = sorted({layer for layer, _ in places.values()})
    families = [family for family in FAMILIES if any(other == family for _, other in places.values())]
    by_place = {place: run.ranks[name] for name, place in places.items()}
    table = [[by_place.get((layer, family)) for layer in layers] for family in families]
    heatmap = go.Heatmap(
        z=table, x=layers, y=families, text=table, texttemplate="%{text}", colorscale="Cividis", colorbar={"title": "rank"}
    )
    figure = go.Figure(heatmap, layout=_layout(height=120 + 40 * len(families), left=70))
    figure.update_xaxes(title="layer", dtick=1)
    figure.update_yaxes(autorange="reversed")
    return figure


def speed(runs: Sequence[RunRecords]) -> go.Figure:
    """Throughput, time of an epoch, waiting for data, memory and what trains, over the epochs."""
    figure = _panels(
        ["images/s", "seconds an epoch", "waiting for data, %", "peak memory, GiB", "trainable parameters, %", "workers"]
    )
    for index, run in enumerate(runs):
        columns: list[list[float]] = [
            [line.images_per_second for line in run.epochs],
            [line.seconds for line in run.epochs],
            [100 * line.data_wait_seconds / line.train_seconds for line in run.epochs],
            [line.peak_memory_bytes / 2**30 for line in run.epochs],
            [100 * line.trainable_fraction for line in run.epochs],
            [line.world_size for line in run.epochs],
        ]
        for row, values in enumerate(columns, 1):
            _line(figure, row, run.done, values, escape(run.name), index, legend=row == 1 and len(runs) > 1)
    for row in range(1, 7):
        figure.update_yaxes(rangemode="tozero", row=row, col=1)
    return _with_marks(figure, runs, 6)


def pareto(sweep: dict[str, Any]) -> go.Figure:
    """Top-1 against cost, every setting of a sweep, with the Pareto front, full training and the other controls."""
    figure = go.Figure(layout=_layout(height=480))
    settings, controls = (
        [entry for entry in sweep[kind] if entry["val_top1"] is not None] for kind in ("settings", "controls")
    )
    told = [", ".join(f"{key.removeprefix('method.')} {value}" for key, value in e["setting"].items()) for e in settings]
    unit = escape(sweep["unit"])
    _scatter(figure, settings, told, "settings", COLORS[0], "circle", "markers", unit)
    by_trial = {entry["trial"]: entry for entry in [*settings, *controls, sweep["full"]]}
    front = [by_trial[trial] for trial in sweep["pareto"]]
    _scatter(figure, front, sweep["pareto"], "Pareto front", COLORS[1], "diamond", "lines+markers", unit)
    _scatter(figure, [sweep["full"]], ["full training"], "full training", COLORS[2], "star", "markers", unit)
    for kind, name, symbol in (("full", "full training, ended sooner", "star-open"), ("rank 1", "rank 1", "circle-open")):
        own = [entry for entry in controls if entry["setting"]["control"] == kind]
        if own:
            _scatter(figure, own, [entry["trial"] for entry in own], name, COLORS[2], symbol, "markers", unit)
    figure.update_xaxes(title=f"cost of a straight run, {unit}")
    figure.update_yaxes(title="top-1, %")
    return figure


def switch_map(taus: list[float], zetas: list[float], values: list[list[float | None]], title: str) -> go.Figure:
    """What each tau (row) and zeta (column) comes to, such as its switch epoch; empty where it never switches."""
    heatmap = go.Heatmap(z=values, x=zetas, y=taus, colorscale="Cividis", colorbar={"title": title}, hoverongaps=False)
    figure = go.Figure(heatmap, layout=_layout(height=420, left=70))
    figure.update_xaxes(title="zeta, %", type="log")
    figure.update_yaxes(title="tau, %", type="log")
    return figure


def network(rows: Sequence[dict[str, Any]]) -> go.Figure:
    """Time of a step, and speed as a multiple of full training's, over the bandwidth of each worker's link."""
    panels = {"milliseconds": "ms a step", "against_full": "speed, of full"}
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    figure.update_layout(_layout(height=620, left=80, modebar="v"))
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(row["name"].rpartition(", ")[0], []).append(row)
    for index, (name, points) in enumerate(lines.items()):
        links = [point["name"].rpartition(", ")[2] for point in points]
        for panel, key in enumerate(panels, 1):
            values = [point[key] for point in points]
            _line(figure, panel, links, values, name, index, markers=True, legend=panel == 1)
    for panel, title in enumerate(panels.values(), 1):
        figure.update_yaxes(title=title, type="log", row=panel, col=1)
    figure.update_xaxes(title="link of each worker", type="category", row=2, col=1)
    return figure


def plan(by_switch: list[float], levels: dict[str, float], break_even: int | None) -> go.Figure:
    """GPU-hours of a run that switches after 1, 2, ... epochs, beside those of runs that never do, by name."""
    figure = go.Figure(layout=_layout(height=480))
    epochs = list(range(1, len(by_switch) + 1))
    curves = {"switched": by_switch, **{name: [hours] * len(epochs) for name, hours in levels.items()}}
    for index, (name, hours) in enumerate(curves.items()):
        line = {"color": COLORS[index], "dash": DASHES[index]}
        figure.add_trace(go.Scatter(x=epochs, y=hours, name=escape(name), mode="lines", line=line))
    if break_even is not None:
        figure.add_vline(break_even, line={"color": "black", "dash": "dot", "width": 1}, annotation_text="break-even")
    figure.update_xaxes(title="epochs before the switch")
    figure.update_yaxes(title="GPU-hours", rangemode="tozero")
    return figure


def _scatter(
    figure: go.Figure, entries: list[dict[str, Any]], text: list[str], name: str, color: str, symbol: str, mode: str, unit: str
) -> None:
    figure.add_trace(
        go.Scatter(
            x=[entry["cost"] for entry in entries],
            y=[100 * entry["val_top1"] for entry in entries],
            text=[escape(line) for line in text],
            name=name,
            mode=mode,
            marker={"color": color, "symbol": symbol, "size": 10},
            line={"color": color, "dash": "dot"},
            hovertemplate=f"%{{text}}<br>%{{x:.3g}} {unit}, top-1 %{{y:.2f}} %<extra></extra>",
        )
    )


def _panels(titles: list[str]) -> go.Figure:
    """Panels under each other over the epochs, zoomed together."""
    figure = make_subplots(rows=len(titles), cols=1, shared_xaxes=True, vertical_spacing=0.2 / (2 * len(titles)))
    figure.update_layout(_layout(height=90 + 190 * len(titles), left=80, modebar="v"))
    for row, title in enumerate(titles, 1):
        figure.update_yaxes(title=title, row=row, col=1)
    figure.update_xaxes(title="epochs completed", row=len(titles), col=1)
    return figure


def _layout(*, height: int, left: int = 60, modebar: str = "h") -> dict[str, Any]:
    return {
        "template": "plotly_white",
        "height": height,
        "margin": {"l": left, "r": 40, "t": 50, "b": 50},
        "modebar": {"orientation": modebar},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01},
        "font": {"family": "sans-serif", "size": 13},
    }


def _line(
    figure: go.Figure,
    row: int,
    x: Sequence[int | str],
    y: list[Any],
    name: str,
    index: int,
    *,
    markers: bool = False,
    opacity: float = 1.0,
    hover: list[str] | None = None,
    legend: bool = True,
) -> None:
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            name=name,
            mode="lines+markers" if markers else "lines",
            opacity=opacity,
            connectgaps=True,
            line={"color": COLORS[index % len(COLORS)], "dash": DASHES[index // len(COLORS) % len(DASHES)], "width": 2},
            marker={"size": 4},
            text=hover,
            hovertemplate="%{y:.4g}" + (" (%{text})" if hover else ""),
            legendgroup=name,
            showlegend=legend,
        ),
        row=row,
        col=1,
    )


def _with_marks(figure: go.Figure, runs: Sequence[RunRecords], rows: int) -> go.Figure:
    """Phases as bands, where there is one run; restarts, resizes and other sizes of images as marks."""
    if len(runs) != 1:
        return figure
    (run,) = runs
    for phase, begin, end in run.phase_bounds():
        for row in range(1, rows + 1):
            label = {"text": phase, "textposition": "top left", "font": {"size": 11}} if row == 1 else {}
            figure.add_shape(
                type="rect", x0=begin, x1=end, y0=0, y1=1, yref="y domain", layer="below", line={"width": 0},
                fillcolor=_BANDS[phase], label=label, row=row, col=1,
            )  # fmt: skip
    marks = [(epoch, f"{before} to {after} px", _SIZE_MARK) for epoch, before, after in run.size_changes()]
    for event in run.events:
        if event.event in _MARKS:
            text = f"{event.before} to {event.world_size} workers" if isinstance(event, Resize) else event.event
            marks.append((event.epoch, escape(text), _MARKS[event.event]))
    for epoch, text, color in marks:
        figure.add_vline(epoch, line={"color": color, "dash": "dot", "width": 1})
        figure.add_annotation(
            x=epoch,
            y=1,
            yref="y domain",
            text=text,
            textangle=-90,
            showarrow=False,
            xanchor="right",
            font={"size": 10},
        )
    return figure
