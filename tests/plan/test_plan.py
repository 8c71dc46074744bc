"""`prelora plan`, as a user calls it, over bench files made for the test and over one that was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from prelora_ray.config_file import load_settings
from prelora_ray.method.phases import Phase
from prelora_ray.plan.cost import Workload
from prelora_ray.plan.source import read_source
from prelora_ray.records import EpochLine, Event
from prelora_ray.run_folder import RunFolder
from tests.command import ROOT, prelora_here
from tests.lines import epoch_line, event

H100 = "benchmarks/results/2026-11-26-phases-h100.json"
VIT_L = "jobs/configs/imagenet_vit_large_paper.yaml"
VIT_L_FLOPS = 123.1e9
"""Of one image's forward at 224 pixels: docs/performance.md."""


def bench_file(path: Path, rates: dict[str, float], **changes: Any) -> str:
    """What `prelora bench phases --out` writes of ViT-L at 224, or as `changes` say, with these images/s by row."""
    options = {"model": "vit_large_patch16_224", "image_size": 224, "batch": 256, "residual": "fp32", "drop_path": 0.0}
    options |= {key: changes.pop(key) for key in list(changes) if key in options}
    numbers = {"peak_gib": 40.0, "trainable_share": 1.0, "gradient_bytes": 1_217_306_528} | changes
    rows = []
    for name, rate in rates.items():
        passes = 2 if name.endswith("lora") else 3
        rows.append({"name": name, "images_per_second": rate, "mfu": passes * VIT_L_FLOPS * rate / 8e14, **numbers})
    content = {"benchmark": "phases", "device": "NVIDIA T1000", "memory_gib": 79.18, "matrix_flops": 8e14}
    path.write_text(json.dumps({**content, "options": options, "rows": rows}))
    return str(path)


