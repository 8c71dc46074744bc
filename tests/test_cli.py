"""The command as a person runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from prelora_ray.cli import app
from prelora_ray.config import with_absolute_paths
from prelora_ray.config_file import load_settings
from prelora_ray.fault_tolerance.end import read_end
from prelora_ray.fault_tolerance.ray_private import keep_token_private
from prelora_ray.method.convergence import percent_change
from prelora_ray.records import Starting
from prelora_ray.run_folder import RunFolder
from tests.command import COMMAND, ROOT, prelora, prelora_here
from tests.runs import TINY_VIT


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A norms.jsonl of 12 epochs: norms that move by 8, 4, 2, 1, ... percent an epoch, loss by half of that."""
    norm, loss = [10.0, 20.0], 2.0
    path = tmp_path / "norms.jsonl"
    with path.open("w") as file:
        for epoch in range(12):
            phase = "full" if epoch < 10 else "lora"
            norms = dict(zip(("blocks.0.attn.query", "blocks.1.attn.query"), norm, strict=True))
            file.write(json.dumps({"attempt": 0, "epoch": epoch, "phase": phase, "loss": loss, "norms": norms}) + "\n")
            step = 0.08 / 2**epoch
            norm, loss = [norm[0] * (1 + step), norm[1] * (1 - 2 * step)], loss * (1 - step / 2)
    return path


def test_replay_of_a_record_as_json(record):
    # With windows of one epoch, step s changes the norms by 8 / 2^(s-1) and twice that percent: mean 12 / 2^(s-1).
    # tau 1 and k = 3 want 12 / 2^(s-1) < 1 at t - 1 and t: s = 5 (0.75) is the first, so t = 6, after 7 epochs.
    result = prelora_here(
        "replay", str(record), "--tau", "1", "--zeta", "5", "--windows", "3", "--window-epochs", "1", "--r-min", "4",
        "--r-max", "16", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["switch_window"] == 6
    assert content["switch_epoch"] == 7
    assert content["ranks"] == {"blocks.0.attn.query": 4, "blocks.1.attn.query": 16}
    assert percent_change(10, 10.8) == pytest.approx(8)


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "result.json"])
def test_a_damaged_file_of_a_run_is_told_before_anything_starts(tmp_path, name):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("data: {source: digits, batch_size: 96, cell: 12, path: data}\nmodel: {name: vit_tiny_patch16_224}\n")
    settings = with_absolute_paths(load_settings(recipe, storage=str(tmp_path)))
    folder = RunFolder.of(settings)
    folder.write_settings(settings)
    folder.write_bytes(name, b"\0\0\0")
    told = prelora_here("train", str(recipe), "--storage", str(tmp_path))
    assert told.returncode == 2
    assert told.stderr.startswith(f"prelora: {folder}/{name} is damaged (")
    assert told.stderr.count("\n") == 1


def test_models_are_told_with_what_they_have_and_lack():
    known = json.loads(prelora_here("models", "mixer_s3*", "--json").stdout)["models"]
    families = ["tokens_fc1", "tokens_fc2", "channels_fc1", "channels_fc2"]
    assert known == [{"name": "mixer_s32_224", "blocks": 8, "targets": families, "reason": None}]
    tagged = prelora_here("models", "vit_tiny_patch16_224.augreg_in21k").stdout  # as model.name takes it
    assert tagged == "vit_tiny_patch16_224.augreg_in21k: 12 blocks, method.targets query, key, value, proj, fc1, fc2\n"
    told = prelora_here("models", "vitamin_small_224").stdout
    assert told.startswith(
        "vitamin_small_224: model.name = 'vitamin_small_224' is not allowed: VisionTransformer has no blocks.0"
    )
    assert told.count("\n") == 1
    table = prelora_here("models").stdout
    assert all(
        name in table
        for name in ("Vision Transformer", "in stages", "MLP-Mixer", "tokens_fc1", "ConvNeXt", "conv_dw (no adapter)")
    )
    assert "fc1 (fc1)" not in table
    assert len(json.loads(prelora_here("models", "--json").stdout)["architectures"]) == 11
    wrong = prelora_here("models", "vit_tinny")
    assert wrong.returncode == 2
    assert wrong.stderr == "prelora: 'vit_tinny' is no model of timm: give a name, or a pattern such as 'swin*'\n"


