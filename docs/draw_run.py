"""Draws the picture of a run that the README shows: `python docs/draw_run.py RUN OUT.png` (needs matplotlib)."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLORS = {"full": "#0072B2", "warmup": "#E69F00", "lora": "#009E73"}  # told apart by colour-blind readers too


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(run: Path, out: Path) -> None:
    epochs, windows = lines(run / "epochs.jsonl"), lines(run / "windows.jsonl")
    config = (run / "config.yaml").read_text()
    tau = float(config.split("tau: ")[1].split("\n")[0])
    ranks = json.loads((run / "ranks.json").read_text())
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=[1.2, 1.2, 1])
    for axis in (left, middle):
        for phase, color in COLORS.items():
            inside = [line["epoch"] for line in epochs if line["phase"] == phase]
            axis.axvspan(inside[0], inside[-1] + 1, color=color, alpha=0.12, lw=0)
            axis.text(
                (inside[0] + inside[-1] + 1) / 2, 1.02, phase, color=color, ha="center", transform=axis.get_xaxis_transform()
            )
        axis.set_xlabel("epochs")
        axis.set_xlim(0, len(epochs))
    ends = [line["epoch"] + 1 for line in epochs]
    left.plot(ends, [line["loss"] for line in epochs], color="black", lw=1.2, label="training loss")
    left.plot(ends, [line["val_top1"] for line in epochs], color="#D55E00", lw=1.2, label="held-out top-1")
    left.legend(frameon=False, loc="center right")
    marks = dict(zip(("query", "key", "value", "proj", "fc1", "fc2"), "os^vDP", strict=True))
    for family, mark in marks.items():
        points = [(line["epoch_end"], line["change"][family]) for line in windows if line["change"]]
        middle.plot(*zip(*points, strict=True), marker=mark, ms=3, lw=0.8, label=family)
    middle.axhline(tau, color="black", ls="--", lw=1)
    middle.text(1, tau * 1.1, f"tau = {tau:g} %")
    middle.set_yscale("log")
    middle.set_ylabel("change of the norms per window, %")
    middle.legend(frameon=False, ncols=2, fontsize=8)
    layers = sorted({int(name.split(".")[1]) for name in ranks})
    table = [
        [next(r for n, r in ranks.items() if n.split(".")[1] == str(layer) and n.endswith(f)) for f in marks]
        for layer in layers
    ]
    right.imshow(table, cmap="Blues", aspect="auto", vmin=0, vmax=max(ranks.values()) * 1.3)
    for i, row in enumerate(table):
        for j, rank in enumerate(row):
            right.text(j, i, rank, ha="center", va="center", fontsize=8)
    right.set_xticks(range(len(marks)), list(marks), rotation=30)
    right.set_yticks(layers)
    right.set_ylabel("layer")
    right.set_title("rank of each adapter", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
