"""What is found before Ray starts, of what a run will do to its model."""

from __future__ import annotations

import logging

import pytest

from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.engine.check import check_model
from prelora_ray.torchvision_ops import make_importable
from tests.runs import TINY_VIT

make_importable()

from timm.layers import Attention  # noqa: E402


def run(options: dict | None = None, **sections: dict) -> Settings:
    content: dict[str, dict] = {
        "data": {"path": "x"},
        "model": {
            "name": "vit_tiny_patch16_224",
            "image_size": 8,
            "options": {**TINY_VIT, **(options or {})},
            "drop_path": 0.2,
        },
        "method": {"r_min": 2, "r_max": 8},
        "workers": {"max": 2},
    }
    for section, keys in sections.items():
        content[section] = content.get(section, {}) | keys
    return parse_settings({"name": "run", **content})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "freeze"),
    [
        ("deit_tiny_distilled_patch16_224", 224, "all_but_head"),
        ("deit3_small_patch16_224", 224, "adapted"),
        ("vit_base_patch16_siglip_224", 224, "prefix"),
        ("vit_small_patch14_reg4_dinov2", 224, "all_but_head"),
        ("vit_small_patch16_dinov3", 256, "prefix"),
        ("vit_tiny_r_s16_p8_224", 224, "adapted"),
        ("cait_xxs24_224", 224, "prefix"),
    ],
)
def test_any_timm_vit_is_accepted(name, size, freeze):
    model = {"name": name, "image_size": size, "options": {}}
    targets = check_model(run(model=model, method={"freeze": freeze}, train={"residual": "bf16"}))
    assert len(targets) % 6 == 0


SMALLER = {"resolution": [{"until": 0.25, "image_size": 4}, {"until": 0.5, "image_size": 6}]}


@pytest.mark.parametrize("train", [SMALLER, {**SMALLER, "precision": "fp64"}])
def test_images_that_grow_are_accepted(train):
    assert len(check_model(run(train=train))) == 18


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg"},
        {"global_pool": "map"},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 3},
        {"in_chans": 1},
        {"fc_norm": True},
        {"init_values": 1e-5, "qk_norm": True},
    ],
)
@pytest.mark.parametrize("train", [{}, {"precision": "fp64", "adapters": "plain"}])
def test_any_option_that_leaves_logits_is_accepted(options, train):
    assert len(check_model(run(options, train=train, method={"freeze": "all_but_head"}))) == 18


@pytest.mark.parametrize("rule", ["linear", "uniform"])
@pytest.mark.parametrize("rate", [0.2, 0.8])
def test_subsets_are_tried_too(rule, rate):
    keys = {"drop_path": rate, "drop_path_rule": rule, "drop_path_form": "subset"}
    assert len(check_model(run({"init_values": 1e-5}, model=keys, train={"residual": "bf16"}))) == 18


ENCODER = {"name": "qwen3_vit_88m_enc", "image_size": 384, "options": {}}
TWICE = {"name": "cait_xxs24_224", "options": {**TINY_VIT, "depth_token_only": 1}}  # its branches share a drop path
WINDOWS = {"name": "samvit_base_patch16", "image_size": 256, "options": {}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "resnet18"}}, "timm says TypeError"),
        ({"model": {"name": "vit_tinny"}}, "model.name = 'vit_tinny' is not allowed"),
        (
            {"model": {"name": "beit_base_patch16_224", "image_size": 224, "options": {}}},
            r"uses blocks\.0\.attn\.qkv by its weight alone, .*; leave query, key, value out of method\.targets$",
        ),
        (
            {"method": {"targets": ["fc1", "fc3"]}},
            "'vit_tiny_patch16_224' is not allowed: .* no target 'fc3': its targets are query",
        ),
        ({"options": {"proj_drop_rate": 0.1}}, "turn on dropout in blocks.0.attn.proj_drop"),
        ({"options": {"depht": 3}}, "depht"),
        ({"method": {"r_max": 64}}, "method.r_max = 64 is not allowed: the model's smallest weight has rank 16 at most"),
        ({"method": {"rank_pattern": {"fc3": 8}}}, "'fc3' matches no target module"),
        ({"method": {"rank_pattern": {".*": 32}}}, "rank 32 of 'blocks.0.attn.query' is not allowed"),
        ({"options": {"global_pool": ""}}, r"'global_pool': ''}: of 2 images .* 10 classes, and makes \(2, 17, 10\)"),
        (
            {"model": ENCODER},
            r"'qwen3_vit_88m_enc' is not allowed .* \(2, 10\) logits for 10 classes, and makes \(2, 144, 1024\)",
        ),
        (
            {"train": {"resolution": [{"until": 2, "image_size": 5}]}},
            r"^train\.resolution\.image_size = 5 is not allowed with model\.name = 'vit_tiny_patch16_224': .* divisible",
        ),
        (
            {"model": {"name": "cait_xxs24_224", "image_size": 32, "options": {}}, "train": SMALLER},
            r"^train\.resolution is not allowed with model\.name = 'cait_xxs24_224', which timm makes for images of one size",
        ),
        (
            {"model": {**TWICE, "drop_path_form": "subset"}},
            r"model\.drop_path_form = 'subset' is not allowed: a LayerScaleBlock is made of norm1, attn, drop_path,",
        ),
        ({"model": {**TWICE, "drop_path_rule": "uniform"}}, r"drop_path_rule = 'uniform' is not allowed: a LayerScaleBlock is"),
        (
            {"model": {"drop_path_form": "subset"}, "data": {"batch_size": 8, "cell": 1}},
            r"model\.drop_path = 0\.2 is not allowed with drop_path_form subset and data\.cell = 1",
        ),
        ({"model": WINDOWS}, "'samvit_base_patch16' is not allowed .*: phase full fails with RuntimeError: shape"),
    ],
)
def test_refused(sections, message, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch"), "handlers", [caplog.handler])  # it hands nothing on to the root
    with pytest.raises(ValueError, match=message) as error:
        check_model(run(**sections))
    assert "\n" not in str(error.value)
    assert caplog.text == ""


def test_what_only_the_switch_or_the_freeze_would_find(monkeypatch):
    """A forward that asks for torch's own linear layers, which an adapter is not; and a model without a head."""

    def forward(block, x, *_, **__):
        assert type(block.qkv).__name__ == "Linear", "no linear layer"
        return block.proj(block.qkv(x)[..., : x.shape[-1]])

    with monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", forward)
        with pytest.raises(ValueError, match="phase warmup fails with AssertionError: no linear layer"):
            check_model(run())
        assert check_model(run(method={"enabled": False}))
    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.get_classifier", lambda model: model.head_drop)
    with pytest.raises(ValueError, match=r"method\.freeze = 'all_but_head' is not allowed: the model has no head"):
        check_model(run(method={"freeze": "all_but_head"}))
    assert check_model(run(method={"freeze": "adapted"}))


def test_a_parameter_that_nothing_depends_on_would_stall_several_workers(monkeypatch):
    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.forward", _without_norm)
    with pytest.raises(ValueError, match=r"on several workers: no logit depends on its norm\.weight"):
        check_model(run())
    assert check_model(run(workers={"max": 1}))


def _without_norm(model, images):
    return model.head(model.blocks(model._pos_embed(model.patch_embed(images)))[:, 0])
