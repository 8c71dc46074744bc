"""The figures of a report, drawn by plotly, which reads some tags as markup: texts from records are escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prelora_ray.measures import Measure, measure_named, measures_of
from prelora_ray.method.architecture import family_of, layers_of
from prelora_ray.records import EpochLine, Resize
from prelora_ray.report.records import ReportedRun
from prelora_ray.words import counted

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers tell apart (jfly.uni-koeln.de/color)."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""With the colours: runs beyond the palette stay apart, on grey paper too."""
_BANDS = {"full": "rgba(0,0,0,0)", "warmup": "rgba(230,159,0,0.13)", "lora": "rgba(86,180,233,0.13)"}
_MARKS = {"restart": "#D55E00", "resize": "#009E73", "preemption": "#CC79A7"}
_SIZE_MARK = "#000000"
_SYMBOLS = ("star", "circle", "square", "diamond", "cross", "x")
_WIDE = 300.0
"""Between values that are so many times as large and more, a log axis has ticks at powers of 10 alone."""
_GROWTH = ("fixed", "per_worker", "per_worker_squared")
"""Factors of a benchmark's figure, by the power of the number of workers."""
_NEAR = 0.05
"""Marks closer than this share of the epochs have one label, or theirs would lie over each other on a narrow screen."""


def learning(runs: Sequence[ReportedRun]) -> go.Figure:
    """Loss, the other measures and the learning rate over the epochs."""
    tasks = dict.fromkeys(run.settings.task for run in runs)
    measures = [measure for task in tasks for measure in measures_of(task) if measure.key != "val_loss"]
    figure = _panels(["loss", *(measure.column for measure in measures), "learning rate"])
    last = len(measures) + 2
    for index, run in enumerate(runs):
        of = f"{escape(run.name)}: " if len(runs) > 1 else ""
        losses, val_losses = [line.loss for line in run.epochs], [line.val_loss for line in run.epochs]
        rates = [line.learning_rate for line in run.epochs]
        _line(figure, 1, run.done, losses, f"{of}training", index)
        _line(figure, 1, run.done, val_losses, f"{of}validation", index, opacity=0.55, markers=True)
        for row, measure in enumerate(measures, 2):
            fields = {measure.key: "", measure.averaged: " of averaged weights"}
            for field, what in fields.items():
                values = [_value(line, field, measure) for line in run.epochs]
                if field == measure.key or any(value is not None for value in values):
                    opacity = 0.55 if what else 1.0
                    _line(figure, row, run.done, values, f"{of}{measure.title}{what}", index, legend=False, opacity=opacity)
        _line(figure, last, run.done, rates, f"{of}learning rate", index, legend=False)
    return _with_marks(figure, runs, last)


def _value(line: EpochLine, field: str | None, measure: Measure) -> float | None:
    """A field of a measure, in percent where it is a share; None where the line has none."""
    value: float | None = getattr(line, field or "", None)
    return 100 * value if value is not None and measure.is_share else value


def convergence(run: ReportedRun) -> go.Figure:
    """What the partial convergence test saw: norm changes against tau, loss changes against zeta, its verdicts; and
    norm changes with their sign, where they are recorded."""
    method = run.settings.method
    windows = [(line, line.change) for line in run.windows if line.change is not None]
    signed = [line.signed_change for line, _ in windows if line.signed_change is not None]
    titles = [f"norms, % (tau {method.tau:g})", f"loss, % (zeta {method.zeta:g})", *(["norms, signed, %"] if signed else [])]
    figure = _panels(titles)
    ends = [line.epoch_end for line, _ in windows]
    verdicts = ["in the ramp" if w.in_ramp else "converged" if w.converged else "not yet" for w, _ in windows]
    for index, family in enumerate(windows[0][1] if windows else ()):
        changes = [change[family] for _, change in windows]
        _line(figure, 1, ends, changes, family, index, markers=True, hover=verdicts)
        if signed:
            changes = [(line.signed_change or {}).get(family) for line, _ in windows]
            _line(figure, 3, ends, changes, family, index, markers=True, legend=False)
    losses = [line.loss_change for line, _ in windows]
    _line(figure, 2, ends, losses, "loss", 6, markers=True, hover=verdicts)
    norms = [change for _, changes in windows for change in changes.values()]
    for row, limit, values in ((1, method.tau, norms), (2, method.zeta, losses)):
        figure.add_hline(limit, row=row, col=1, line={"color": "black", "dash": "dash", "width": 1})
        figure.update_yaxes(**_log_axis([limit, *values]), row=row, col=1)
    return _with_marks(figure, [run], len(titles))


