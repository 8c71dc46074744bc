"""timm's architectures, one a line, through what adapters must keep; against timm, PEFT and numpy."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from prelora_ray.config_file import parse_settings
from prelora_ray.engine.check import check_model
from prelora_ray.engine.drop_path import compute_subsets, draw_drop_path, drop_path_modules, set_drop_path
from prelora_ray.engine.ema import Ema
from prelora_ray.engine.model import compile_blocks, create_model, timm_model
from prelora_ray.engine.precision import autocast, keep_residual_in_bf16, use_products
from prelora_ray.engine.state import TrainState
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.method.adapters import inject, lora_layers, merged_state_dict, peft_config, peft_state_dict
from prelora_ray.method.architecture import (
    ARCHITECTURES,
    Target,
    architecture_of,
    blocks_of,
    find_targets,
    layers_of,
    stages_of,
)
from prelora_ray.method.phases import Phase, freeze_parameters
from prelora_ray.method.targets import target_norms
from prelora_ray.storage import Storage
from prelora_ray.torchvision_ops import make_importable
from tests.runs import TINY_VIT, assert_same_bits

make_importable()

from timm.layers import StdConv2d  # noqa: E402

ATTENTION, MLP, SWIGLU = "query key value proj", "fc1 fc2", "fc1_g fc1_x fc2"
EVA = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
CONVNEXT = {"patch_size": 2, "depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
EDGENEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "heads": (2, 2, 2, 2)}
MAMBAOUT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 32)}
PVT = {"depths": (1, 1, 2, 1), "embed_dims": (8, 12, 16, 24), "num_heads": (1, 2, 2, 2)}
RESNET = {"layers": (1, 1, 2, 1), "channels": (4, 6, 8, 10), "stem_type": "deep", "stem_width": 4}
RESNET_V2 = {"layers": (1, 1, 2, 1), "channels": (16, 24, 32, 40), "stem_chs": 8}
TINY: dict[str, tuple[str, int, dict[str, Any], str, int]] = {
    "ViT": ("vit_tiny_patch16_224", 32, TINY_VIT | {"patch_size": 8}, f"{ATTENTION} {MLP}", 3),
    "registers": ("vit_small_patch14_reg4_dinov2", 32, TINY_VIT | {"patch_size": 8}, f"{ATTENTION} {MLP}", 3),
    "map pooling": ("vit_base_patch16_siglip_224", 32, TINY_VIT | {"patch_size": 8}, f"{ATTENTION} {MLP}", 3),
    "packed SwiGLU": ("vit_giant_patch14_dinov2", 32, TINY_VIT | {"patch_size": 8, "mlp_ratio": 4}, f"{ATTENTION} {MLP}", 3),
    "SwiGLU": ("aimv2_large_patch14_224", 32, TINY_VIT | {"patch_size": 8}, f"{ATTENTION} {SWIGLU}", 3),
    "DINOv3": ("vit_small_patch16_dinov3", 32, EVA, f"{ATTENTION} {MLP}", 2),
    "EVA-02": ("eva02_base_patch14_224", 32, EVA, f"{ATTENTION} {SWIGLU}", 2),
    "CaiT": ("cait_xxs24_224", 32, TINY_VIT | {"patch_size": 8}, f"{ATTENTION} {MLP}", 3),
    "ConViT": ("convit_tiny", 32, TINY_VIT | {"patch_size": 8, "local_up_to_layer": 2}, f"{ATTENTION} {MLP}", 3),
    "Swin": ("swin_tiny_patch4_window7_224", 16, SWIN, f"{ATTENTION} {MLP}", 4),
    "Hiera": ("hiera_tiny_224", 64, {"embed_dim": 16, "stages": (1, 1, 1, 1)}, f"{ATTENTION} {MLP}", 4),
    "NesT": ("nest_tiny", 32, {}, f"{ATTENTION} {MLP}", 12),
    "PiT": ("pit_ti_224", 32, {"patch_size": 8, "stride": 4, "depth": (1, 1, 1)}, f"{ATTENTION} {MLP}", 3),
    "Mixer": ("mixer_s32_224", 64, {}, "tokens_fc1 tokens_fc2 channels_fc1 channels_fc2", 8),
    "gMixer": ("gmixer_12_224", 32, {}, "tokens_fc1 tokens_fc2 channels_fc1 channels_fc2", 12),
    "ResMLP": ("resmlp_12_224", 32, {}, "tokens channels_fc1 channels_fc2", 12),
    "gMLP": ("gmlp_ti16_224", 32, {}, "tokens channels_fc1 channels_fc2", 30),
    "ConvNeXt": ("convnext_tiny", 32, CONVNEXT, MLP, 5),
    "ConvNeXt V2": ("convnextv2_tiny", 32, CONVNEXT, MLP, 5),
    "ConvNeXt of 1 x 1": ("convnext_atto", 32, CONVNEXT, MLP, 5),
    "ConvNeXt V2 of 1 x 1": ("convnextv2_atto", 32, CONVNEXT, MLP, 5),
    "ConvNeXt _hnf": ("convnext_tiny_hnf", 32, CONVNEXT, MLP, 5),
    "EdgeNeXt": ("edgenext_xx_small", 64, EDGENEXT, f"{MLP} {ATTENTION}", 5),
    "CAFormer": ("caformer_s18", 32, {}, f"pwconv1 pwconv2 {MLP} {ATTENTION}", 18),
    "FocalNet": ("focalnet_tiny_srf", 32, {}, f"f h proj {MLP}", 12),
    "MambaOut": ("mambaout_femto", 32, MAMBAOUT, MLP, 5),
    "ResNet": ("resnet50", 32, RESNET, "conv1 conv2 conv3", 5),
    "ResNet of two layers": ("resnet18", 32, RESNET, "conv1 conv2", 5),
    "ResNeXt": ("resnext50_32x4d", 32, RESNET | {"channels": (16, 16, 16, 32)}, "conv1 conv3", 5),
    "ResNet v2": ("resnetv2_50", 32, RESNET_V2, "conv1 conv2 conv3", 5),
    "PVT v2": ("pvt_v2_b0", 64, PVT, f"query key value sr proj {MLP}", 5),
}
"""By what is tried: a model's name, size of images, options, and its families and number of blocks."""
QUICK = {"ViT", "EVA-02", "Swin", "Mixer", "ConvNeXt of 1 x 1", "PVT v2", "ResNet"}
"""Those that stand for all in `make test`: each takes another way through the code."""


