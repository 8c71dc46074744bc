"""The report's file, opened in a real browser without network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest

from prelora_ray.config_file import parse_settings
from prelora_ray.records import table_summaries, to_json
from prelora_ray.report import figures
from prelora_ray.report.page import write_plan, write_report, write_switch_map
from prelora_ray.report.records import RunRecords, differing_settings, read_runs, short_names
from prelora_ray.run_folder import LineWriter, RunFolder
from tests.lines import epoch_line, event

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def opened(page: Path) -> str:
    """The document after its scripts have run. Raises AssertionError where one of them complained."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *("--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", page.as_uri()),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
    return result.stdout


def drawn(document: str) -> dict[str, int]:
    """How many traces each figure shows."""
    found = {}
    for part in document.split('<div id="')[1:]:
        name = part[: part.index('"')]
        traces = len(re.findall(r'<g class="trace (?:scatter|heatmap)|<g class="hm"', part))
        if "plotly-graph-div" in part[:400]:
            found[name] = traces
    return found


def test_every_figure_of_a_run_is_drawn(undisturbed, tmp_path):
    run = str(RunFolder.of(undisturbed(2)))
    names = write_report([run], str(tmp_path / "report.html"))
    assert names == ["learning", "convergence", "ranks", "speed"]
    figures = drawn(opened(tmp_path / "report.html"))
    # training, validation, top-1, rate; six families and the loss; a heatmap; six panels
    assert figures == {"learning": 4, "convergence": 7, "ranks": 1, "speed": 6}
    page = (tmp_path / "report.html").read_text()
    assert "4 to 6 px" in page and "<td>full, 4 px</td><td>1</td>" in page


def test_runs_side_by_side_tell_what_differs(undisturbed, tmp_path):
    runs = [str(RunFolder.of(undisturbed(workers))) for workers in (1, 2)]
    assert differing_settings(read_runs(runs)) == {"workers.min": [1, 2], "workers.max": [1, 2]}
    names = write_report(runs, str(tmp_path / "report.html"))
    assert names.count("learning") == 1 and "ranks-plain-1-fp32" in names
    document = opened(tmp_path / "report.html")
    assert set(drawn(document)) == set(names)
    assert "<td>workers.min</td><td>1</td><td>2</td>" in document


def test_pictures_over_tau_and_zeta(tmp_path):
    write_switch_map([0.5, 1.0], [1.0, 2.0, 4.0], {"switch": [[None, 9, 6], [9, 6, 6]]}, str(tmp_path / "map.html"))
    assert drawn(opened(tmp_path / "map.html")) == {"map-0": 1}


def test_a_plan_is_drawn_beside_runs_that_never_switch(tmp_path):
    write_plan("vit", [2.0, 3.0, 4.0], {"full training": 3.5, "timm eager, full": 5.0}, 2, str(tmp_path / "plan.html"))
    assert drawn(opened(tmp_path / "plan.html")) == {"plan": 3}


def test_names_are_text_and_not_markup(undisturbed, tmp_path):
    source = Path(RunFolder.of(undisturbed(1)).path)
    shutil.copytree(source, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "ray"))
    found = event("diagnosis", signature="early_switch", value=1.0, limit=0.0, message="<script>alert(1)</script>")
    LineWriter(RunFolder(tmp_path / "run"), "events.jsonl").write(**to_json(found))
    write_report([str(tmp_path / "run")], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/runs/a", "/runs/b/"], ["a", "b"]),
        (["/a/digits", "/b/digits", "/b/other"], ["a/digits", "b/digits", "other"]),
        (["/x/a/digits", "/y/a/digits", "/b/digits"], ["x/a/digits", "y/a/digits", "b/digits"]),
        (["/digits", "/runs/digits"], ["/digits", "runs/digits"]),
        (["s3://a/digits", "s3://b/digits"], ["a/digits", "b/digits"]),
    ],
)
def test_names_are_as_short_as_tells_them_apart(paths, names):
    assert short_names(paths) == names


