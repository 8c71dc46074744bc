"""Adapters against timm (nothing changes at the switch) and PEFT (same outputs, same files)."""

import copy
import itertools
import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from prelora_ray.method.adapters import (
    inject,
    load_peft_state_dict,
    lora_layers,
    merged_state_dict,
    peft_config,
    peft_state_dict,
)
from prelora_ray.method.architecture import Target, find_targets
from prelora_ray.method.targets import target_norms


def mixed_ranks(targets):
    """A different rank for each family, one family without adapters, one layer's proj without one."""
    by_family = {"query": 2, "key": 8, "value": 4, "fc1": 16, "proj": 4}
    return {t.name: by_family[t.family] for t in targets if t.family in by_family and t.name != "blocks.1.attn.proj"}


@pytest.fixture
def adapted(vit):
    """The model with trained-looking adapters."""
    targets = find_targets(vit)
    inject(vit, targets, mixed_ranks(targets), scaling=2.0, seed=3)
    torch.manual_seed(5)
    for layer in lora_layers(vit).values():
        for b in layer.lora_B.values():
            torch.nn.init.normal_(b, std=0.1)
    return vit


def test_injection_changes_no_output(vit, images):
    before = vit(images)
    base = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    targets = find_targets(vit)
    inject(vit, targets, mixed_ranks(targets))
    torch.testing.assert_close(vit(images), before, rtol=0, atol=1e-5)
    state = vit.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())


def test_injection_keeps_the_parameters_themselves(vit):
    before = dict(vit.named_parameters())
    inject(vit, find_targets(vit), {"blocks.0.attn.key": 4})
    after = dict(vit.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {"blocks.0.attn.qkv.lora_A.key", "blocks.0.attn.qkv.lora_B.key"}


def test_initial_values_depend_on_seed_and_name_alone(vit):
    other, third = copy.deepcopy(vit), copy.deepcopy(vit)
    targets = find_targets(vit)
    inject(vit, targets, {"blocks.2.mlp.fc1": 8}, seed=1)
    inject(other, targets, dict.fromkeys((t.name for t in targets), 8), seed=1)
    inject(third, targets, {"blocks.2.mlp.fc1": 8}, seed=2)
    a = [model.blocks[2].mlp.fc1.lora_A["fc1"] for model in (vit, other, third)]
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2])
    assert a[0].abs().max() <= 16**-0.5  # Kaiming-uniform with a = sqrt 5: the bound is 1 / sqrt(in_features)
    assert a[0].std().item() == pytest.approx(16**-0.5 / 3**0.5, rel=0.15)


def test_merged_equals_unmerged(adapted, vit, images):
    import timm

    from tests.runs import TINY_VIT

    expected = adapted(images)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, **TINY_VIT).eval()
    plain.load_state_dict(merged_state_dict(adapted))
    torch.testing.assert_close(plain(images), expected, rtol=0, atol=1e-5)


def test_output_against_float64_by_hand(adapted):
    x = torch.randn(7, 16)
    layer = adapted.blocks[0].attn.qkv
    w, b = layer.weight.double(), layer.bias.double()
    rows = {"query": slice(0, 16), "key": slice(16, 32), "value": slice(32, 48)}
    for family, part in rows.items():
        w = w.clone()
        w[part] += 2.0 * layer.lora_B[family].double() @ layer.lora_A[family].double()
    torch.testing.assert_close(layer(x).double(), x.double() @ w.T + b, rtol=0, atol=1e-5)


def test_peft_loads_our_files_and_computes_the_same(adapted, vit, images, tmp_path: Path):
    import timm

    from tests.runs import TINY_VIT

    base = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, **TINY_VIT).eval()
    base.load_state_dict({name: t for name, t in adapted.state_dict().items() if "lora_" not in name})
    safetensors.torch.save_file(peft_state_dict(adapted), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(adapted)))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(images), adapted(images), rtol=0, atol=1e-5)
    theirs = peft.get_peft_model_state_dict(loaded)
    ours = peft_state_dict(adapted)
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_fused_qkv_is_block_diagonal(adapted):
    b = peft_state_dict(adapted)["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    assert b.shape == (48, 2 + 8 + 4)
    for rows, columns in ((slice(0, 16), slice(0, 2)), (slice(16, 32), slice(2, 10)), (slice(32, 48), slice(10, 14))):
        assert b[rows, columns].abs().min() > 0
        b[rows, columns] = 0
    assert b.abs().max() == 0


def test_load_gives_back_what_was_saved(adapted):
    saved = {name: tensor.clone() for name, tensor in peft_state_dict(adapted).items()}
    for layer in lora_layers(adapted).values():
        for parameter in (*layer.lora_A.values(), *layer.lora_B.values()):
            torch.nn.init.zeros_(parameter)
    load_peft_state_dict(adapted, saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in peft_state_dict(adapted).items())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.lora_A"):
        load_peft_state_dict(adapted, {name: t for name, t in saved.items() if "blocks.0.attn.qkv.lora_A" not in name})


def test_gradients_reach_the_adapters_alone_where_the_base_is_frozen(adapted, images):
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    adapted(images).square().sum().backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
        assert "lora_" not in name or parameter.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"blocks.0.attn.qkv": 8}, "'blocks.0.attn.qkv', which is no target module"),
        ({"blocks.0.attn.key": 32}, "rank 32 of 'blocks.0.attn.key' is not allowed.*at most 16"),
    ],
)
def test_refused(vit, ranks, message):
    with pytest.raises(ValueError, match=message):
        inject(vit, find_targets(vit), ranks)


