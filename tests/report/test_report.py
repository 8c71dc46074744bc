"""The report's file, opened in a real browser without network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from prelora_ray.config_file import parse_settings
from prelora_ray.recorded.remarks import Remarks
from prelora_ray.records import EpochLine, Event, to_json
from prelora_ray.report import figures
from prelora_ray.report.page import _diagnosis, write_plan, write_report, write_switch_map
from prelora_ray.report.records import ReportedRun, differing_settings, read_runs, short_names
from prelora_ray.run_folder import RunFolder
from prelora_ray.summaries import table_summaries
from tests.lines import epoch_line, event, write_lines

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
    # training, validation, top-1 of the model and of its averaged weights, rate;
    # six families and the loss, and the six with their sign; a heatmap; five panels: a CPU has no memory by phase
    assert figures == {"learning": 5, "convergence": 13, "ranks": 1, "speed": 5}
    page = (tmp_path / "report.html").read_text()
    assert "4 to 6 px" in page and "<td>full, 4 px</td><td>1</td>" in page
    for fact in (
        "<td>finished</td>",
        ">2 workers, ",
        "parameters, images of 8 px",
        "switch after epoch 3, freeze after epoch 5",
    ):
        assert fact in page.split("<h2>Summary")[1].split("<h2>Diagnosis")[0]
    assert "peak memory " in page.split("<h2>By phase")[1] and "a process on a CPU hardly gives any back" in page
    assert re.search(r"switched after epoch 3 of 7, with 3\d\.\d% of the learning rate&#x27;s sum left", page)


@pytest.fixture
def two_runs(undisturbed, disturbed) -> list[str]:
    return [str(RunFolder.of(run)) for run in (undisturbed(2), disturbed.run)]


def test_runs_side_by_side_tell_what_differs(two_runs, tmp_path):
    differing = {"train.precision": ["fp32", "auto"], "workers.cpus": [0.5, 2.0], "checkpoint.every_steps": [None, 4]}
    assert differing_settings(read_runs(two_runs)) == differing
    names = write_report(two_runs, str(tmp_path / "report.html"))
    assert names.count("learning") == 1 and "ranks-plain-2-fp32" in names
    document = opened(tmp_path / "report.html")
    assert set(drawn(document)) == set(names)
    assert "<td>workers.cpus</td><td>0.5</td><td>2.0</td>" in document


def test_pictures_over_tau_and_zeta(tmp_path):
    """Marks of one place are one, and those outside the map are none."""
    content, out = {"switch": [[None, 9, 6], [9, 6, 6]]}, str(tmp_path / "map.html")
    write_switch_map([0.5, 1.0], [1.0, 2.0, 4.0], content, out)
    assert drawn(opened(tmp_path / "map.html")) == {"map-0": 1}
    marks = {"this run": (1.0, 2.0), "relaxed": (1.0, 5.0), "own": (1.0, 2.0), "medium": (0.5, 2.5), "strict": (0.25, 1.0)}
    write_switch_map([0.5, 1.0], [1.0, 2.0, 4.0], content, out, marks)
    document = opened(tmp_path / "map.html")
    assert drawn(document) == {"map-0": 3}
    assert "this run, own: tau 1, zeta 2" in document and "medium: tau 0.5" in document and "relaxed" not in document


def test_a_plan_is_drawn_beside_runs_that_never_switch(tmp_path):
    write_plan("vit", [2.0, 3.0, 4.0], {"full training": 3.5, "timm eager, full": 5.0}, 2, str(tmp_path / "plan.html"))
    assert drawn(opened(tmp_path / "plan.html")) == {"plan": 3}


def test_names_are_text_and_not_markup(undisturbed, tmp_path):
    source = Path(RunFolder.of(undisturbed(2)).path)
    shutil.copytree(source, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "ray"))
    found = event("diagnosis", signature="early_switch", value=1.0, limit=0.0, message="<script>alert(1)</script>")
    write_lines(RunFolder(tmp_path / "run"), "events.jsonl", to_json(found))
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


def test_two_runs_of_one_name_are_told_apart(two_runs, tmp_path, monkeypatch):
    for user, source in zip(("a", "b"), two_runs, strict=True):
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
    records = [records_of_an_epoch(name) for name in ("plain", MARKUP)]
    for figure in (figures.learning(records), figures.speed(records)):
        names = {trace.name.split(": ")[0] for trace in figure.data}
        assert names == {"plain", escape(MARKUP)}


def test_runs_in_folders_whose_names_are_markup(two_runs, tmp_path):
    """The name of a figure's place in the page is one of a run too."""
    folders = [tmp_path / name for name in ("plain", MARKUP.replace("/", "-"))]
    for source, folder in zip(two_runs, folders, strict=True):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints", "ray"))
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
        "cost": 1.0,
        "val_top1": 0.5,
        "diagnosis": [MARKUP],
    }
    control = {**entry, "setting": {"control": "rank 1"}}
    sweep = {"trials": 3, "settings": [entry], "controls": [control], "pareto": [MARKUP], "full": entry, "unit": MARKUP}
    sweep |= {"cost": 1.0, "naive_cost": 2.0, "measure": "val_top1"}
    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps(sweep))
    write_report([str(folder)], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert(1)" not in page and "<a href" not in page.split("<body>")[1]
    assert f"<p>3 runs stand for 1 setting, beside 1 control: 1 {escape(MARKUP)} with the trunk" in page
    texts = [text for trace in figures.pareto(sweep).data for text in trace.text]
    assert len(texts) == 4 and not any("<" in text for text in texts)


def test_a_sweep_begins_with_what_it_took_and_came_to(tmp_path):
    """By hand: 60 s of the trunk's and 20 s of the fork's own; a run that was stopped is not the best one."""
    row = {"trial": "trunk", "cost": 1.5, "val_top1": 0.75, "diagnosis": [], "trainable_fraction": None}
    trials = [("fork", "finished", 0.875), ("fork", "finished", 0.875), ("pruned", "stopped", 0.9), ("late", None, None)]
    settings = [
        {**row, "setting": {"method.tau": tau}, "trial": trial, "ended": ended, "val_top1": top1, "switch_epoch": 2}
        for tau, (trial, ended, top1) in enumerate(trials)
    ]
    sweep = {"trials": 3, "settings": settings, "controls": [], "pareto": [], "full": row, "unit": "GPU-hours"}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep | {"cost": 1.0, "naive_cost": 2.0}))

    def summary() -> list[str]:
        write_report([str(tmp_path)], str(tmp_path / "report.html"))
        return re.findall("<td>(.*?)</td>", (tmp_path / "report.html").read_text().partition("Accuracy and cost")[0])

    ends = ["state", "1 run finished, 1 run stopped, 1 run not run", "best result", "top-1 87.5% by fork, at 1.5 GPU-hours"]
    assert summary() == ends
    for name, attempts in (("trunk", [0] * 4), ("fork", [-1, -1, 0, 0])):
        run = RunFolder(tmp_path / name)
        run.write_settings(parse_settings({"name": name, "data": {"path": "data"}}))
        run.write_records(EpochLine, [epoch_line(epoch, attempt=a, parameters=5000) for epoch, a in enumerate(attempts)])
        run.write_records(Event, [event("stop", attempt=a, time=20.0 * epoch) for epoch, a in enumerate(attempts)])
    duration = "80 s for 6 epochs, of all runs together"
    model = "vit_small_patch16_224 of 5,000 parameters, images of 224 px"
    assert summary() == [*ends[:2], "duration", duration, "model", model, "hardware", "1 worker, CPU", *ends[2:]]