def test_two_runs_of_one_name_are_told_apart(undisturbed, tmp_path, monkeypatch):
    for user, workers in (("a", 1), ("b", 2)):
        source = Path(RunFolder.of(undisturbed(workers)).path)
        shutil.copytree(source, tmp_path / user / "run", ignore=shutil.ignore_patterns("checkpoints", "ray"))
    monkeypatch.chdir(tmp_path / "a")
    paths = ["run", "../b/run", str(tmp_path / "a" / "run")]
    names = write_report(paths, str(tmp_path / "report.html"))
    assert [name for name in names if name.startswith("ranks")] == ["ranks-a-run", "ranks-b-run"]
    page = (tmp_path / "report.html").read_text()
    assert "<th>setting</th><th>a/run</th><th>b/run</th>" in page
    legend = [trace.name for trace in figures.learning(read_runs(paths)).data if trace.showlegend]
    assert legend == ["a/run: training", "a/run: validation", "b/run: training", "b/run: validation"]


MARKUP = '"><script>alert(1)</script><a href="http://x">'


def test_runs_whose_names_are_markup_are_shown_by_them():
    """What plotly gets is escaped too: it would make a link of the name, or letters bold."""
    records = [replace(records_of_an_epoch(), name=name) for name in ("plain", MARKUP)]
    for figure in (figures.learning(records), figures.speed(records)):
        names = {trace.name.split(": ")[0] for trace in figure.data}
        assert names == {"plain", escape(MARKUP)}


def test_runs_in_folders_whose_names_are_markup(undisturbed, tmp_path):
    """The name of a figure's place in the page is one of a run too."""
    folders = [tmp_path / name for name in ("plain", MARKUP.replace("/", "-"))]
    for workers, folder in enumerate(folders, 1):
        shutil.copytree(RunFolder.of(undisturbed(workers)).path, folder, ignore=shutil.ignore_patterns("checkpoints", "ray"))
    write_report([str(folder) for folder in folders], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert(1)" not in page and "<a href" not in page.split("<body>")[1]


def test_a_sweep_with_markup_in_its_records(tmp_path):
    entry = {
        "setting": {f"method.{MARKUP}": MARKUP},
        "trial": MARKUP,
        "ended": "finished",
        "message": MARKUP,
        "switch_epoch": MARKUP,
        "trainable_fraction": 0.5,
        "gpu_hours": 1.0,
        "val_top1": 0.5,
        "diagnosis": [MARKUP],
    }
    sweep = {"trials": MARKUP, "settings": [entry], "pareto": [0], "full": entry, "gpu_hours": 1.0, "naive_gpu_hours": 2.0}
    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps(sweep))
    write_report([str(folder)], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert(1)" not in page and "<a href" not in page.split("<body>")[1]
    assert f"<p>{escape(MARKUP)} runs stand for" in page
    texts = [text for trace in figures.pareto(sweep).data for text in trace.text]
    assert len(texts) == 3 and not any("<" in text for text in texts)


def records_of_an_epoch() -> RunRecords:
    """A run of one epoch, as small as its figures take it."""
    settings = parse_settings({"name": "run", "data": {"path": "data"}})
    return RunRecords("run", settings, [epoch_line(0)], [], [], None)


def test_sizes_are_marked_where_they_are_on_record():
    """An earlier version recorded none, so that a run that it began has some from where it was resumed on."""
    sizes = [None, None, 160, 160, 224]
    run = replace(records_of_an_epoch(), epochs=[epoch_line(epoch, image_size=size) for epoch, size in enumerate(sizes)])
    assert run.size_changes() == [(4, 160, 224)]
    assert list(table_summaries(run.epochs)) == ["full, ? px", "full, 160 px", "full, 224 px"]


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        write_report([str(tmp_path)], str(tmp_path / "report.html"))
    assert not (tmp_path / "report.html").exists()