CONVOLUTIONS = {
    "3 x 3": {"kernel_size": 3, "stride": 2, "padding": 1},
    "1 x 1": {"kernel_size": 1},
    "1 x 1, stride 2": {"kernel_size": 1, "stride": 2, "bias": False},
    "1 x 5": {"kernel_size": (1, 5), "padding": "same"},
}


@pytest.fixture(params=CONVOLUTIONS)
def convolution(request) -> tuple[nn.Module, nn.Module, list[Target]]:
    """A model with a convolution behind a linear layer, and the same one with adapters that do something, on the first
    and the last three of its eight rows."""
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(9, 9), nn.Conv2d(6, 8, **CONVOLUTIONS[request.param])).eval()
    columns = plain[1].weight[0].numel()
    targets = [Target("1.first", "first", 0, "1", 0, 3, columns), Target("1.last", "last", 0, "1", 5, 8, columns)]
    adapted = copy.deepcopy(plain)
    inject(adapted, targets, {"1.first": 2, "1.last": 3}, scaling=0.5, seed=3)
    for b in adapted[1].lora_B.values():
        nn.init.normal_(b)
    return plain, adapted, targets


def merged_by_hand(layer: nn.Module) -> torch.Tensor:
    """Number by number, in float64."""
    weight = layer.weight.detach().double()
    positions = list(itertools.product(*map(range, weight.shape[1:])))
    for family, start in (("first", 0), ("last", 5)):
        a, b = layer.lora_A[family].detach().double(), layer.lora_B[family].detach().double()
        for row, (column, position) in itertools.product(range(3), enumerate(positions)):
            weight[start + row, *position] += 0.5 * b[row] @ a[:, column]
    return weight


def test_a_convolution_against_float64_by_hand(convolution):
    plain, adapted, targets = convolution
    x, merged, exact = torch.randn(2, 6, 9, 9), merged_by_hand(adapted[1]), copy.deepcopy(plain[1]).double()
    exact.weight.data = merged
    assert (adapted[1](x) - plain[1](x)).abs().max() > 0.1, "the adapters do something"
    torch.testing.assert_close(adapted[1](x).double(), exact(x.double()), rtol=0, atol=1e-5)
    torch.testing.assert_close(merged_state_dict(adapted)["1.weight"].double(), merged, rtol=0, atol=1e-6)
    norms = target_norms(adapted, targets)
    assert norms["1.first"] == pytest.approx(merged[:3].square().sum().sqrt().item(), rel=1e-6)
    assert norms["1.last"] == pytest.approx(merged[5:].square().sum().sqrt().item(), rel=1e-6)


def test_peft_takes_a_convolutions_adapters_and_so_do_we(convolution, tmp_path: Path):
    plain, adapted, targets = convolution
    x, saved = torch.randn(2, 6, 9, 9), {name: t.contiguous() for name, t in peft_state_dict(adapted).items()}
    assert [tuple(tensor.shape) for tensor in saved.values()] == [(5, *plain[1].weight.shape[1:]), (8, 5, 1, 1)]
    safetensors.torch.save_file(saved, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(adapted)))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    torch.testing.assert_close(loaded(x), adapted(x), rtol=0, atol=1e-5)
    merged = loaded.merge_and_unload()[1].weight
    torch.testing.assert_close(merged, merged_state_dict(adapted)["1.weight"], rtol=0, atol=1e-6)
    inject(plain, targets, {"1.first": 2, "1.last": 3}, scaling=0.5)
    load_peft_state_dict(plain, saved)
    assert torch.equal(plain(x), adapted(x))


@pytest.mark.parametrize(("kernel", "columns", "largest"), [(1, 6, 6), (3, 54, 8)])
def test_a_convolutions_largest_rank_is_its_matrix_smaller_side(kernel, columns, largest):
    plain, target = nn.Sequential(nn.Conv2d(6, 8, kernel)), Target("0", "all", 0, "0", 0, 8, columns)
    message = rf"rank 9 of '0' is not allowed: its weight is 8 x {columns}, .* at most {largest}"
    with pytest.raises(ValueError, match=message):
        inject(plain, [target], {"0": 9})