def records_of_an_epoch(name: str = "run", **records: Any) -> ReportedRun:
    """A run of one epoch, as small as its figures take it, in no folder."""
    run = ReportedRun(RunFolder("nowhere"), name)
    settings = parse_settings({"name": "run", "data": {"path": "data"}})
    small = {"settings": settings, "epochs": [epoch_line(0)], "windows": [], "events": [], "ranks": None}
    vars(run).update({**small, "state": Remarks("finished", True, ()), **records})
    return run


@pytest.mark.parametrize(
    ("state", "sections", "signatures", "told"),
    [
        (Remarks("finished", True, ()), {}, [], [("healthy", "none of the failure signatures shows")]),
        (Remarks("finished", True, ("no switch: why",)), {}, [], [("finding", "no switch: why")]),
        (Remarks("finished", True, ()), {}, ["early switch: so"], [("finding", "early switch: so")]),
        (
            Remarks("finished", True, ()),
            {"method": {"enabled": False}},
            [],
            [("open", "full training, as method.enabled is false; the failure signatures are of runs that switch")],
        ),
        (
            Remarks("finished", True, ()),
            {"data": {"path": "data", "max_batches": 4}},
            [],
            [("open", "a few batches an epoch, as data.max_batches is set; the failure signatures are of whole runs")],
        ),
        (
            Remarks("stopped after 3 of 9 epochs", False, ()),
            {},
            [],
            [("open", "stopped after 3 of 9 epochs; no failure signature so far")],
        ),
        (
            Remarks("unfinished after 3 of 9 epochs", False, ("hardly learned: low",), ("no switch so far: why",)),
            {},
            [],
            [
                ("open", "unfinished after 3 of 9 epochs"),
                ("open", "no switch so far: why"),
                ("finding", "hardly learned: low"),
            ],
        ),
    ],
)
def test_green_is_a_whole_run_alone_that_finished_and_shows_nothing(state, sections, signatures, told):
    events = [event("diagnosis", signature="early_switch", value=1.0, limit=0.0, message=text) for text in signatures]
    settings = parse_settings({"name": "run", "data": {"path": "data"}, **sections})
    page = _diagnosis(records_of_an_epoch(settings=settings, state=state, events=events))
    assert re.findall(r"<p class='(\w+)'><b>run</b>: (.*?)\.</p>", page) == told


