"""Draws the panels of the run dashboard from a Prometheus: `python docs/draw_panels.py ADDRESS RUN OUT.png [HOURS]`.

The queries are those of `dashboards/grafana/run.json`. Panels without data are left out, such as a CPU run's for GPUs,
and so are the tiles of last values.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

BOARD = Path(__file__).parents[1] / "dashboards" / "grafana" / "run.json"
COLUMNS = 3
POINTS = 400
UNITS = {"percent": "%", "s": "s", "bytes": "bytes", "iops": "1/s", "percentunit": "0 to 1", "watt": "W"}
LABEL = 0.11
"""Height of a label, as a share of its panel's."""
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")


def series(address: str, expression: str, hours: float) -> list[dict[str, Any]]:
    end = time.time()
    step = max(1.0, hours * 3600 / POINTS)
    parameters = {"query": expression, "start": end - hours * 3600, "end": end, "step": step}
    with urllib.request.urlopen(f"{address}/api/v1/query_range?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
        return list(json.loads(answer.read())["data"]["result"])


def name(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend).strip()


def spread(heights: Sequence[float], gap: float = LABEL) -> list[float]:
    """Heights in 0..1, moved as little as it takes for labels there to be `gap` apart, in the same order."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved, floor = [0.0] * len(heights), 0.0
    for index in order:
        moved[index] = floor = max(heights[index], floor)
        floor += gap
    ceiling = 1.0
    for index in reversed(order):
        moved[index] = ceiling = min(moved[index], ceiling)
        ceiling -= gap
    return moved


def is_log(panel: dict[str, Any]) -> bool:
    """Whether a panel's axis is a logarithm."""
    return bool(panel["fieldConfig"]["defaults"].get("custom", {}).get("scaleDistribution", {}).get("type") == "log")


def axis_range(numbers: Sequence[float], *, log: bool) -> tuple[float, float]:
    """What an axis shows, as plotly takes it: of a logarithm, powers of ten."""
    values = [math.log10(number) for number in numbers if number > 0] if log else list(numbers)
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def draw(figure: go.Figure, place: tuple[int, int], panel: dict[str, Any], lines: Sequence[tuple[str, Any]]) -> None:
    """One panel's lines, with each one's name at the right end of the panel, beside where the line ends."""
    row, column = place
    log = is_log(panel)
    low, high = axis_range([float(v) for _, values in lines for _, v in values if math.isfinite(float(v))], log=log)
    figure.update_yaxes(type="log" if log else "linear", range=[low, high], row=row, col=column)
    last = [float(values[-1][1]) for _, values in lines]
    ends = [math.log10(max(end, 10**low)) if log else end for end in last]
    heights = spread([min(max((end - low) / (high - low), 0.0), 1.0) for end in ends])
    axis = "" if place == (1, 1) else str((row - 1) * COLUMNS + column)  # plotly's first axis has no number
    for number, ((legend, values), height) in enumerate(zip(lines, heights, strict=True)):
        times, numbers = zip(*((datetime.fromtimestamp(t), float(v)) for t, v in values), strict=True)
        color = COLORS[number % len(COLORS)]
        figure.add_trace(go.Scatter(x=times, y=numbers, name=legend, mode="lines", line={"color": color}), row, column)
        if len(lines) > 1:
            figure.add_annotation(
                x=1.01, y=height, xref=f"x{axis} domain", yref=f"y{axis} domain", text=legend, showarrow=False,
                xanchor="left", yanchor="middle", font={"size": 11, "color": color},
            )  # fmt: skip


def main(address: str, run: str, out: str, hours: float = 0.25) -> None:
    panels = [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] == "timeseries"]
    drawn = []
    for panel in panels:
        lines = []
        for target in panel["targets"]:
            expression = target["expr"].replace("$run", run).replace("$__rate_interval", "15s")
            lines += [(name(target["legendFormat"], s["metric"]), s["values"]) for s in series(address, expression, hours)]
        if lines:
            drawn.append((panel, lines))
    rows = -(-len(drawn) // COLUMNS)
    units = [UNITS.get(panel["fieldConfig"]["defaults"]["unit"]) for panel, _ in drawn]
    titles = [panel["title"] + (f" [{unit}]" if unit else "") for (panel, _), unit in zip(drawn, units, strict=True)]
    figure = make_subplots(rows, COLUMNS, subplot_titles=titles, vertical_spacing=0.35 / rows, horizontal_spacing=0.09)
    for index, (panel, lines) in enumerate(drawn):
        draw(figure, (index // COLUMNS + 1, index % COLUMNS + 1), panel, lines)
    ends = [datetime.fromtimestamp(t) for _, lines in drawn for _, values in lines for t in (values[0][0], values[-1][0])]
    figure.update_xaxes(range=[min(ends), max(ends)])
    figure.update_layout(template="plotly_white", showlegend=False, width=1500, height=260 * rows, margin={"t": 50, "r": 110})
    figure.write_image(out, scale=1.5)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(float, sys.argv[4:]))