def ranks(run: ReportedRun) -> go.Figure:
    """Ranks by layer and family."""
    assert run.ranks
    layer_of = layers_of(run.ranks)
    layers, families = sorted(set(layer_of.values())), list(dict.fromkeys(map(family_of, run.ranks)))
    by_place = {(layer_of[name], family_of(name)): rank for name, rank in run.ranks.items()}
    table = [[by_place.get((layer, family)) for layer in layers] for family in families]
    heatmap = go.Heatmap(
        z=table,
        x=layers,
        y=families,
        text=table,
        texttemplate="%{text}",
        colorscale="Cividis",
        colorbar={"title": {"text": "rank", "side": "right"}},
    )
    figure = go.Figure(heatmap, layout=_layout(height=120 + 40 * len(families), left=70))
    figure.update_xaxes(title="layer", dtick=1)
    figure.update_yaxes(autorange="reversed")
    return figure


def speed(runs: Sequence[ReportedRun]) -> go.Figure:
    """Throughput, time of an epoch, waiting for data, memory of GPUs and what trains, over the epochs."""
    panels: dict[str, Callable[[EpochLine], float]] = {
        "images/s": lambda line: line.images_per_second,
        "s an epoch": lambda line: line.seconds,
        "waits for data, %": lambda line: 100 * line.data_wait_seconds / line.train_seconds,
        "peak memory, GiB": lambda line: line.peak_memory_bytes / 2**30,
        "trains, %": lambda line: 100 * line.trainable_fraction,
        "workers": lambda line: line.world_size,
    }
    if not any(run.on_gpu for run in runs):
        del panels["peak memory, GiB"]  # as `memory_note` says
    figure = _panels(list(panels))
    for index, run in enumerate(runs):
        for row, (name, value) in enumerate(panels.items(), 1):
            values = [value(line) if run.on_gpu or name != "peak memory, GiB" else None for line in run.epochs]
            _line(figure, row, run.done, values, escape(run.name), index, legend=row == 1 and len(runs) > 1)
    for row in range(1, len(panels) + 1):
        figure.update_yaxes(rangemode="tozero", row=row, col=1)
    return _with_marks(figure, runs, len(panels))


def pareto(sweep: dict[str, Any]) -> go.Figure:
    """What runs are compared by, such as top-1, against cost: every setting of a sweep, with the Pareto front, full
    training and the other controls."""
    figure = go.Figure(layout=_layout(height=480))
    measure = measure_named(sweep["measure"])
    settings, controls = (
        [entry for entry in sweep[kind] if entry[measure.key] is not None] for kind in ("settings", "controls")
    )
    told = [", ".join(f"{key.removeprefix('method.')} {value}" for key, value in e["setting"].items()) for e in settings]
    unit = escape(sweep["unit"])
    _scatter(figure, settings, told, "settings", COLORS[0], "circle", "markers", unit, measure)
    by_trial = {entry["trial"]: entry for entry in [*settings, *controls, sweep["full"]]}
    front = [by_trial[trial] for trial in sweep["pareto"]]
    _scatter(figure, front, sweep["pareto"], "Pareto front", COLORS[1], "diamond", "lines+markers", unit, measure)
    _scatter(figure, [sweep["full"]], ["full training"], "full training", COLORS[2], "star", "markers", unit, measure)
    for kind, name, symbol in (("full", "full training, ended sooner", "star-open"), ("rank 1", "rank 1", "circle-open")):
        own = [entry for entry in controls if entry["setting"]["control"] == kind]
        if own:
            _scatter(figure, own, [entry["trial"] for entry in own], name, COLORS[2], symbol, "markers", unit, measure)
    figure.update_xaxes(title=f"cost of a straight run, {unit}")
    figure.update_yaxes(title=measure.column)
    return figure