def test_reports_may_share_what_draws_them(undisturbed, tmp_path):
    (tmp_path / "a b").mkdir()
    pages = [tmp_path / "one.html", tmp_path / "a b" / "two.html"]
    for page in pages:
        write_report([str(RunFolder.of(undisturbed(2)))], str(page), plotly=str(tmp_path / "its plotly.js"))
        assert page.stat().st_size < 300_000
        assert drawn(opened(page))["speed"] == 5


def test_on_a_phone_nothing_is_wider_than_the_screen_and_no_label_lies_over_another(undisturbed, tmp_path):
    """The run as it is, with marks that are close to each other, and a table that scrolls by itself."""
    source = Path(RunFolder.of(undisturbed(2)).path)
    shutil.copytree(source, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "ray"))
    marks = [event("restart", epoch, cause="failure", world_size=2) for epoch in (4, 4, 5)]
    marks.append(event("resize", 5, world_size=3, before=2))
    write_lines(RunFolder(tmp_path / "run"), "events.jsonl", *(to_json(mark) for mark in marks))
    write_report([str(tmp_path / "run")], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    measured = page.replace("<body>", "<body style='width: 360px; margin: 0; padding: 0'>").replace(
        "</body>", f"<script>{MEASURE}</script></body>"
    )
    (tmp_path / "report.html").write_text(measured)
    found = re.search(r'data-found="([^"]*)"', opened(tmp_path / "report.html"))
    assert found is not None
    assert json.loads(unescape(found[1])) == {"right": 360, "overlaps": []}


MEASURE = """
addEventListener("load", () => setTimeout(() => {
  const labels = [...document.querySelectorAll(".plot-container")].flatMap(plot => {
    const texts = [...plot.querySelectorAll("text")].filter(text => text.textContent.trim() && !text.closest(".modebar"));
    const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]).filter(([, box]) => box.width);
    return boxes.flatMap(([one, a], i) => boxes.slice(i + 1)
      .filter(([, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
                      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2)
      .map(([other]) => one + " / " + other));
  });
  const parts = [...document.querySelectorAll("h1, h2, p, .wide, .plot-container, .plot-container text")];
  const right = Math.max(...parts.map(part => part.getBoundingClientRect().right));
  document.documentElement.dataset.found = JSON.stringify({right: Math.round(right), overlaps: labels});
}, 3000));
"""
"""Has the document say how far it reaches to the right, and which texts of a figure lie over each other."""


def test_sizes_are_marked_where_they_are_on_record():
    """An earlier version recorded none, so that a run that it began has some from where it was resumed on."""
    sizes = [None, None, 160, 160, 224]
    run = records_of_an_epoch(epochs=[epoch_line(epoch, image_size=size) for epoch, size in enumerate(sizes)])
    assert run.size_changes() == [(4, 160, 224)]
    assert list(table_summaries(run.epochs)) == ["full, ? px", "full, 160 px", "full, 224 px"]


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        write_report([str(tmp_path)], str(tmp_path / "report.html"))
    assert not (tmp_path / "report.html").exists()
