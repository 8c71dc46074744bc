"""What is exported from each phase, loaded by timm, PEFT and onnxruntime alone; evaluation and prediction of it all."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from prelora_ray import evaluate, export, load
from prelora_ray.config_file import parse_settings
from prelora_ray.data.damage import DamagedDataError
from prelora_ray.data.manifest import read_manifest
from prelora_ray.engine.state import TrainState
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.inference.export import ExportError
from prelora_ray.inference.load import load_run_model
from prelora_ray.method.adapters import merged_state_dict
from prelora_ray.method.phases import Phase
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import InitFrom
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage
from prelora_ray.train.run import train
from tests.command import ROOT, prelora_here
from tests.data.test_damage import overwrite
from tests.runs import EPOCHS, FREEZE, SWITCH, TINY_VIT, settings

CHANNELS = {"full": 3, "warmup": 1, "lora": 3}
"""Of the images that the run of each phase takes; 1 is their grey value."""


def make_run(folder: Path, digits: Path, phase: str) -> Path:
    """A run that stands in `phase`, with adapters that do something."""
    options = {**TINY_VIT, "in_chans": CHANNELS[phase]}
    settings = parse_settings(
        {
            "name": phase,
            "storage": str(folder),
            "data": {"path": str(digits), "batch_size": 96, "cell": 12, "mean": [0.3], "std": [0.4], "crop_ratio": 1},
            "model": {"name": "vit_tiny_patch16_224", "image_size": 8, "options": options},
            "train": {"ema": None if phase == "full" else 0.9},
            "method": {"r_min": 2, "r_max": 8},
        }
    )
    manifest = read_manifest(Storage(str(digits)))
    state = TrainState(settings, 10, 1, torch.device("cpu"), 1)
    if phase != "full":
        names = [target.name for target in state.targets if target.layer != 1]
        ranks = {name: (2, 4, 8)[i % 3] for i, name in enumerate(names)}
        state.enter(Phase(phase), ranks)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            if "lora_B" in name or name.startswith("head"):
                parameter.normal_(std=0.2)
    if state.ema is not None:
        state.ema.update()
    state.epoch = 3
    run = RunFolder.of(settings)
    run.make()
    run.write_settings(settings)
    run.write_json("data.json", {"classes": list(manifest.classes), "fingerprint": manifest.fingerprint})
    Checkpoints(run).save(state.snapshot([], holds_base=False))
    return folder / phase


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {phase: make_run(folder, digits, phase) for phase in CHANNELS}


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for phase, run in runs.items():
        export(str(run), str(folder / phase))
    return {phase: folder / phase for phase in CHANNELS}


@pytest.fixture(scope="module")
def validation(digits) -> tuple[torch.Tensor, torch.Tensor]:
    """All validation images as normalised grey values, and their labels, from scikit-learn's own arrays."""
    shards = read_manifest(Storage(str(digits))).splits["val"]
    rows = [int(row["source"]) for shard in shards for row in pq.read_table(digits / shard.file).to_pylist()]
    content = load_digits()
    pixels = torch.from_numpy((content.images[rows] * 255 / 16).round()).float()
    return ((pixels / 255 - 0.3) / 0.4)[:, None], torch.from_numpy(content.target[rows])


@pytest.mark.parametrize("phase", CHANNELS)
@torch.no_grad()
def test_timm_peft_and_onnxruntime_compute_what_the_run_does(runs, exports, validation, phase):
    images = validation[0].repeat(1, CHANNELS[phase], 1, 1)
    expected = load_run_model(str(runs[phase])).module(images)
    out = exports[phase]
    forms = {
        "hugging face folder": timm.create_model(f"local-dir:{out}/timm", pretrained=True).eval()(images),
        "checkpoint": timm.create_model(
            "vit_tiny_patch16_224",
            num_classes=10,
            img_size=8,
            checkpoint_path=str(out / "timm/model.safetensors"),
            **{**TINY_VIT, "in_chans": CHANNELS[phase]},
        ).eval()(images),
        "onnx": torch.from_numpy(
            onnxruntime.InferenceSession(str(out / "onnx/model.onnx")).run(["logits"], {"pixels": images.numpy()})[0]
        ),
    }
    if phase != "full":
        base = timm.create_model(f"local-dir:{out}/adapter/base", pretrained=True).eval()
        assert (base(images) - expected).abs().max() > 1e-2, "the adapters do something"
        forms["peft"] = PeftModel.from_pretrained(base, str(out / "adapter")).eval()(images)
    else:
        assert not (out / "adapter").exists()
    for form, logits in forms.items():
        assert (logits - expected).abs().max() <= 1e-4, form


