import numpy as np
import pytest
import timm
import torch

from prelora_ray.method.adapters import inject
from prelora_ray.method.architecture import find_targets
from prelora_ray.method.targets import target_norms


def test_names_and_slices(vit):
    targets = find_targets(vit)
    assert [t.name for t in targets[:6]] == [
        "blocks.0.attn.query",
        "blocks.0.attn.key",
        "blocks.0.attn.value",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
    ]
    assert len(targets) == 18
    assert [(t.start, t.stop) for t in targets[:3]] == [(0, 16), (16, 32), (32, 48)]
    assert {t.stored_in for t in targets[:3]} == {"blocks.0.attn.qkv"}
    assert [t.family for t in find_targets(vit, ("fc1", "query"))] == ["query", "fc1"] * 3


def test_slices_are_the_query_key_and_value_that_attention_uses(vit):
    """Scaling the key rows must scale the attention's logits; the rows are timm's only by its reshape."""
    attn = vit.blocks[0].attn
    x = torch.randn(2, 5, 16)
    q, k, v = attn.qkv(x).reshape(2, 5, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    for tensor, target in zip((q, k, v), find_targets(vit)[:3], strict=True):
        rows = slice(target.start, target.stop)
        own = x @ attn.qkv.weight[rows].T + attn.qkv.bias[rows]
        torch.testing.assert_close(own, tensor.transpose(1, 2).reshape(2, 5, 16))


def test_norms_against_float64(vit):
    weights = {name: parameter.detach().double().numpy() for name, parameter in vit.named_parameters()}
    norms = target_norms(vit, find_targets(vit))
    assert list(norms) == [t.name for t in find_targets(vit)]
    for layer in range(3):
        q, k, v = np.split(weights[f"blocks.{layer}.attn.qkv.weight"], 3)
        for family, weight in zip(
            ("query", "key", "value", "proj", "fc1", "fc2"),
            (
                q,
                k,
                v,
                weights[f"blocks.{layer}.attn.proj.weight"],
                weights[f"blocks.{layer}.mlp.fc1.weight"],
                weights[f"blocks.{layer}.mlp.fc2.weight"],
            ),
            strict=True,
        ):
            room = "mlp" if family in ("fc1", "fc2") else "attn"
            assert norms[f"blocks.{layer}.{room}.{family}"] == pytest.approx(np.sqrt((weight**2).sum()), rel=1e-6)


def test_norms_with_adapters_are_those_of_the_merged_weights(vit):
    targets = find_targets(vit)
    before = target_norms(vit, targets)
    ranks = {t.name: 4 for t in targets if t.family in ("key", "fc2")}
    inject(vit, targets, ranks, scaling=2.0)
    assert target_norms(vit, targets) == before
    for layer in vit.blocks:
        torch.nn.init.normal_(layer.attn.qkv.lora_B["key"])
    norms = target_norms(vit, targets)
    qkv = vit.blocks[1].attn.qkv
    key = qkv.weight[16:32].double() + 2 * qkv.lora_B["key"].double() @ qkv.lora_A["key"].double()
    assert norms["blocks.1.attn.key"] == pytest.approx(key.norm().item(), rel=1e-6)
    assert norms["blocks.1.attn.query"] == before["blocks.1.attn.query"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg11", "VGG has no blocks that PreLoRA knows"),
        ("vitamin_small_224", r"has no blocks\.0\.mlp\.fc1 as a Vision Transformer has it, nor what stands for it"),
        ("gcvit_xxtiny", r"stages\.0\.blocks\.1\.attn\.qkv as a"),  # two thirds of the rows: the query is not its own
        ("poolformer_s12", r"stages\.0\.blocks\.0\.attn\.qkv as a Vision Transformer in stages has it"),
    ],
)
def test_other_models_are_refused(name, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=message):
        find_targets(model)


def test_unknown_target(vit):
    message = r"VisionTransformer has no target 'qkv': its targets are query, key, .* fc2$"
    with pytest.raises(ValueError, match=message):
        find_targets(vit, ["qkv"])
