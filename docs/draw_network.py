"""Draws a kept result of `prelora bench network --out`: `python docs/draw_network.py RESULT.json OUT.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prelora_ray.report import figures

if __name__ == "__main__":
    result, out = sys.argv[1:]
    figures.network(json.loads(Path(result).read_text())["rows"]).write_image(out, width=900, scale=1.5)
