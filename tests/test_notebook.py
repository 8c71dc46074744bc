"""The notebook of examples/ runs as it stands, in a kernel of this environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel come with the extra `dev`")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "digits.ipynb"
PHASES = ["full"] * 5 + ["warmup"] * 2 + ["lora"] * 3


@pytest.mark.slow
def test_it_runs_learns_and_draws(monkeypatch):
    """It is kept without what it shows, which only running it brings."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    epochs = re.findall(r"^epoch (\d+): phase (\w+), loss (\d\.\d+)", text, re.MULTILINE)
    assert [(int(epoch), phase) for epoch, phase, _ in epochs] == list(enumerate(PHASES, 1)), text
    assert float(epochs[-1][2]) < 0.5 < float(epochs[0][2])
    (top1, difference), *_ = re.findall(r"top-1 (.*)%, logits differ by (.*)", text)
    assert float(top1) > 70
    assert float(difference) < 1e-4
    (figure,) = [data for output in outputs if (data := output.get("data", {}).get("application/vnd.plotly.v1+json"))]
    assert [len(trace["x"]) for trace in figure["data"]] == [5, 2, 3]
