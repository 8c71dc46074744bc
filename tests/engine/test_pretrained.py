"""Starting from a timm checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from prelora_ray.config import ModelSettings
from prelora_ray.engine.model import create_model
from prelora_ray.engine.pretrained import load_pretrained, read_pretrained
from tests.runs import TINY_VIT

SETTINGS = ModelSettings(name="vit_tiny_patch16_224", image_size=8, options=TINY_VIT)


def load(model: torch.nn.Module, path: Path) -> list[str]:
    return load_pretrained(model, read_pretrained(str(path)), str(path))


def timm_model(num_classes=10, **options) -> torch.nn.Module:
    torch.manual_seed(11)
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **{"img_size": 8, **TINY_VIT, **options}).eval()


@pytest.fixture
def model() -> torch.nn.Module:
    return create_model(SETTINGS, num_classes=10, seed=0).eval()


def test_the_same_model_computes_the_same(model, tmp_path):
    other = timm_model()
    safetensors.torch.save_file(other.state_dict(), tmp_path / "w.safetensors")
    assert load(model, tmp_path / "w.safetensors") == []
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(model(images), other(images))


def test_torchs_own_format_with_averaged_weights_and_prefixes(model, tmp_path):
    other = timm_model()
    averaged = {f"module.{name}": tensor for name, tensor in other.state_dict().items()}
    torch.save({"state_dict": timm_model().state_dict(), "state_dict_ema": averaged, "epoch": 3}, tmp_path / "w.pth")
    assert load(model, tmp_path / "w.pth") == []
    assert torch.equal(model.head.weight, other.head.weight)


def test_another_head_is_replaced_and_said_so(model, tmp_path):
    drawn = model.head.weight.clone()
    other = timm_model(num_classes=7)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "w.safetensors")
    (told,) = load(model, tmp_path / "w.safetensors")
    assert "head has 7 classes and this run 10" in told
    assert torch.equal(model.head.weight, drawn)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, other.blocks[2].mlp.fc1.weight)


def test_both_heads_of_a_distilled_model_are_replaced(tmp_path):
    settings = SETTINGS.model_copy(update={"name": "deit_tiny_distilled_patch16_224"})
    model = create_model(settings, num_classes=10, seed=0)
    drawn = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = timm.create_model(settings.name, img_size=8, num_classes=7, **TINY_VIT)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "w.safetensors")
    (told,) = load(model, tmp_path / "w.safetensors")
    assert "head has 7 classes and this run 10" in told
    for name in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"):
        assert torch.equal(model.state_dict()[name], drawn[name])
    assert torch.equal(model.dist_token, other.dist_token)


def test_position_embeddings_of_another_size_are_resampled_as_timm_does(model, tmp_path):
    other = timm_model(img_size=16)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "w.safetensors")
    load(model, tmp_path / "w.safetensors")
    expected = timm_model()
    timm.models.load_checkpoint(
        expected, str(tmp_path / "w.safetensors"), filter_fn=timm.models.vision_transformer.checkpoint_filter_fn
    )
    assert torch.equal(model.pos_embed, expected.pos_embed)


@pytest.mark.parametrize(("theirs", "ours", "how"), [(3, 1, "summed"), (1, 3, "spread")])
def test_patches_of_rgb_become_those_of_grey_and_back(tmp_path, theirs, ours, how):
    """A grey image means the same to both; timm's own loading agrees."""
    other = timm_model(in_chans=theirs)
    data_config = {"input_size": (theirs, 8, 8)}
    timm.models.save_for_hf(other, str(tmp_path), safe_serialization=True, data_config=data_config)
    options = {**TINY_VIT, "in_chans": ours}
    model = create_model(SETTINGS.model_copy(update={"options": options}), num_classes=10, seed=0).eval()
    (told,) = load(model, tmp_path / "model.safetensors")
    have = "1 channel" if theirs == 1 else f"{theirs} channels"
    assert f"its images have {have} and this run's {ours}: patch_embed.proj.weight is {how}" in told
    grey = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model(grey.expand(-1, ours, 8, 8)), other(grey.expand(-1, theirs, 8, 8)))
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=ours)
    assert torch.equal(model.patch_embed.proj.weight, timms.patch_embed.proj.weight)


def test_missing_and_unexpected_tensors_are_told(model, tmp_path):
    tensors = dict(timm_model().state_dict())
    del tensors["blocks.1.norm1.weight"]
    tensors["decoder.weight"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    missing, unexpected = load(model, tmp_path / "w.safetensors")
    assert "1 tensor of the model not in it, begun anew: blocks.1.norm1.weight" in missing
    assert "1 tensor in it not the model's, left out: decoder.weight" in unexpected


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is no file"),
        (b"not a checkpoint", "cannot be read as a timm checkpoint"),
        ({"a": 1}, "holds other things than tensors"),
        ({"a": torch.zeros(2)}, "it has none of its tensors"),
        ({"patch_embed.proj.weight": torch.zeros(16, 4, 2, 2)}, r"is \(16, 4, 2, 2\) there and \(16, 3, 2, 2\) here"),
        ({"blocks.0.mlp.fc1.bias": torch.zeros(5)}, r"blocks.0.mlp.fc1.bias is \(5,\) there and \(64,\) here"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(model, tmp_path, content, sentence):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=sentence) as error:
        load(model, path)
    assert f"model.init_from = {str(path)!r}" in str(error.value)