@pytest.fixture
def bench(tmp_path: Path) -> str:
    """Full at 100, warmup at 80, lora at 200, timm at 50 images/s."""
    rates = {"timm eager full": 50.0, "prelora bf16 full": 100.0, "prelora bf16 warmup": 80.0, "prelora bf16 lora": 200.0}
    return bench_file(tmp_path / "bench.json", rates)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """12 epochs, switched after 4 with a warmup of 2."""
    content = {
        "data": {"path": str(tmp_path / "none"), "batch_size": 240, "cell": 12},
        "model": {"name": "vit_large_patch16_224"},
        "train": {"epochs": 12},
        "method": {"switch_epoch": 4, "warmup_epochs": 2, "window_epochs": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def planned(*arguments: str) -> dict[str, Any]:
    result = prelora_here("plan", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    result = prelora_here("plan", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("prelora: ") and result.stderr.count("\n") == 1
    return result.stderr.removeprefix("prelora: ").rstrip()


def test_hours_by_hand(recipe, bench):
    # 3600 images: an epoch of full takes 36 s or 0.01 h, of warmup 45 s, of lora 18 s, of timm 72 s, on any GPUs.
    plan = planned(recipe, "--bench", bench, "--gpus", "2", "--images", "3600")
    runs = {run["name"]: run for run in plan["runs"]}
    assert list(runs) == ["full training", "switch after 3", "switch after 4, as here", "switch after 6", "switch after 9",
                          "timm eager, full"]  # fmt: skip
    own = runs["switch after 4, as here"]
    assert own["epochs"] == {"full": 4, "warmup": 2, "lora": 6}
    assert own["gpu_hours"] == pytest.approx({"full": 0.04, "warmup": 0.025, "lora": 0.03})
    assert own["total_gpu_hours"] == pytest.approx(0.095)
    assert own["hours"] == pytest.approx({"full": 0.02, "warmup": 0.0125, "lora": 0.015})
    assert own["total_hours"] == pytest.approx(0.0475)
    assert own["of_full"] == pytest.approx(0.095 / 0.12)
    assert own["of_timm"] == pytest.approx(0.095 / 0.24)
    assert own["full_epochs"] == pytest.approx(9.5)  # the control: 9.5 epochs of 0.01 h
    assert runs["timm eager, full"]["total_gpu_hours"] == pytest.approx(0.24)
    # After 11 epochs 0.11 + 0.0125; after 10 0.125; after 9 0.09 + 0.025 + 0.005 = 0.12, as full; after 8 0.115.
    assert plan["gpu_hours_by_switch"][7:] == pytest.approx([0.115, 0.12, 0.125, 0.1225])
    # 3601 images take a batch more, and so 16/15 of the time. With a warmup of 1 a switch after 10 epochs costs 0.1 +
    # 0.0125 + 0.005 for 3600, less than the 0.12 of full, and after 11 0.11 + 0.0125, more.
    more = planned(recipe, "--bench", bench, "--gpus", "2", "--images", "3601", "--set", "method.warmup_epochs=1")
    assert more["break_even_epoch"] == 10
    assert more["runs"][0]["total_gpu_hours"] == pytest.approx(0.12 * 16 / 15)
    assert more["phases"][0]["images_per_second"] == pytest.approx(100 * 3601 / 3840)
    for run in plan["runs"]:
        assert sum(run["gpu_hours"].values()) == pytest.approx(run["total_gpu_hours"])
        assert sum(run["epochs"].values()) == 12


def test_the_exchange_is_waited_for(recipe, bench):
    arguments = (recipe, "--bench", bench, "--gpus", "2", "--images", "2400")
    hidden, counted = planned(*arguments), planned(*arguments, "--bandwidth", "1")
    full = counted["phases"][0]
    # 120 images at 100/s compute 1.2 s. A ring of two sends each byte once: 1,217,306,528 at 0.125e9 a second take
    # 9.738 s, of which the backward hides 0.684 but for the first MiB's share of it.
    assert hidden["phases"][0]["step_ms"] == pytest.approx(1200)
    assert full["exchanged_bytes"] == 1_217_306_528
    assert full["waiting_ms"] == pytest.approx(9738 - 684, rel=1e-3)
    assert full["step_ms"] == pytest.approx(1200 + full["waiting_ms"])
    assert full["images_per_second"] == pytest.approx(120 / full["step_ms"] * 1e3)
    assert counted["runs"][0]["total_gpu_hours"] == pytest.approx(2 * 12 * 10 * full["step_ms"] / 3.6e6)
    assert any("--bandwidth" in note for note in hidden["notes"])
    assert planned(*arguments[:-4], "--gpus", "1", "--images", "2400")["phases"][0]["exchanged_bytes"] == 0


def test_what_the_measured_file_says_of_the_papers_run():
    """By docs/performance.md's table: 906 images/s of timm, 1,157, 1,139 and 1,320 of ours; MB that rows exchange."""
    plan = planned(VIT_L, "--bench", H100, "--set", "method.switch_epoch=225")
    (own,) = [run for run in plan["runs"] if run["switch_epoch"] == 225]
    assert own["of_timm"] == pytest.approx((225 / 1157 + 10 / 1139 + 65 / 1320) / (300 / 906), rel=1e-3)
    assert own["total_gpu_hours"] == pytest.approx(313 * 4096 * (225 / 1157 + 10 / 1139 + 65 / 1320) / 3600, rel=1e-3)
    full, warmup, lora = plan["phases"]
    assert full["exchanged_bytes"] == 1_217_306_528
    assert warmup["exchanged_bytes"] == pytest.approx(1_273_896_864, rel=0.01)
    assert lora["exchanged_bytes"] == pytest.approx(65_052_576, rel=0.1)  # of ranks 8 to 64 with mean 32, and not 30
    assert [step["source"] for step in plan["phases"]] == ["measured"] * 3
    assert "the recipe's own test" not in " ".join(plan["notes"])


@pytest.mark.parametrize("image_size", [192, 160, 128])
def test_other_image_sizes_are_estimated_and_it_says_so(image_size):
    """Against one H200, compiled blocks with a bf16 stream, 256 images: docs/performance.md."""
    (row,) = json.loads((ROOT / f"benchmarks/results/2026-11-27-size-{image_size}-h200.json").read_text())["rows"]
    arguments = ("--set", "method.enabled=false", "--set", f"model.image_size={image_size}", "--set", "train.micro_batch=256")
    bench = "benchmarks/results/2026-11-27-timm-h200.json"
    (full,) = planned(VIT_L, "--bench", bench, "--gpus", "16", *arguments)["phases"]
    assert full["source"].startswith("estimated from vit_large_patch16_224 at 224")
    assert full["images_per_second"] == pytest.approx(row["images_per_second"], rel=0.08)
    assert full["memory_gib"] == pytest.approx(row["peak_gib"], rel=0.02)


def test_a_measured_run_was_as_fast_as_planned():
    """ViT-L on one H100, through all phases: the fastest epoch of each, as one of warmup was held up (docs/plan.md)."""
    run = json.loads((ROOT / "benchmarks/results/2026-11-28-plan-of-a-run-h100.json").read_text())
    fastest: dict[tuple[str, int], float] = {}
    for line in run["run_epochs"]:
        kind = line["phase"], line["image_size"]
        fastest[kind] = max(line["images_per_second"], fastest.get(kind, 0))
    changes = [
        *("train.epochs=12", "train.ramp_epochs=1", "train.resolution=[{until: 3, image_size: 160}]", "train.precision=fp8"),
        *("method.switch_epoch=6", "method.warmup_epochs=3", "data.batch_size=256", "train.micro_batch=256"),
        *("workers.min=1", "workers.max=1"),
    ]
    plan = planned(VIT_L, "--gpu", "H100", "--images", "9984", *(part for change in changes for part in ("--set", change)))
    found = {(step["phase"], step["image_size"]): step["images_per_second"] for step in plan["phases"]}
    assert len(found) == 4
    assert found == pytest.approx(fastest, rel=0.05)


def test_a_run_on_few_batches_has_few_images(recipe, bench):
    assert planned(recipe, "--bench", bench, "--set", "data.max_batches=2")["images"] == 480


def test_the_nearest_row_is_taken(tmp_path, recipe):
    rates = {"prelora bf16 full": 100.0}
    files = [
        bench_file(tmp_path / "wide.json", rates, residual="bf16"),
        bench_file(tmp_path / "other.json", {"prelora bf16 full": 70.0}, model="vit_base_patch16_224"),
        bench_file(tmp_path / "same.json", {"prelora bf16 full": 90.0}),
    ]
    arguments = (
        recipe,
        "--images",
        "2400",
        "--set",
        "method.enabled=false",
        *(part for path in files for part in ("--bench", path)),
    )
    (step,) = planned(*arguments)["phases"]
    assert (step["images_per_second"], step["source"]) == (pytest.approx(90), "measured")
    (step,) = planned(*arguments[:7])["phases"]
    assert (step["images_per_second"], step["source"]) == (pytest.approx(100), "measured with train.residual: bf16")


def test_subsets_count_only_where_every_phase_was_measured_with_them(tmp_path, recipe, bench):
    """Else a phase that was would be too fast beside one that was not, and a switch would look as if it cost time."""
    subsets = {f"prelora bf16 uniform subset {phase}": rate for phase, rate in (("full", 160.0), ("lora", 280.0))}
    drop_path = "model={name: vit_large_patch16_224, drop_path: 0.4, drop_path_rule: uniform}"

    def speeds(rows: dict[str, float]) -> tuple[list[float], str]:
        file = bench_file(tmp_path / "subsets.json", rows, drop_path=0.4)
        plan = planned(recipe, "--bench", bench, "--bench", file, "--images", "3600", "--set", drop_path)
        return [step["images_per_second"] for step in plan["phases"]], " ".join(plan["notes"])

    told, notes = speeds(subsets | {"prelora bf16 uniform subset warmup": 120.0})
    assert told == pytest.approx([160, 120, 280])
    assert "spares" not in notes
    told, notes = speeds(subsets)
    assert told == pytest.approx([100, 80, 200])
    assert "is not counted in any phase: no file has it at this model.drop_path for warmup in bf16" in notes


def test_timm_exchanges_float32_whatever_the_recipe_does(recipe, bench):
    arguments = (recipe, "--bench", bench, "--gpus", "2", "--images", "2400", "--bandwidth", "1")
    fp32, bf16 = (planned(*arguments, "--set", f"train.gradient_exchange={each}")["runs"] for each in ("fp32", "bf16"))
    assert bf16[0]["total_gpu_hours"] < 0.6 * fp32[0]["total_gpu_hours"]
    assert bf16[-1]["name"] == "timm eager, full"
    assert bf16[-1]["total_gpu_hours"] == fp32[-1]["total_gpu_hours"]


def test_the_micro_batch_that_a_run_found(tmp_path, recipe):
    """docs/performance.md: ViT-L on 79.18 GiB, 444 images a step: 228 took 43.7 GiB, 444 left a snapshot no room."""
    bench = bench_file(tmp_path / "bench.json", {"prelora bf16 full": 100.0}, peak_gib=43.7, batch=228)
    arguments = (recipe, "--bench", bench, "--images", "4440", "--set", "method.enabled=false", "--set", "data.batch_size=444")
    (auto,) = planned(*arguments, "--set", "train.micro_batch=auto")["phases"]
    assert (auto["micro_batch"], auto["fits"]) == (228, True)
    assert auto["memory_gib"] == pytest.approx(43.7)
    (whole,) = planned(*arguments)["phases"]
    assert (whole["micro_batch"], whole["largest_micro_batch"], whole["fits"]) == (444, 228, False)
    told = prelora_here("plan", *arguments).stdout
    assert "no, 228 do" in told
    (unknown,) = planned(*arguments, "--assume-speed", "0.5")["phases"]
    assert unknown["fits"] is None and unknown["images_per_second"] == pytest.approx(50)


def test_a_model_that_no_gpu_holds_is_refused_with_its_bytes(recipe):
    """ViT-22B's width and depth, by hand: 12 d**2 + 13 d a block; patches, token, positions, norm and head."""
    width, classes = 6144, 1000
    blocks, patches, head = 48 * (12 * width**2 + 13 * width), 14 * 14 * 3 + 1, classes * (width + 1)
    parameters = blocks + (patches + 1 + 257 + 2) * width + head
    options = f"model.options={{embed_dim: {width}, depth: 48, num_heads: 48, mlp_ratio: 4}}"
    told = refused(recipe, "--images", "3600", "--set", "model.name=vit_giant_patch14_224", "--set", options)
    assert "vit_giant_patch14_224 does not fit on a GPU of 79 GiB: with 12 images at once (data.cell) phase full" in told
    assert f" {16 * parameters / 2**30:.1f} GiB of it for the weights, gradients and moments of {parameters:,} " in told
    assert f" and {12 * parameters / 2**30:.1f} GiB for a checkpoint's snapshot" in told


def test_the_smallest_gpu_that_does(tmp_path, recipe):
    """Of ViT-L measured with 43.7 GiB: weights, gradients, moments, a snapshot, and a cell's share of the rest."""
    bench = bench_file(tmp_path / "bench.json", {"prelora bf16 full": 100.0}, peak_gib=43.7, batch=240)
    (full,) = planned(recipe, "--bench", bench, "--images", "4800", "--set", "method.enabled=false")["phases"]
    parameters = 1_217_306_528 / 4
    activations = 43.7 * 2**30 - 16 * parameters
    assert full["least_gib"] == pytest.approx((28 * parameters + activations * 12 / 240) / 0.96 / 2**30)


def test_epochs_on_smaller_images_have_a_speed_of_their_own(tmp_path, recipe, bench):
    """By hand: an epoch of full takes 0.005 h at 160 pixels and 0.01 h at 224; timm has all at 224."""
    small = bench_file(tmp_path / "small.json", {"prelora bf16 full": 200.0, "prelora bf16 warmup": 160.0}, image_size=160)
    steps = "train.resolution=[{until: 2, image_size: 160}]"
    plan = planned(recipe, "--bench", bench, "--bench", small, "--images", "3600", "--set", steps)
    kinds = [(step["phase"], step["image_size"], step["images_per_second"]) for step in plan["phases"]]
    assert kinds == [("full", 160, 200), ("full", 224, 100), ("warmup", 224, 80), ("lora", 224, 200)]
    hours = {run["name"]: run["total_gpu_hours"] for run in plan["runs"]}
    assert hours["full training"] == pytest.approx(2 * 0.005 + 10 * 0.01)
    assert hours["switch after 4, as here"] == pytest.approx(2 * 0.005 + 2 * 0.01 + 2 * 0.0125 + 6 * 0.005)
    assert hours["timm eager, full"] == pytest.approx(12 * 0.02)


def write_run(folder: RunFolder, recipe: str, *, gpu: bool = True) -> None:
    """Records of a run on 2 GPUs that switched after 3 epochs, at 96 % of `bench`'s speed but for its first epoch."""
    folder.make()
    folder.write_settings(load_settings(recipe, [f"workers.gpu={gpu}"]))
    phases = ["full"] * 3 + ["warmup"] * 2 + ["lora"]
    rates = [20, 192, 192, 50, 153.6, 384]
    lines = [
        epoch_line(epoch, phase=phase, images_per_second=rate, images=3600, world_size=2)
        for epoch, (phase, rate) in enumerate(zip(phases, rates, strict=True))
    ]
    folder.write_records(EpochLine, lines)
    switch = event("switch", epoch=3, switch_epoch=3, trainable_parameters=1, parameters=1)
    folder.write_records(Event, [switch])
    folder.write_json("data.json", {"classes": ["a", "b"]})
    folder.write_json("ranks.json", {f"blocks.{i}.attn.query": 8 for i in range(24)})


def test_a_run_is_compared_with_its_plan(tmp_path, recipe, bench):
    folder = RunFolder(tmp_path / "run")
    write_run(folder, recipe)
    plan = planned(str(folder), "--bench", bench)
    assert (plan["gpus"], plan["images"]) == (2, 3600)
    assert next(run["name"] for run in plan["runs"] if run["switch_epoch"]) == "switch after 3, as here"
    full, warmup, lora = plan["phases"]
    assert full["measured_images_per_second"] == 96
    assert warmup["measured_images_per_second"] == pytest.approx(153.6 / 2)
    assert lora["measured_images_per_second"] == 192
    assert warmup["trainable_parameters"] - full["trainable_parameters"] == 24 * 8 * 2 * 1024
    assert "+4.2%" in prelora_here("plan", str(folder), "--bench", bench).stdout  # 100 / 96


def test_a_runs_speed_stands_beside_its_own_kind_of_step_alone(tmp_path, recipe, bench):
    """It ran in bf16, its first two epochs on images of 160 pixels."""
    folder = RunFolder(tmp_path / "run")
    write_run(folder, recipe)
    small = [replace(line, image_size=160) if line.epoch < 2 else line for line in folder.epochs()]
    folder.write_records(EpochLine, small)

    def speeds(*overrides: str) -> dict[Workload, float]:
        return read_source(str(folder), overrides, None).measured

    own = {
        Workload(Phase.FULL, 160, "bf16"): 96,
        Workload(Phase.FULL, 224, "bf16"): 96,
        Workload(Phase.WARMUP, 224, "bf16"): pytest.approx(153.6 / 2),
        Workload(Phase.LORA, 224, "bf16"): 192,
    }
    assert speeds() == own
    assert speeds("train.precision=fp8", "train.fp8_from=full", "train.resolution=[]", "train.epochs=20") == own


@pytest.mark.parametrize(
    ("gpu", "override", "why"),
    [
        (False, "train.epochs=20", "it had no GPU"),
        (True, "train.residual=bf16", "it had train.residual = 'fp32'"),
        (True, "model.options={depth: 12}", "it had model.options.depth = None"),
    ],
)
def test_a_run_of_other_steps_is_not_compared_and_it_says_so(tmp_path, recipe, gpu, override, why):
    folder = RunFolder(tmp_path / "run")
    write_run(folder, recipe, gpu=gpu)
    source = read_source(str(folder), [override], None)
    assert source.measured == {}
    assert source.notes == (f"the run's own speed is not shown: {why}",)


def test_a_run_of_an_earlier_version_in_a_bucket_can_be_planned(bucket, recipe):
    """One whose settings had `method.rank_floor`."""
    folder = RunFolder(f"{bucket}/plan/run")
    write_run(folder, recipe)
    settings = yaml.safe_load(folder.read_bytes("config.yaml"))
    settings["method"] |= {"rank_floor": 8, "rank_floor_percent": 0.5}
    folder.write_bytes("config.yaml", yaml.safe_dump(settings).encode())
    source = read_source(str(folder), ["train.epochs=20"], None)
    assert (source.settings.train.epochs, source.gpus, source.switch_epoch) == (20, 2, 3)
    assert source.settings.method.rank_floor_percent == 0


def test_classes_are_those_of_the_prepared_images(tmp_path, recipe):
    shard = {"file": "x.parquet", "row_groups": [70], "num_bytes": 1, "sha256": ""}
    content = {"schema": 2, "classes": ["a", "b"], "splits": {"train": [shard], "val": []}, "bad": 0, "settings": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    prepared = [f"data.path={tmp_path}"]
    for given, images in ((None, 70), (9, 9)):
        source = read_source(recipe, prepared, given)
        assert (source.images, source.num_classes) == (images, 2)
        assert not any("assumed" in note for note in source.notes)
    told = read_source(recipe, ["model.num_classes=7"], 9)
    assert (told.num_classes, any("assumed" in note for note in told.notes)) == (7, False)
    assumed = read_source(recipe, (), 9)
    assert (assumed.images, assumed.num_classes) == (9, 1000)
    assert any(note.endswith("none is not prepared here: ImageNet-1k's 1,000 classes are assumed") for note in assumed.notes)


def test_what_cannot_be_planned_is_told(tmp_path, recipe, bench):
    own = (recipe, "--bench", bench)
    assert refused(recipe, "--gpu", "b300").startswith(
        "--gpu b300 is not allowed: measured is NVIDIA H100 80GB HBM3 and NVIDIA H200; give --bench"
    )
    for option in ("--bandwidth", "--memory", "--assume-speed"):
        assert refused(*own, option, "0") == f"{option} 0 is not allowed: it must be a number above 0"
    assert refused(*own, "--gpus", "21").startswith("--gpus 21 is not allowed: a batch of 240 has 20 cells of 12")
    assert "(data.cell) phase full needs one of 10.0 GiB, 4.5 GiB of it for the" in refused(*own, "--memory", "8")
    assert "model.name = 'vit_huge' is not allowed" in refused(*own, "--set", "model.name=vit_huge")
    assert "Twins has no blocks.0.attn.qkv as a Vision Transformer has it" in refused(
        *own, "--set", "model.name=twins_svt_small"
    )
    assert "rank 2048 of 'blocks.8.attn.query' is not allowed" in refused(*own, "--set", "method.r_max=2048")
    assert "with a row `prelora fp8 lora`" in refused(*own, "--set", "train.precision=fp8")
    assert "method.enabled is false" in refused(*own, "--set", "method.enabled=false", "--picture", str(tmp_path / "x.html"))
    assert refused("nowhere.yaml").startswith("nowhere.yaml is no file")
    assert "of several kinds" in refused(*own, "--bench", H100)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Invalid JSON"),
        ("[]", "it must be a mapping"),
        ('{"benchmark": "data"}', "benchmark must be 'phases'"),
        ({"matrix_flops": 0}, "matrix_flops must be greater than 0"),
        ({"rows": [{"name": "prelora bf16 full"}]}, "rows.0.images_per_second must be given"),
        ({"rows": [{"name": "prelora bf16 all"}]}, "rows.0.name"),
    ],
)
def test_a_bench_file_of_another_form_is_told(tmp_path, recipe, bench, content, told):
    path = tmp_path / "wrong.json"
    whole = json.loads(Path(bench).read_text())
    path.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    sentence = refused(recipe, "--bench", str(path))
    assert sentence.startswith(f"--bench {path} is not what `prelora bench phases --out FILE` writes (")
    assert told in sentence
    assert refused(recipe, "--bench", str(tmp_path)).startswith(f"--bench {tmp_path} cannot be read")


def test_no_ray_and_every_shipped_file_can_be_read():
    code = (
        "import sys; from prelora_ray.cli import main\n"
        f"sys.argv = ['prelora', 'plan', {VIT_L!r}]\n"
        "try: main()\n"
        "finally: print('ray' if 'ray' in sys.modules else 'no ray')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "no ray"
    assert "switch after 150" in result.stdout and "break-even: " in result.stdout
    assert "NVIDIA H100 80GB HBM3" in result.stdout
    fp8 = ("--set", "train.precision=fp8", "--set", "train.fp8_from=full")
    assert "NVIDIA H200" in prelora_here("plan", VIT_L, "--gpu", "h200", *fp8).stdout
    assert "ImageNet-1k's 1,281,167 images of 1,000 classes are assumed" in result.stdout
