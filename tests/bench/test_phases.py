"""`prelora bench phases` on a CPU: what its figures stand for, against counts by hand."""

import json

import pytest

from prelora_ray.bench.own import RANKS
from tests.command import prelora_here

WIDTH, DEPTH, TOKENS, CLASSES = 192, 12, 17, 1000


@pytest.fixture(scope="module")
def result() -> dict:
    size = ("--model", "vit_tiny_patch16_224", "--image-size", "64", "--batch", "4", "--steps", "1")
    done = prelora_here("bench", "phases", *size, "--row", "timm", "--row", "prelora bf16 lora", "--json")
    assert done.returncode == 0, done.stderr
    assert "not measured: timm compiled full (needs a GPU)" in done.stderr
    return json.loads(done.stdout)


def test_rows_are_the_wanted_ones(result):
    assert [row["name"] for row in result["rows"]] == ["timm eager full", "timm + PEFT eager lora", "prelora bf16 lora"]
    assert result["failed"] is None
    for row in result["rows"]:
        assert row["images_per_second"] == pytest.approx(4 / row["milliseconds"] * 1e3)


def test_mfu_counts_the_models_operations(result):
    """A forward's products, by hand: four of the block's linear layers, attention's two, patches and head."""
    block = TOKENS * WIDTH * WIDTH * 12 + 2 * TOKENS * TOKENS * WIDTH
    forward = 2 * (DEPTH * block + 16 * 768 * WIDTH + WIDTH * CLASSES)
    full, _, lora = result["rows"]
    for row, passes in ((full, 3), (lora, 2)):
        rate = passes * forward * row["images_per_second"]
        assert row["mfu"] == pytest.approx(rate / result["matrix_flops"], rel=0.01)


def test_lora_exchanges_what_trains(result):
    """Adapters of the dealt ranks, and what is not adapted: norms, embeddings, head."""
    assert sum(RANKS) / len(RANKS) == 32
    lora = result["rows"][2]
    sides = {"query": 2, "key": 2, "value": 2, "proj": 2, "fc1": 5, "fc2": 5}  # (in + out) / width
    mean = 32 * WIDTH * sum(sides.values()) * DEPTH
    others = DEPTH * 4 * WIDTH + 2 * WIDTH + (768 + 1) * WIDTH + WIDTH + TOKENS * WIDTH + (WIDTH + 1) * CLASSES
    assert lora["gradient_bytes"] == pytest.approx(4 * (mean + others), rel=0.15)  # families do not share evenly
    assert lora["gradient_bytes"] < 0.5 * result["rows"][0]["gradient_bytes"]


@pytest.mark.slow
def test_a_model_without_a_size_of_images_is_measured():
    size = ("--model", "convnext_tiny", "--image-size", "32", "--batch", "2", "--steps", "1")
    done = prelora_here("bench", "phases", *size, "--row", "timm eager", "--row", "prelora bf16 lora", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout)["rows"]] == ["timm eager full", "prelora bf16 lora"]