def switch_map(
    taus: list[float],
    zetas: list[float],
    values: list[list[float | None]],
    title: str,
    marks: Mapping[str, tuple[float, float]],
) -> go.Figure:
    """What each tau (row) and zeta (column) comes to, such as its switch epoch; empty where it never switches.

    `marks`: (tau, zeta) by name. Those outside the map are left out, and two of one place are one mark.
    """
    heatmap = go.Heatmap(z=values, x=zetas, y=taus, name=title, colorscale="Cividis", hoverongaps=False)
    heatmap.update(
        colorbar={"thickness": 14}, hovertemplate=f"tau %{{y:.3g}}, zeta %{{x:.3g}}<br>{title} %{{z:.4g}}<extra></extra>"
    )
    legend = {"orientation": "h", "yanchor": "top", "y": -0.2}
    figure = go.Figure(heatmap, layout=_layout(height=500, left=70) | {"hovermode": "closest", "legend": legend})
    names: dict[tuple[float, float], list[str]] = {}
    for name, (tau, zeta) in marks.items():
        if min(taus) <= tau <= max(taus) and min(zetas) <= zeta <= max(zetas):
            names.setdefault((tau, zeta), []).append(name)
    for symbol, ((tau, zeta), told) in zip(_SYMBOLS, names.items(), strict=False):
        marker = {"symbol": symbol, "size": 13, "color": "white", "line": {"color": "black", "width": 2}}
        name = escape(f"{', '.join(told)}: tau {tau:g}, zeta {zeta:g}")
        figure.add_trace(go.Scatter(x=[zeta], y=[tau], name=name, mode="markers", marker=marker, showlegend=True))
    figure.update_xaxes(title="zeta, %", **_log_axis(zetas))
    figure.update_yaxes(title="tau, %", **_log_axis(taus))
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


def scale(rows: Sequence[dict[str, Any]], far: int) -> go.Figure:
    """CPU that the parts of a run take, over its number of workers; dotted what it would grow to up to `far`."""
    own = [row for row in rows if row["measured"] == "cpu_ms"]
    given = {row["each"] for row in own}
    panels = [each for each in ("second", "step", "epoch", "start", "restart") if each in given]
    parts = list(dict.fromkeys(row["name"] for row in own))
    numbers: set[int] = set()
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.03)
    figure.update_layout(_layout(height=90 + 300 * len(panels), left=80, modebar="v"))
    for row in own:
        values = {int(key.removesuffix("_workers")): row[key] for key in row if key.endswith("_workers")}
        measured = {workers: value or None for workers, value in values.items()}  # 0 has no place on a log axis
        numbers |= measured.keys()
        panel, index = panels.index(row["each"]) + 1, parts.index(row["name"])
        _line(figure, panel, list(measured), list(measured.values()), row["name"], index, markers=True, legend=panel == 1)
        if row["fixed"] is None:
            continue
        beyond, color = [max(measured), far], COLORS[index % len(COLORS)]
        growth = [sum(row[key] * n**power for power, key in enumerate(_GROWTH)) for n in beyond]
        dotted = {"line": {"color": color, "dash": "dot", "width": 1}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(x=beyond, y=growth, mode="lines", legendgroup=row["name"], **dotted), row=panel, col=1)
    for panel, each in enumerate(panels, 1):
        figure.update_yaxes(title=f"CPU, ms for each {each}", type="log", row=panel, col=1)
    figure.update_xaxes(type="log", tickvals=sorted({*numbers, far}))
    figure.update_xaxes(title="workers; dotted: extrapolated", row=len(panels), col=1)
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
    figure: go.Figure,
    entries: list[dict[str, Any]],
    text: list[str],
    name: str,
    color: str,
    symbol: str,
    mode: str,
    unit: str,
    measure: Measure,
) -> None:
    scale, sign = (100, " %") if measure.is_share else (1, "")
    figure.add_trace(
        go.Scatter(
            x=[entry["cost"] for entry in entries],
            y=[scale * entry[measure.key] for entry in entries],
            text=[escape(line) for line in text],
            name=name,
            mode=mode,
            marker={"color": color, "symbol": symbol, "size": 10},
            line={"color": color, "dash": "dot"},
            hovertemplate=f"%{{text}}<br>%{{x:.3g}} {unit}, {measure.title} %{{y:.2f}}{sign}<extra></extra>",
        )
    )