@torch.no_grad()
def test_averaged_weights_are_exported_on_request(runs, validation, tmp_path):
    """As a plain model of a tenth of what the adapters do, as one step takes them in."""
    assert export(str(runs["lora"]), str(tmp_path / "out"), ema=True).forms == ("onnx", "timm")
    exported = timm.create_model(f"local-dir:{tmp_path}/out/timm", pretrained=True).eval()
    run = TrainState(RunFolder(runs["lora"]).read_settings(), 10, 1, torch.device("cpu"), 1)  # as it began
    begin, merged = run.model.state_dict(), merged_state_dict(load_run_model(str(runs["lora"])).module)
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(tensor, 0.9 * begin[name] + 0.1 * merged[name], rtol=0, atol=1e-6)
    assert "a moving average over the steps, with decay 0.9" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UserError, match=r"full' has no averaged weights: its run was trained without train\.ema"):
        export(str(runs["full"]), str(tmp_path / "none"), ema=True)


@pytest.mark.parametrize("phase", ["warmup", "lora"])
def test_the_configuration_is_that_of_the_run(exports, phase):
    config, channels = json.loads((exports[phase] / "timm/config.json").read_text()), CHANNELS[phase]
    assert config["label_names"] == [str(digit) for digit in range(10)]
    assert config["pretrained_cfg"]["mean"] == [0.3] * channels
    assert config["pretrained_cfg"]["input_size"] == [channels, 8, 8]
    assert f"images (n, {channels}, 8, 8) as `pixels`" in (exports[phase] / "README.md").read_text()
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config({}, model=timm.create_model(f"local-dir:{exports[phase]}/timm", pretrained=False))
    )
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, channels), np.uint8).squeeze()
    expected = (torch.from_numpy(pixels).view(8, 8, channels).permute(2, 0, 1) / 255 - 0.3) / 0.4
    torch.testing.assert_close(transform(Image.fromarray(pixels)), expected, atol=1e-5, rtol=0)