def test_a_map_of_1024_pairs_fits_on_a_screen(record):
    arguments = ["replay", str(record), "--tau", "0.1:10:32", "--zeta", "0.5:30:32", "--window-epochs", "1"]
    told = prelora_here(*arguments)
    assert told.returncode == 0, told.stderr
    assert 5 < len(told.stdout.splitlines()) < 20
    pairs = re.findall(r"│ +([\d,]+) │ +(?:\d+|never) │", told.stdout)
    assert sum(int(number.replace(",", "")) for number in pairs) == 1024
    assert len(json.loads(prelora_here(*arguments, "--json").stdout)["settings"]) == 1024


@pytest.mark.parametrize("text", ["0.5,-1", "0.5,nan", "0:1:5", "2:1:5", "0.1:inf:3", "1e-300:1e300:3", "many"])
def test_thresholds_that_are_none_are_told(record, text):
    result = prelora_here("replay", str(record), "--tau", text)
    assert result.returncode == 2
    assert f"--tau {text} is not allowed: give a number of 0 or more" in result.stderr


@pytest.mark.parametrize(
    ("key", "value"), [("loss", None), ("norms", {}), ("norms", [1.0]), ("norms", {"blocks.0.attn.query": "1"})]
)
def test_a_record_that_holds_no_norms_is_told(record, key, value):
    first, *lines = map(json.loads, record.read_text().splitlines())
    record.write_text("".join(json.dumps(line) + "\n" for line in ({**first, key: value}, *lines)))
    result = prelora_here("replay", str(record))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "is no record of norms: epoch 0 lacks a loss, or norms by module name" in result.stderr


