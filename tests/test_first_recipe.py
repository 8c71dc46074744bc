"""What `prelora init` chooses for images, and that a recipe of its can be planned and trained."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from prelora_ray.config import Settings
from prelora_ray.config_file import load_settings, parse_settings, parse_yaml
from prelora_ray.engine.check import check_model
from prelora_ray.first_recipe import Images, compose, write_recipe
from prelora_ray.plan.planner import Options, plan_recipe
from prelora_ray.plan.sizes import parameters_by_phase
from prelora_ray.train.no_effect import without_effect
from prelora_ray.train.smoke import smoke_run
from tests.command import prelora_here


def usable(recipe: Path) -> Settings:
    """The settings of a recipe that has a plan and a smoke run."""
    settings = load_settings(recipe)
    for run in (settings, smoke_run(str(recipe), [])):
        assert without_effect(run) == []
    assert plan_recipe(str(recipe), [], Options()).runs
    return settings


def test_digits_before_they_are_prepared(tmp_path):
    told = prelora_here("init", str(tmp_path / "new" / "mine.yaml"), "--data", "digits")
    assert told.returncode == 0, told.stderr
    settings = usable(tmp_path / "new" / "mine.yaml")
    check_model(settings)  # it goes through every phase
    assert (settings.name, settings.data.source, settings.data.path) == ("mine", "digits", "data/mine")
    assert (settings.model.image_size, settings.model.options["patch_size"], settings.data.crop_ratio) == (8, 2, 1)
    values = load_digits().images / 16  # of which 4 in 5 train
    assert settings.data.mean == pytest.approx([values.mean()] * 3, abs=0.003)
    assert settings.data.std == pytest.approx([values.std()] * 3, abs=0.003)
    assert "# Data:      1,438 training images of 10 classes; shorter sides in pixels: 8" in told.stdout


def test_photographs_in_folders(tmp_path):
    """Mean and standard deviation are of what the model takes of them, here by Pillow alone."""
    rng, taken = np.random.default_rng(0), []
    for i in range(10):
        width, height = (300, 240) if i % 2 else (260, 400)
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8) // np.array([1, 2, 4], np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        for split in ("train", "val"):
            folder = tmp_path / "photos" / split / "ab"[i // 5]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{split}{i}.jpg", quality=95 if split == "train" else 50)
        side = min(width, height) * 0.875
        box = (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
        taken.append(np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box)) / 255)
    write_recipe(str(tmp_path / "photos.yaml"), str(tmp_path / "photos"))
    settings = usable(tmp_path / "photos.yaml")
    assert (settings.model.image_size, settings.data.crop_ratio, settings.augment.crop) == (224, 0.875, "random_resized")
    assert settings.data.mean == pytest.approx(np.mean(taken, axis=(0, 1, 2)), abs=0.01)
    assert settings.data.std == pytest.approx(np.std(taken, axis=(0, 1, 2)), abs=0.01)


def test_storage_that_fails_is_no_bad_image(tmp_path):
    """Linux fails to read a process's first bytes of memory as a disk does. What could be read is some images alone."""
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):  # one of which is to validate with
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "b" / "unread.png").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        write_recipe(str(tmp_path / "photos.yaml"), str(tmp_path / "photos"))
    assert not (tmp_path / "photos.yaml").exists()


@pytest.mark.parametrize(
    ("num", "side", "model", "size", "patch"),
    [
        (40_000, 28, "vit_small_patch16_224", 28, 4),
        (39_999, 32, "vit_tiny_patch16_224", 32, 4),
        (100_000, 64, "vit_small_patch16_224", 64, 8),
        (1_281_167, 256, "vit_small_patch16_224", 224, 16),
        (14_000_000, 170, "vit_base_patch16_224", 160, 16),
        (40, 3, "vit_tiny_patch16_224", 4, 2),
    ],
)
def test_a_model_for_the_number_and_the_size_of_the_images(num, side, model, size, patch):
    content = io.BytesIO()
    Image.new("RGB", (side, side + 5), (255, 0, 51)).save(content, "PNG")
    text = compose("some.yaml", "data/some", None, Images(num, 10, [content.getvalue()] * 3))
    settings = parse_settings({"name": "some", **parse_yaml(text)})
    assert parameters_by_phase(settings.model, settings.method, 10, None)  # ranks fit the model
    assert (settings.model.name, settings.model.image_size) == (model, size)
    assert settings.model.options.get("patch_size", 16) == patch
    assert settings.data.mean == (1.0, 0.0, 0.2)
    assert f"batch_size: {settings.data.batch_size}  # {-(-num // settings.data.batch_size):,} an epoch" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_a_prepared_folder(digits: Path, tmp_path):
    told = prelora_here("init", str(tmp_path / "mine.yaml"), "--data", str(digits), "--json")
    recipe = json.loads(told.stdout)["recipe"]
    assert (recipe["data"]["path"], recipe["data"].get("source")) == (str(digits), None)
    assert recipe["data"]["mean"] == pytest.approx([load_digits().images.mean() / 16] * 3, abs=0.003)


def test_mistakes_are_told_in_a_sentence(tmp_path):
    (tmp_path / "there.yaml").write_text("")
    for file, data, message in [
        ("there.yaml", "digits", "there.yaml is there already: give a new file"),
        ("my recipe.yaml", "digits", "name = 'my recipe' is not allowed"),
        ("new.yaml", "/nowhere", "'/nowhere' is no source"),
    ]:
        told = prelora_here("init", str(tmp_path / file), "--data", data)
        assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)
        assert message in told.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