def snippets(page: Path) -> list[str]:
    """The code of a card."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


QUICK = {("lora", "adapter")}
"""The card that stands for all in `make test`: each takes processes that import all anew."""


@pytest.mark.parametrize(
    ("phase", "folder"),
    [
        pytest.param(phase, folder, marks=[] if (phase, folder) in QUICK else pytest.mark.slow)
        for phase in CHANNELS
        for folder in (".", "timm", "adapter", "onnx")
    ],
)
def test_the_code_of_every_card_runs_as_it_stands(runs, exports, phase, folder, tmp_path):
    """In a process of its own, on an image that is not square; what it says of it is what the run's own model does."""
    out = shutil.copytree(exports[phase], tmp_path / "out") / folder
    if not out.exists():
        assert (phase, folder) == ("full", "adapter")
        return
    pixels = np.random.default_rng(3).integers(0, 256, (8, 12, 3), np.uint8)
    Image.fromarray(pixels).save(out / "image.png")
    grey = Image.open(out / "image.png").convert("RGB" if CHANNELS[phase] == 3 else "L")
    values = torch.from_numpy(np.array(grey.resize((8, 8), Image.Resampling.BICUBIC, (2, 0, 10, 8)))).view(8, 8, -1)
    codes = snippets(out / "README.md")
    assert len(codes) == (1 if folder != "." else 2 + (phase != "full"))
    with torch.no_grad():
        logits = load_run_model(str(runs[phase])).module((values.permute(2, 0, 1)[None] / 255 - 0.3) / 0.4)
    shares = logits[0].softmax(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for code in codes:
        command = [sys.executable, "-c", code]
        told = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        name, share = told.stdout.split()
        assert float(share) == pytest.approx(shares[int(name)].item(), abs=2e-3)
        assert shares[int(name)] >= shares.max() - 2e-3


def test_the_cards_say_what_the_model_is(exports):
    for folder in (".", "timm", "adapter", "onnx"):
        card = (exports["lora"] / folder / "README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["library_name"] == {"adapter": "peft", "onnx": "onnxruntime"}.get(folder, "timm")
        assert "| checkpoint | `00003-000000`, after 3 of 300 epochs |" in card
        assert "`vit_tiny_patch16_224` for 10 classes" in card
        assert "| values | in 0..1, less mean 0.3, over standard deviation 0.4 |" in card
        assert (folder == ".") != ("differ from the run's own model by at most" in card)


def test_everybody_may_read_what_everybody_may_list(exports):
    """As the files that the process makes itself: safetensors makes its own readable to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in exports["lora"].rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "adapter_model.safetensors", "model.onnx", "README.md"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


@pytest.mark.parametrize(("form", "library", "extra"), [("onnx", "onnxscript", "onnx"), ("adapter", "peft", "peft")])
def test_an_export_leaves_out_a_form_whose_library_is_missing(runs, tmp_path, monkeypatch, form, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    told = prelora_here("export", str(runs["lora"]), str(tmp_path / "out"), "--json")
    sentence = f"{form} is left out, as it needs {library}: pip install 'prelora-ray[{extra}]'"
    assert [line for line in told.stderr.splitlines() if "left out" in line] == [sentence]
    forms = {"timm", "adapter", "onnx"}
    assert told.returncode == 0
    assert {name for name in forms if json.loads(told.stdout)[name] is not None} == forms - {form}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*forms - {form}, "README.md"}
    assert f"## {form}" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("phase", "form"),
    [
        ("lora", "run"),
        pytest.param("warmup", "export", marks=pytest.mark.slow),
        *(pytest.param("lora", form, marks=pytest.mark.slow) for form in ("timm", "adapter", "onnx")),
        pytest.param("warmup", "checkpoint", marks=pytest.mark.slow),
    ],
)
def test_evaluation_against_scikit_learns_own_arrays(runs, exports, digits, validation, phase, form):
    images, labels = validation
    run, out = runs[phase], exports[phase]
    source = {"run": run, "checkpoint": run / "checkpoints/00003-000000", "export": out}.get(form, out / form)
    report = evaluate(str(source), None if form in ("run", "checkpoint") else str(digits))
    with torch.no_grad():
        logits = load_run_model(str(run)).module(images.repeat(1, CHANNELS[phase], 1, 1))
    best = logits.argsort(1, descending=True)
    assert report.evaluation.images == len(labels)
    assert report.evaluation.top1 == pytest.approx((best[:, 0] == labels).double().mean().item())
    assert report.evaluation.top5 == pytest.approx((best[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert report.evaluation.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for label, guess in zip(labels, best[:, 0], strict=True):
        confusion[label, guess] += 1
    assert torch.equal(report.confusion, confusion)
    assert report.class_top1[3] == pytest.approx(confusion[3, 3].item() / (labels == 3).sum().item())


@pytest.mark.parametrize(
    ("start", "source"), [(".", "checkpoints/{}"), ("checkpoints", "{}"), ("checkpoints/{}", "."), (".", ".")]
)
def test_a_run_is_found_from_inside_it(runs, monkeypatch, start, source):
    (name,) = Checkpoints(RunFolder(runs["lora"])).names()
    monkeypatch.chdir(runs["lora"] / start.format(name))
    assert load_run_model(source.format(name)).checkpoint == name


def test_a_form_that_differs_fails_and_leaves_nothing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "prelora_ray.inference.export.merged_state_dict", lambda model: load_run_model(str(runs["full"])).module.state_dict()
    )
    with pytest.raises(ExportError, match=r"the (onnx|timm) form differs from the run's model by"):
        export(str(runs["lora"]), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told_in_a_sentence(runs, exports, digits, tmp_path):
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        export(str(runs["lora"]), str(exports["lora"]))
    with pytest.raises(ValueError, match=r"is no run folder: it has no config\.yaml"):
        export(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="is no trained model: give a run folder"):
        evaluate(str(tmp_path))
    with pytest.raises(ValueError, match="does not know its data: name a prepared folder"):
        evaluate(str(exports["lora"]))
    with pytest.raises(ValueError, match="is no prepared folder"):
        evaluate(str(runs["lora"]), str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is no exported model"):
        evaluate(str(tmp_path), str(digits))


def test_a_checkpoint_that_is_not_of_its_folder_is_told(runs, tmp_path):
    run = shutil.copytree(runs["full"], tmp_path / "run")
    content = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**content, "classes": content["classes"][:9]}))
    with pytest.raises(UserError, match=r"run: config\.yaml or data\.json does not fit checkpoint .*: .*head\.weight"):
        load_run_model(str(run))


def test_other_classes_are_refused(runs, digits, tmp_path):
    other = shutil.copytree(digits, tmp_path / "other")
    content = json.loads((other / "manifest.json").read_text())
    content["classes"][4] = "four"
    (other / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"class 4 is 'four' in .* was trained with '4'"):
        evaluate(str(runs["lora"]), str(other))


def test_an_image_that_does_not_decode_is_named(runs, digits, tmp_path):
    data = shutil.copytree(digits, tmp_path / "data")
    source = overwrite(data / "val-00000.parquet", 7)
    for work in (lambda: evaluate(str(runs["full"]), str(data)), lambda: export(str(runs["full"]), "out", str(data))):
        with pytest.raises(DamagedDataError) as error:
            work()
        assert str(error.value).startswith(f"{data}/val-00000.parquet, row 7 ({source}): the stored image cannot be decoded: ")


@pytest.mark.parametrize("form", ["run", "timm", "adapter", "onnx"])
def test_predictions_against_timm_on_scikit_learns_own_arrays(runs, exports, tmp_path, form):
    """Of files and of Pillow's images alike; more of them than go through the model at once."""
    pixels = (load_digits().images[:70] * 255 / 16).round().astype(np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(70)]
    for path, digit in zip(paths, pixels, strict=True):
        Image.fromarray(digit).save(path)
    inputs = ((torch.from_numpy(pixels).float() / 255 - 0.3) / 0.4)[:, None].repeat(1, CHANNELS["lora"], 1, 1)
    model = timm.create_model(f"local-dir:{exports['lora']}/timm", pretrained=True).eval()
    with torch.no_grad():
        shares, best = model(inputs).softmax(1).sort(1, descending=True)
    trained = load(runs["lora"] if form == "run" else exports["lora"] / form)
    predictions = trained.predict(paths, top=10)
    assert [prediction.labels for prediction in predictions] == [tuple(map(str, row)) for row in best.tolist()]
    torch.testing.assert_close(torch.tensor([p.probabilities for p in predictions]), shares, atol=1e-4, rtol=0)
    assert trained.predict([Image.open(path) for path in paths], top=10) == predictions
    first = trained.predict(str(paths[0]))
    assert first.label == str(best[0, 0].item())
    assert first.probability == pytest.approx(shares[0, 0].item(), abs=1e-4)
    assert first.labels == predictions[0].labels[:5]


def test_predict_as_a_command(exports, tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / name)
    expected = load(exports["lora"]).predict(tmp_path / "a.png", top=3)
    command = ["predict", str(exports["lora"]), str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--top", "3"]
    first, second = json.loads(prelora_here(*command, "--json").stdout)["predictions"]
    assert (first["image"], second["image"]) == tuple(command[2:4])
    assert first["labels"] == second["labels"] == list(expected.labels)
    assert first["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    table = prelora_here(*command).stdout
    assert re.findall(r"│ (\d) +│ +([\d.]+%) │", table)[:3] == [
        (label, f"{share:.1%}") for label, share in zip(expected.labels, expected.probabilities, strict=True)
    ]
    wrong = prelora_here(*command[:2], str(exports["lora"] / "README.md"))
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)


def test_a_photograph_is_turned_and_cropped_as_it_is_for_evaluation(exports, tmp_path):
    """Here by Pillow alone, whose decoder differs a little."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 4, 3), np.uint8)).resize((400, 600), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "photo.jpg"))
    assert upright.size == (600, 400)
    values = np.asarray(upright.resize((8, 8), Image.Resampling.BICUBIC, (100, 0, 500, 400)), np.float32)
    model = timm.create_model(f"local-dir:{exports['lora']}/timm", pretrained=True).eval()
    with torch.no_grad():
        shares = model(((torch.from_numpy(values) / 255 - 0.3) / 0.4).permute(2, 0, 1)[None])[0].softmax(0)
    trained = load(exports["lora"])
    for prediction in (trained.predict(tmp_path / "photo.jpg", 10), trained.predict(Image.open(tmp_path / "photo.jpg"), 10)):
        told = [share for _, share in sorted(zip(prediction.labels, prediction.probabilities, strict=True))]
        assert told == pytest.approx(shares.tolist(), abs=0.01)


def test_what_is_no_image_is_told_in_a_sentence(exports, tmp_path):
    trained = load(exports["full"])
    (tmp_path / "notes.txt").write_text("no image")
    for images, message in [
        (tmp_path / "no.png", r"no\.png' cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        ([tmp_path / "notes.txt"], r"notes\.txt' is no image that can be read: it is no image of a kind that can be read"),
        (np.zeros((1, 8, 8)), "images = ndarray is not allowed: it must be a file, an image of Pillow's, or a list"),
    ]:
        with pytest.raises(UserError, match=message):
            trained.predict(images)
    with pytest.raises(UserError, match="top = 0 is not allowed"):
        trained.predict([], top=0)


@pytest.mark.slow
def test_a_run_on_grey_values_by_two_workers_that_begins_with_another_run(runs, digits, tmp_path):
    """With one of RGB images, whose patches become those of grey ones, in phase lora."""
    model = {"options": {**TINY_VIT, "in_chans": 1}, "init_from": str(runs["lora"])}
    run = settings(digits, tmp_path, "grey", 2, model=model, data={"mean": [0.3]})
    result = train(run)
    (told,) = RunRecords(RunFolder.of(run)).events_of(InitFrom)
    assert "its images have 3 channels and this run's 1: patch_embed.proj.weight is summed" in told.message
    assert (result["switch_epoch"], result["freeze_epoch"], result["epochs"]) == (SWITCH, FREEZE, EPOCHS)
    done = export(str(tmp_path / "grey"), str(tmp_path / "out"))
    assert done.forms == ("adapter", "onnx", "timm")
    for source in (tmp_path / "grey", tmp_path / "out"):
        assert evaluate(str(source), str(digits)).evaluation.top1 == pytest.approx(result["val_top1"])
