"""Draws the panels of the run dashboard from a Prometheus: `python docs/draw_panels.py ADDRESS RUN OUT.png [HOURS]`.

The queries are those of `dashboards/grafana/run.json`. Panels without data are left out, such as a CPU run's for GPUs.
"""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

BOARD = Path(__file__).parents[1] / "dashboards" / "grafana" / "run.json"
COLUMNS = 3
POINTS = 400
UNITS = {"percent": "%", "s": "s", "bytes": "bytes", "iops": "1/s", "percentunit": "0 to 1", "watt": "W"}
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")


def series(address: str, expression: str, hours: float) -> list[dict[str, Any]]:
    end = time.time()
    step = max(1.0, hours * 3600 / POINTS)
    parameters = {"query": expression, "start": end - hours * 3600, "end": end, "step": step}
    with urllib.request.urlopen(f"{address}/api/v1/query_range?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
        return list(json.loads(answer.read())["data"]["result"])


def name(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend).strip()


def main(address: str, run: str, out: str, hours: float = 0.25) -> None:
    panels = [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]
    drawn = []
    for panel in panels:
        lines = []
        for target in panel["targets"]:
            expression = target["expr"].replace("$run", run).replace("$__rate_interval", "15s")
            lines += [(name(target["legendFormat"], s["metric"]), s["values"]) for s in series(address, expression, hours)]
        if lines:
            drawn.append((panel["title"], panel["fieldConfig"]["defaults"]["unit"], lines))
    rows = -(-len(drawn) // COLUMNS)
    titles = [f"{title} [{UNITS[unit]}]" if unit in UNITS else title for title, unit, _ in drawn]
    figure = make_subplots(rows, COLUMNS, subplot_titles=titles, vertical_spacing=0.35 / rows, horizontal_spacing=0.06)
    for index, (_, _, lines) in enumerate(drawn):
        for number, (legend, values) in enumerate(lines):
            times, numbers = zip(*((datetime.fromtimestamp(t), float(v)) for t, v in values), strict=True)
            line = go.Scatter(x=times, y=numbers, name=legend, mode="lines", line={"color": COLORS[number % len(COLORS)]})
            figure.add_trace(line, index // COLUMNS + 1, index % COLUMNS + 1)
            if len(lines) > 1:
                figure.add_annotation(
                    x=times[-1], y=numbers[-1], text=legend, showarrow=False, xanchor="right", yanchor="bottom",
                    font={"size": 10, "color": COLORS[number % len(COLORS)]}, row=index // COLUMNS + 1, col=index % COLUMNS + 1,
                )  # fmt: skip
    ends = [datetime.fromtimestamp(t) for _, _, lines in drawn for _, values in lines for t in (values[0][0], values[-1][0])]
    figure.update_xaxes(range=[min(ends), max(ends)])
    figure.update_layout(template="plotly_white", showlegend=False, width=1400, height=260 * rows, margin={"t": 50})
    figure.write_image(out, scale=1.5)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(float, sys.argv[4:]))