def content(kind: str, /, **sections: dict[str, Any]) -> dict[str, Any]:
    name, size, options, _, _ = TINY[kind]
    found: dict[str, dict[str, Any]] = {
        "data": {"path": "x", "batch_size": 8, "cell": 4},
        "model": {"name": name, "image_size": size, "options": options, "drop_path": 0.2},
        "method": {"r_min": 2, "r_max": 4},
        "workers": {"max": 2},
    }
    for section, keys in sections.items():
        found[section] = found.get(section, {}) | keys
    return {"name": "run", **found}


def model_of(kind: str, **keys: Any) -> nn.Module:
    """One whose every part has a say in the logits, which layer scales and heads that begin near zero have not."""
    model = create_model(parse_settings(content(kind, model=keys)).model, 10, seed=0).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim <= 1 or parameter.abs().max() < 0.1:
            nn.init.normal_(parameter, mean=float(parameter.ndim <= 1), std=0.2, generator=generator)
    return model


def images_of(kind: str, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, TINY[kind][1], TINY[kind][1], generator=torch.Generator().manual_seed(1))


def adapt(model: nn.Module, targets: list[Target]) -> None:
    """Adapters of several ranks that do something."""
    inject(model, targets, {target.name: (2, 4, 1)[i % 3] for i, target in enumerate(targets)})
    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        for b in layer.lora_B.values():
            nn.init.normal_(b, std=0.1, generator=generator)


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * max(1, expected.abs().max().item()))


@pytest.fixture(params=[pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in TINY])
def kind(request) -> str:
    return request.param


def test_families_and_blocks(kind):
    targets = find_targets(model_of(kind))
    *_, families, blocks = TINY[kind]
    assert {target.family for target in targets} == set(families.split())
    assert [*dict.fromkeys(target.layer for target in targets)] == list(range(blocks))
    assert layers_of(target.name for target in targets) == {target.name: target.layer for target in targets}
    assert len({target.name for target in targets}) == len(targets)


def test_adapters_change_no_logit_and_merge(kind):
    """Into a model that timm makes, which computes what the adapted one does."""
    model, images = model_of(kind), images_of(kind)
    before, adapted, targets = model(images), copy.deepcopy(model), find_targets(model)
    inject(model, targets, {target.name: 2 for target in targets})
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5)
    adapt(adapted, targets)
    expected = adapted(images)
    assert (expected - before).abs().max() > 1e-3
    plain = timm_model(parse_settings(content(kind)).model, 10).eval()
    plain.load_state_dict(merged_state_dict(adapted))
    assert_close(plain(images), expected)