def _log_axis(values: Sequence[float | None]) -> dict[str, Any]:
    """With ticks at 1, 2 and 5, or where these would lie over each other at 1, 10, 100."""
    positive = [value for value in values if value is not None and value > 0]
    is_wide = bool(positive) and max(positive) > _WIDE * min(positive)
    return {"type": "log", "dtick": 1 if is_wide else "D2"}


def _panels(titles: list[str]) -> go.Figure:
    """Panels under each other over the epochs, zoomed together."""
    figure = make_subplots(rows=len(titles), cols=1, shared_xaxes=True, vertical_spacing=0.2 / (2 * len(titles)))
    figure.update_layout(_layout(height=90 + 190 * len(titles), left=80, modebar="v"))
    for row, title in enumerate(titles, 1):
        figure.update_yaxes(title=title, row=row, col=1)
    figure.update_xaxes(title="epochs completed", ticks="outside", ticklen=6, row=len(titles), col=1)  # off the other axis's 0
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


def _with_marks(figure: go.Figure, runs: Sequence[ReportedRun], rows: int) -> go.Figure:
    """Phases as bands, where there is one run; restarts, resizes and other sizes of images as marks."""
    if len(runs) != 1:
        return figure
    (run,) = runs
    for phase, begin, end in run.phase_bounds():
        for row in range(1, rows + 1):
            text = "<br>" * list(_BANDS).index(phase) + phase  # each in a line of its own: a band may be narrow
            label = {"text": text, "textposition": "top left", "font": {"size": 11}} if row == 1 else {}
            figure.add_shape(
                type="rect", x0=begin, x1=end, y0=0, y1=1, yref="y domain", layer="below", line={"width": 0},
                fillcolor=_BANDS[phase], label=label, row=row, col=1,
            )  # fmt: skip
    marks = [(epoch, f"{before} to {after} px", _SIZE_MARK) for epoch, before, after in run.size_changes()]
    for event in run.events:
        if event.event in _MARKS:
            text = _resized(event) if isinstance(event, Resize) else event.event
            marks.append((event.epoch, escape(text), _MARKS[event.event]))
    for epoch, _, color in marks:
        figure.add_vline(epoch, line={"color": color, "dash": "dot", "width": 1})
    for epoch, text in _labels([(epoch, text) for epoch, text, _ in marks], len(run.epochs)):
        figure.add_annotation(
            x=epoch,
            y=0,
            yref="y domain",
            text=text,
            textangle=-90,
            showarrow=False,
            xanchor="right",
            yanchor="bottom",
            font={"size": 10},
        )
    return figure


def _resized(event: Resize) -> str:
    now = counted(event.world_size, "worker")
    return now if event.before is None else f"{event.before} to {now}"


def _labels(marks: Sequence[tuple[int, str]], epochs: int) -> list[tuple[int, str]]:
    """A label for each group of marks that are near each other, at the first one's place."""
    groups: list[tuple[int, list[str]]] = []
    for epoch, text in sorted(marks):
        if groups and epoch - groups[-1][0] < _NEAR * epochs:
            groups[-1][1].append(text)
        else:
            groups.append((epoch, [text]))
    return [(epoch, texts[0] + (f" and {len(texts) - 1} more" if texts[1:] else "")) for epoch, texts in groups]
