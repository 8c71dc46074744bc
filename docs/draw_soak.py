"""Draws what a soak found: `python docs/draw_soak.py SOAK.jsonl OUT.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

PANELS = {
    "memory, MiB": ("memory", 2**-20),
    "threads": ("threads", 1),
    "open files": ("files", 1),
}
FOLDERS = {"folder_bytes": "run folder but for records", "records_bytes": "records", "ray_bytes": "Ray's folder"}

if __name__ == "__main__":
    source, out = sys.argv[1:]
    lines = [json.loads(line) for line in Path(source).read_text().splitlines()]
    minutes = [line["seconds"] / 60 for line in lines]
    parts = sorted({part for line in lines for part in line["parts"]})
    figure = make_subplots(rows=len(PANELS) + 1, cols=1, shared_xaxes=True, vertical_spacing=0.04)
    for row, (title, (key, scale)) in enumerate(PANELS.items(), 1):
        for i, part in enumerate(parts):
            values = [scale * line["parts"][part][key] if part in line["parts"] else None for line in lines]
            color = go.Figure().layout.template.layout.colorway[i % 10]
            shown = {"name": part, "legendgroup": part, "line_color": color, "showlegend": row == 1}
            figure.add_scatter(x=minutes, y=values, **shown, row=row, col=1)
        figure.update_yaxes(title=title, rangemode="tozero", row=row, col=1)
    for (key, name), dash in zip(FOLDERS.items(), ("solid", "dash", "dot"), strict=True):
        sizes, line = [line[key] / 1e6 for line in lines], {"color": "black", "dash": dash}
        figure.add_scatter(x=minutes, y=sizes, name=name, line=line, row=len(PANELS) + 1, col=1)
    figure.update_yaxes(title="MB", rangemode="tozero", row=len(PANELS) + 1, col=1)
    figure.update_xaxes(title="minutes", row=len(PANELS) + 1, col=1)
    figure.update_layout(height=1100, template="plotly_white", margin={"l": 60, "r": 10, "t": 10, "b": 40})
    figure.write_image(out, width=900, scale=1.5)