def test_peft_takes_the_adapters(kind, tmp_path):
    base, images = model_of(kind), images_of(kind)
    adapted = copy.deepcopy(base)
    adapt(adapted, find_targets(base))
    tensors = {name: tensor.contiguous() for name, tensor in peft_state_dict(adapted).items()}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(adapted)))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close(loaded(images), adapted(images))


def test_norms_are_those_of_the_layers_slices(kind):
    """By numpy, from layers found by their names' ends; all rows of a layer are some family's, once."""
    model = model_of(kind)
    targets = find_targets(model)
    norms, rows = target_norms(model, targets), {}
    for target in targets:
        weight = model.get_submodule(target.stored_in).weight.detach().double().numpy()
        shares = {"qkv": ["query", "key", "value"], "qk": ["query", "key"], "kv": ["key", "value"]}.get(
            target.stored_in.rsplit(".", 1)[1], []
        )
        part = np.split(weight, len(shares))[shares.index(target.family)] if shares else weight
        assert norms[target.name] == pytest.approx(np.sqrt((part**2).sum()), rel=1e-4)
        rows[target.stored_in] = rows.get(target.stored_in, 0) + len(part)
    assert all(len(model.get_submodule(linear).weight) == count for linear, count in rows.items())


def test_gradients_reach_every_adapter_and_stop_at_the_prefix(kind):
    model = model_of(kind)
    targets = find_targets(model)
    last = max(target.layer for target in targets)
    adapt(model, [target for target in targets if target.layer == last])
    freeze_parameters(model, targets, "prefix")
    inputs = []
    blocks_of(model)[last].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(images_of(kind)).square().sum().backward()
    assert inputs and not any(x.requires_grad for x in inputs)
    adapters = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len([target for target in targets if target.layer == last])
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in adapters.values())
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_run_is_accepted(kind):
    train = {"residual": "bf16", "layer_decay": 0.7}
    assert check_model(parse_settings(content(kind, train=train, method={"freeze": "prefix"})))


def test_an_option_that_a_recipe_has_already_is_no_hindrance_to_images_that_grow():
    options = TINY["ViT"][2] | {"dynamic_img_size": True}
    step = {"until": 1, "image_size": 16}
    assert check_model(parse_settings(content("ViT", model={"options": options}, train={"resolution": [step]})))


def test_convolutions_take_images_that_grow():
    step = {"until": 1, "image_size": 32}
    assert check_model(parse_settings(content("ConvNeXt", model={"image_size": 64}, train={"resolution": [step]})))


@pytest.mark.parametrize("train", [{}, {"precision": "fp8", "fp8_from": "full", "residual": "bf16"}], ids=["fp32", "fp8"])
@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(
    "kind",
    ["ConvNeXt of 1 x 1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("Swin", "SwiGLU", "Mixer", "ConvNeXt"))],
)
def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path, kind, phase, train):
    """Through the files, in every phase, with what stands in for the blocks' layers in place."""
    run = parse_settings(content(kind, train=train))
    cell = images_of(kind, run.data.cell)

    def a_step(state: TrainState) -> None:
        state.refresh()
        state.network.train()
        set_drop_path(state.drop_path, draw_drop_path(state.drop_path, 0, 0, 0, [0], len(cell), len(cell)).float())
        with state.autocast():
            logits = state.network(cell.to(state.dtype))
        logits.square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    state = TrainState(run, 10, 1, torch.device("cpu"), 1)
    a_step(state)
    state.enter(phase, {target.name: 2 for target in state.targets})
    a_step(state)
    checkpoints = Checkpoints(Storage(tmp_path))
    checkpoints.save(state.snapshot([], holds_base=False))
    resumed = TrainState(run, 10, 1, torch.device("cpu"), 1, checkpoints.load(checkpoints.names()[-1]))
    for each in (state, resumed):
        a_step(each)
    assert_same_bits(resumed.snapshot([], holds_base=False), state.snapshot([], holds_base=False))


def test_an_average_takes_in_merged_weights(kind):
    """A tenth of them, at a step."""
    model = model_of(kind)
    average = Ema(copy.deepcopy(model), decay=0.9)
    begin = {name: tensor.clone() for name, tensor in average.tensors().items()}
    adapt(model, find_targets(model))
    average.follow(model)
    average.update()
    for name, tensor in merged_state_dict(model).items():
        expected = (0.9 * begin[name] + 0.1 * tensor).to(tensor.dtype)
        torch.testing.assert_close(average.tensors()[name], expected, rtol=0, atol=1e-5)


