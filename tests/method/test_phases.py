import json
import math

import pytest
import timm
import torch

from prelora_ray.method.adapters import inject
from prelora_ray.method.architecture import find_targets, head_parameters
from prelora_ray.method.convergence import ConvergenceTest
from prelora_ray.method.phases import Phase, PhaseSchedule, freeze_parameters
from prelora_ray.torchvision_ops import make_importable
from tests.runs import TINY_VIT

make_importable()


NAME = "blocks.0.attn.query"


def schedule(**options) -> PhaseSchedule:
    test = ConvergenceTest(tau=1, zeta=1, windows=2, window_epochs=2)
    return PhaseSchedule(test, lambda change: dict.fromkeys(change, 8), **({"warmup_epochs": 3} | options))


def phases(schedule: PhaseSchedule, epochs: int = 12) -> list[str]:
    """Phase in which each epoch trains, with norms and loss that never change: converged at the end of window 1."""
    seen = []
    for epoch in range(epochs):
        seen.append(schedule.phase.value)
        schedule.end_epoch(epoch, {NAME: 1.0}, 1.0)
    return seen


def test_switch_by_the_test_then_warmup_then_lora():
    run = schedule()
    assert phases(run) == ["full"] * 4 + ["warmup"] * 3 + ["lora"] * 5
    assert (run.switched_at, run.frozen_at, run.ranks) == (4, 7, {NAME: 8})


def test_no_warmup_switches_and_freezes_at_once():
    run = schedule(warmup_epochs=0)
    assert phases(run) == ["full"] * 4 + ["lora"] * 8
    assert (run.switched_at, run.frozen_at) == (4, 4)


def test_forced_switch():
    assert phases(schedule(switch_epoch=5)) == ["full"] * 5 + ["warmup"] * 3 + ["lora"] * 4
    assert phases(schedule(switch_epoch=1)) == ["full"] + ["warmup"] * 3 + ["lora"] * 8


def test_disabled_never_switches():
    assert phases(schedule(enabled=False)) == ["full"] * 12


def test_state_survives_json_with_an_infinite_change():
    run = schedule(switch_epoch=6)
    norms = [0.0, 0.0, 1.0, 1.0]  # leaves zero: an infinite change
    for epoch, norm in enumerate(norms):
        run.end_epoch(epoch, {NAME: norm}, 1.0)
    copy = schedule(switch_epoch=6)
    copy.load_state_dict(json.loads(json.dumps(run.state_dict(), allow_nan=False)))
    assert copy._last_change == {NAME: math.inf}
    for epoch in (4, 5, 6, 7, 8, 9):
        assert run.end_epoch(epoch, {NAME: 1.0}, 1.0) == copy.end_epoch(epoch, {NAME: 1.0}, 1.0)
    assert run.phase is copy.phase is Phase.LORA


@pytest.fixture
def targets(vit):
    return find_targets(vit, ("key", "fc1"))


@pytest.fixture
def adapted(vit, targets):
    """Adapters on key of the last two blocks and fc1 of the last."""
    inject(vit, targets, {"blocks.1.attn.key": 4, "blocks.2.attn.key": 4, "blocks.2.mlp.fc1": 4})
    return vit


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_freeze_adapted(adapted, targets):
    everything = trainable(adapted)
    freeze_parameters(adapted, targets, "adapted")
    layers = [f"blocks.{layer}.{linear}" for layer in range(3) for linear in ("attn.qkv", "mlp.fc1")]  # adapted or not
    assert everything - trainable(adapted) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_freeze_all_but_head(adapted, targets):
    adapters = {name for name in trainable(adapted) if "lora_" in name}
    freeze_parameters(adapted, targets, "all_but_head")
    assert trainable(adapted) == adapters | {"head.weight", "head.bias"}


def test_freeze_all_but_two_heads(targets):
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=8, num_classes=10, **TINY_VIT)
    inject(distilled, targets, {target.name: 2 for target in targets})
    freeze_parameters(distilled, targets, "all_but_head")
    heads = {f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")}
    assert {name for name in trainable(distilled) if "lora_" not in name} == heads == head_parameters(distilled)


def test_freeze_all_but_the_head_of_a_model_without_one(adapted, targets):
    adapted.reset_classifier(0)
    with pytest.raises(ValueError, match="the model has no head"):
        freeze_parameters(adapted, targets, "all_but_head")


def test_freeze_prefix_leaves_what_stands_behind_the_blocks():
    cait = timm.create_model("cait_xxs24_224", img_size=8, num_classes=10, **TINY_VIT)
    targets = find_targets(cait)
    inject(cait, targets, {"blocks.1.mlp.fc1": 2})
    freeze_parameters(cait, targets, "prefix")
    parts = {".".join(name.split(".")[:2]) for name in trainable(cait)}
    assert {"blocks.1", "blocks.2", "blocks_token_only.0", "norm.weight", "head.bias"} <= parts
    assert not {"blocks.0", "patch_embed.proj"} & parts


def test_freeze_prefix_stops_the_backward(adapted, targets, images):
    freeze_parameters(adapted, targets, "prefix")
    names = trainable(adapted)
    assert not any(name.startswith(("patch_embed", "pos_embed", "cls_token", "blocks.0.")) for name in names)
    assert {"blocks.1.norm1.weight", "blocks.1.mlp.fc2.weight", "norm.weight", "head.bias"} <= names
    assert "blocks.1.attn.qkv.weight" not in names
    features = []
    adapted.blocks[0].register_forward_hook(lambda module, args, output: features.append(output))
    adapted(images).sum().backward()
    assert not features[0].requires_grad
    assert all((p.grad is not None) == (n in names) for n, p in adapted.named_parameters())
    assert torch.isfinite(adapted.head.weight.grad).all()


@pytest.mark.parametrize(
    ("name", "pool", "behind"),
    [
        ("vit_tiny_patch16_224", "token", {"norm", "head"}),
        ("vit_tiny_patch16_224", "avg", {"fc_norm", "head"}),
        ("vit_tiny_patch16_224", "map", {"norm", "attn_pool", "head"}),
        ("deit_tiny_distilled_patch16_224", "token", {"norm", "head", "head_dist"}),
    ],
)
def test_freeze_prefix_leaves_all_that_stands_behind_the_blocks(name, pool, behind):
    model = timm.create_model(name, img_size=8, num_classes=10, global_pool=pool, **TINY_VIT)
    targets = find_targets(model)
    inject(model, targets, {"blocks.1.attn.key": 4})
    last = {name for name, _ in model.named_parameters() if name.split(".")[0] in behind}
    assert {name.split(".")[0] for name in last} == behind
    freeze_parameters(model, targets, "prefix")
    names = trainable(model)
    assert last == {name for name in names if not name.startswith("blocks.")}