def test_an_address_of_ray_that_is_none_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    result = prelora("prepare", "digits", str(tmp_path / "out"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "RAY_ADDRESS = 'nowhere' is not allowed: Invalid address format" in result.stderr


def test_replay_reads_phase_full_only_and_says_why_there_is_no_switch(record):
    result = prelora_here("replay", str(record), "--tau", "0.01", "--window-epochs", "1", "--json")
    content = json.loads(result.stdout)
    assert (content["switch_window"], content["switch_epoch"], content["ranks"]) == (None, None, None)
    assert "10 epochs of phase full" in content["reason"]
    table = prelora_here("replay", str(record), "--tau", "1", "--zeta", "5", "--window-epochs", "1")
    assert "switch after epoch 7 (window 6)" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no.yaml"], "no.yaml is no file"),
        (
            ["train", "digitz"],
            "digitz is no file: give the path of a recipe, or the name of one of ours: bert_base, cifar10, ",
        ),
        (["train", "digits", "--dry-run", "--set", "method.r_max=128"], "method.r_max = 128 is not allowed: the model's"),
        (["train", "cifar10", "--dry-run", "--set", "data.path=/nowhere"], "/nowhere is no prepared folder"),
        (["predict", "/nowhere", "image.png"], "'/nowhere' is no trained model"),
        (["train", "jobs/configs/digits.yaml", "--set", "train.epoch=3"], "did you mean train.epochs"),
        (["train", "jobs/configs/cifar10.yaml", "--set", "data.path=/nowhere"], "/nowhere is no prepared folder"),
        (["train", "jobs/configs/digits.yaml", "--set", "method.r_max=128"], "method.r_max = 128 is not allowed: the model's"),
        (["train", "jobs/configs/digits.yaml", "--set", "model.name=vit_tinny"], "model.name = 'vit_tinny' is not allowed"),
        (
            ["train", "jobs/configs/digits.yaml", "--set", "name=2026-13-01"],
            "is not YAML: a value cannot be read (month must be",
        ),
        (["train", "jobs/configs/digits.yaml", "--set", "train.seed=!!int abc"], "is not YAML: a value cannot be read ("),
        (["train", "jobs/configs/digits.yaml", "--storage", "~nobody-here/x"], "'~nobody-here/x' is no path"),
        (["replay", "/nowhere"], "'/nowhere' is no record"),
        (["replay", "README.md"], "'README.md' is no record"),
        (["prepare", "/nowhere", "/tmp/out", "--val-fraction", "2"], "--val-fraction 2.0 is not allowed"),
    ],
)
def test_a_wrong_request_gets_one_sentence_and_status_2(arguments, message):
    result = prelora_here(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("prepare digits FILE", "'FILE' is not allowed: it is a file, where a folder must be"),
        ("prepare digits FILE/x", "'FILE/x' is not allowed: 'FILE' is a file, where a folder must be"),
        ("export FOLDER FILE", "'FILE' is not allowed: it is a file, where a folder must be"),
        ("export FOLDER FILE/x", "'FILE/x' is not allowed: 'FILE' is a file, where a folder must be"),
        ("train digits --storage FILE --name x", "'FILE/x' is not allowed: 'FILE' is a file, where a folder must be"),
        ("train digits --set data.path=FILE", "'FILE' is not allowed: it is a file, where a folder must be"),
        ("init FOLDER --data digits", "FOLDER is there already: give a new file"),
        ("init FILE/x/y.yaml --data digits", "'FILE/x' is not allowed: 'FILE' is a file, where a folder must be"),
        ("report FOLDER --out FOLDER", "--out FOLDER is not allowed: it is a folder; give a file"),
        ("report FOLDER --out FILE/r.html", "--out FILE/r.html is not allowed: FILE is no folder"),
        ("report FOLDER --plotly FOLDER/x/p.js", "--plotly FOLDER/x/p.js is not allowed: FOLDER/x is no folder"),
        ("report FOLDER --png FILE", "'FILE' is not allowed: it is a file, where a folder must be"),
        ("report FOLDER --png s3://b/pictures", "'s3://b/pictures' is not allowed: it must be on a disk"),
        ("report FOLDER --out s3://b/r.html", "'s3://b/r.html' is not allowed: it must be on a disk"),
        ("init s3://b/r.yaml --data digits", "'s3://b/r.yaml' is not allowed: it must be on a disk"),
        ("replay FOLDER --picture FOLDER", "--picture FOLDER is not allowed: it is a folder; give a file"),
        ("plan digits --picture FOLDER", "--picture FOLDER is not allowed: it is a folder; give a file"),
        ("bench rehearsal --out FOLDER", "--out FOLDER is not allowed: it is a folder; give a file"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(tmp_path, arguments, told):
    (tmp_path / "a file").write_text("")

    def here(text: str) -> str:
        return text.replace("FOLDER", str(tmp_path)).replace("FILE", f"{tmp_path}/a file")

    result = prelora_here(*map(here, arguments.split()))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"prelora: {here(told)}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_an_error_of_the_program_itself_comes_out_with_its_traceback(tmp_path):
    """Though it is a ValueError, as a user's mistake is: here a number that a command fails to read."""
    (tmp_path / "broken.py").write_text(
        "import sys\n"
        "from prelora_ray import cli, doctor\n"
        "doctor.examine = lambda *_: int('seven')\n"
        "sys.argv = ['prelora', 'doctor', 'somewhere']\n"
        "cli.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "broken.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("ValueError: invalid literal for int() with base 10: 'seven'\n")


@pytest.mark.slow
def test_no_room_for_the_workers_is_told_once_ray_has_started(tmp_path, monkeypatch):
    """And the token that Ray has made by then is its owner's alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    result = prelora("train", "jobs/configs/digits.yaml", "--name", "big", "--set", "workers.cpus=500")
    assert (result.returncode, result.stdout) == (2, "")
    *_, last = result.stderr.strip().splitlines()
    assert last.startswith("prelora: workers.min = 2 is not allowed on this machine: 2 workers of 500 CPU need 1000")
    assert stat.S_IMODE((tmp_path / ".ray").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_a_token_that_is_open_to_all_is_closed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_token_private()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    keep_token_private()
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_nothing_is_imported_from_the_current_folder(tmp_path):
    for library in ("rich", "timm", "torch", "typer", "yaml"):
        (tmp_path / f"{library}.py").write_text("raise ImportError('the current folder was looked in')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*COMMAND, "replay", "here"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert "'here' is no record" in result.stderr


@pytest.mark.parametrize("words", [(), ("bench",)])
def test_help_names_every_command(words):
    """With what it does."""
    group = typer.main.get_command(app)
    for word in words:
        group = group.commands[word]
    result = prelora_here(*words, "--help")
    assert result.returncode == 0
    assert re.findall(r"^  (\w+) +[A-Z]\w+ ", result.stdout, re.MULTILINE) == list(group.commands)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("pre", ["prepare", "predict"]),
        ("train im", ["imagenet_vit_large", "imagenet_vit_large_paper", "imagenet_vit_small"]),
        ("train jobs/", []),  # no recipe's name: the shell completes files
        ("train digits --dry", ["--dry-run"]),
    ],
)
def test_a_shell_completes_commands_recipes_and_options(monkeypatch, words, completed):
    monkeypatch.setenv("_PRELORA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"prelora {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    assert prelora_here().stdout.split() == completed


def tiny_run(tmp_path: Path) -> list[str]:
    """A run of the digits' recipe made small, which switches after epoch 3 and freezes after epoch 5 of 9."""
    changes = {
        "data.path": tmp_path / "data",
        "model.options": json.dumps(TINY_VIT),
        "train.epochs": 9,
        "train.ramp_epochs": 1,
        "method.tau": 1000,
        "method.zeta": 1000,
        "method.window_epochs": 1,
        "method.warmup_epochs": 2,
        "method.r_max": 8,
        "workers.min": 1,
        "workers.max": 1,
    }
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    return ["train", "jobs/configs/digits.yaml", "--storage", str(tmp_path), "--name", "run", "--json", *sets]


def interrupt(tmp_path: Path, signum: int, *more: str) -> tuple[int, str, str, list[str]]:
    """Sends a signal to the driver's process group, as a terminal and `timeout` do, once two epochs are done; returns
    exit status, standard output and error, and the steps of its start."""
    command = [*COMMAND, *tiny_run(tmp_path), *more]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, cwd=ROOT, start_new_session=True, **streams)
    epochs, folder, steps = tmp_path / "run" / "epochs.jsonl", RunFolder(tmp_path / "run"), [""]
    while not (epochs.exists() and len(epochs.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.communicate()
        if isinstance(place := folder.read_place(), Starting) and place.doing != steps[-1]:
            steps.append(place.doing)
        time.sleep(0.02)
    os.killpg(process.pid, signum)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr, steps[1:]


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path):
    status, stdout, stderr, steps = interrupt(tmp_path, signal.SIGINT)
    assert status == 130, stderr
    assert stdout == ""
    assert "the same command goes on from the last checkpoint" in stderr
    assert "Traceback" not in stderr
    order = ["start Ray", "prepare the images", "place the workers", "build the model", "read the first images"]
    assert steps == [step for step in [*order, "take a first step"] if step in steps]  # the quickest may be missed
    assert {*order[:3], "take a first step"} <= set(steps)
    told = [line for line in stderr.splitlines() if line.startswith("starting: ")]
    assert told[0] == "starting: start Ray" and "starting: place the workers" in told
    assert not (tmp_path / "run" / "starting.json").exists()


@pytest.mark.slow
def test_sigterm_for_its_whole_process_group_leaves_ray_to_it(tmp_path):
    """As `timeout` sends it."""
    status, stdout, stderr, _ = interrupt(tmp_path, signal.SIGTERM, "--set", "train.epochs=99")
    assert (status, stdout) == (130, "")
    *_, last = stderr.splitlines()
    assert last.startswith("prelora: stopped; the same command goes on from epoch ")
    end = read_end(RunFolder(tmp_path / "run"))
    assert end is not None and end.end == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_any_way_the_same_command_goes_on(tmp_path, signum):
    interrupt(tmp_path, signum)
    result = prelora(*tiny_run(tmp_path))
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert (content["epochs"], content["switch_epoch"], content["freeze_epoch"], content["restarts"]) == (9, 3, 5, 1)
    assert content["path"] == str(tmp_path / "run")
    replayed = prelora("replay", content["path"], "--json")
    assert json.loads(replayed.stdout)["ranks"] == json.loads((tmp_path / "run" / "ranks.json").read_text())