def test_the_residual_stream_is_bf16_from_the_first_block_of_each_stage_on(kind):
    """Also where timm's model goes through a list of blocks, which is never called itself."""
    model = model_of(kind)
    keep_residual_in_bf16(model)
    formats = []
    for stage in stages_of(model):
        stage[0].register_forward_pre_hook(lambda _, inputs: formats.append(inputs[0].dtype))
    with autocast("bf16", torch.device("cpu")):
        model(images_of(kind))
    assert formats == [torch.bfloat16] * len(stages_of(model))


@pytest.mark.parametrize("kind", ["Swin", "NesT", "PiT", "EVA-02", "PVT v2"])
def test_subsets_and_masks_of_equal_scales_agree(kind):
    mask = model_of(kind, drop_path=0.25, drop_path_rule="uniform").train()
    subset = copy.deepcopy(mask)
    compute_subsets(subset, cell=8)
    images = torch.randn(8, *images_of(kind).shape[1:], generator=torch.Generator().manual_seed(3))
    scales = draw_drop_path(drop_path_modules(subset), 1, 0, 0, [0], 8, 8).float()
    assert (scales == 0).sum() == 2 * len(scales)
    for model in (mask, subset):
        set_drop_path(drop_path_modules(model), scales)
    assert_close(subset(images), mask(images))


@pytest.mark.parametrize(
    ("kind", "format_"),
    [
        pytest.param("EVA-02", "fp32", marks=pytest.mark.slow),
        pytest.param("Mixer", "fp8", marks=pytest.mark.slow),
        pytest.param("ConvNeXt", "fp8", marks=pytest.mark.slow),
        pytest.param("ConvNeXt of 1 x 1", "fp8", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_compute_the_same(kind, format_):
    model = model_of(kind)
    targets = find_targets(model)
    adapt(model, targets)
    freeze_parameters(model, targets, "adapted")
    expected = copy.deepcopy(model)(images_of(kind))
    for layer in use_products(model, format_, "merged"):
        layer.refresh()
    compile_blocks(model, backend="aot_eager")
    with autocast(format_, torch.device("cpu")):
        logits = model(images_of(kind))
    logits.float().square().sum().backward()
    assert (logits - expected).norm() < (1e-5 if format_ == "fp32" else 0.1) * expected.norm()


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        (
            "Mixer",
            {"method": {"targets": ["query"]}},
            r"MlpMixer has no target 'query': its targets are tokens_fc1, .* channels_fc2$",
        ),
        (
            "ConvNeXt",
            {"model": {"drop_path_form": "subset"}},
            r"model\.drop_path_form = 'subset' is not allowed: a ConvNeXtBlock",
        ),
        (
            "ResNet",
            {"model": {"drop_path_form": "subset"}},
            r"model\.drop_path_form = 'subset' is not allowed: a Bottleneck is made of conv1, bn1",
        ),
        ("SwiGLU", {"method": {"targets": ["fc1"]}}, r"has no target 'fc1': .* fc1_g, fc1_x, fc2$"),
        ("Mixer", {"method": {"r_max": 8}}, r"method\.r_max = 8 is not allowed: the model's smallest weight has rank 4"),
        ("Mixer", {"model": {"drop_path_form": "subset"}}, r"model\.drop_path_form = 'subset' is not allowed: a MixerBlock is"),
        (
            "ResMLP",
            {"model": {"drop_path_rule": "uniform"}},
            r"model\.drop_path_rule = 'uniform' is not allowed: a ResBlock is",
        ),
        (
            "Mixer",
            {"train": {"resolution": [{"until": 1, "image_size": 32}]}},
            r"^train\.resolution is not allowed with .*'mixer",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(kind, sections, message):
    with pytest.raises(ValueError, match=message) as error:
        check_model(parse_settings(content(kind, **sections)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 32, 1, groups=4),
        nn.Conv2d(8, 32, 3, padding=2, dilation=2),
        nn.Conv2d(8, 32, 3, padding=1, padding_mode="reflect"),
        StdConv2d(8, 32, 1),
    ],
    ids=["groups", "dilated", "reflected", "standardized"],
)
def test_a_convolution_that_peft_has_no_adapter_for_is_none_of_the_method(layer):
    model = model_of("ConvNeXt of 1 x 1")
    model.stages[0].blocks[0].mlp.fc1 = layer
    with pytest.raises(ValueError, match=r"ConvNeXt has no stages\.0\.blocks\.0\.mlp\.fc1 as a ConvNeXt has it"):
        find_targets(model)


def test_each_architecture_is_tried():
    tried = {architecture_of(model_of(kind)).name for kind in TINY}
    elsewhere = {"BERT", "Vision Transformer of transformers"}  # tests/tasks, tests/integrations
    assert tried | elsewhere == {architecture.name for architecture in ARCHITECTURES}
