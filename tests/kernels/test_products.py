"""The fast products against float64 by hand, and against the plain adapters."""

import copy
import math

import pytest
import torch
from torch import nn

from prelora_ray.kernels.fp8 import Fp8FrozenLinear, quantize
from prelora_ray.kernels.merged import FrozenLinear, merged_linear
from prelora_ray.method.adapters import inject, lora_layers
from prelora_ray.method.phases import freeze_parameters
from prelora_ray.method.targets import find_targets
from prelora_ray.train.model import compile_blocks
from prelora_ray.train.precision import use_products

SCALING = 2.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cuda.matmul.allow_tf32 = False


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm-wise and relative."""
    return float((value.detach().double() - reference).norm() / reference.norm())


def layer(rows: int, in_features: int, out_features: int, rank: int, *, frozen: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * rank)
    shapes = {
        "x": (rows, in_features),
        "weight": (out_features, in_features),
        "bias": (out_features,),
        "a": (rank, in_features),
        "b": (out_features, rank),
        "dy": (rows, out_features),
    }
    tensors = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}
    for name in ("x", "a", "b") if frozen else ("x", "weight", "bias", "a", "b"):
        tensors[name].requires_grad_()
    return tensors


def product(t: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The layer's output: merged where the weight trains, else by the frozen form in `dtype`."""
    arguments = t["weight"], t["bias"], t["a"], t["b"], SCALING
    if t["weight"].requires_grad:
        return merged_linear(t["x"], *arguments, dtype)
    held = t["weight"], t["bias"], math.ceil(len(t["a"]) / 16) * 16 + 16  # room to spare
    form = Fp8FrozenLinear(*held) if dtype == torch.float8_e4m3fn else FrozenLinear(*held, dtype)
    form.refresh(t["weight"], t["a"], t["b"], SCALING)
    return form(t["x"], *arguments)


def by_hand(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and gradients in float64."""
    x, weight, bias, a, b, dy = (t[name].detach().double() for name in ("x", "weight", "bias", "a", "b", "dy"))
    merged = weight + SCALING * b @ a
    return {
        "y": x @ merged.T + bias,
        "x": dy @ merged,
        "weight": dy.T @ x,
        "bias": dy.sum(0),
        "a": SCALING * (dy @ b).T @ x,
        "b": SCALING * dy.T @ (x @ a.T),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [False, True], ids=["warmup", "lora"])
@pytest.mark.parametrize(("rows", "rank"), [(64, 8), (37, 3), (1, 24)])
def test_merged_product_against_float64(dtype, tolerance, frozen, rows, rank):
    t = layer(rows, 48, 80, rank, frozen=frozen)
    y = product(t, dtype)
    y.backward(t["dy"].to(y.dtype))
    expected = by_hand(t)
    assert error(y, expected["y"]) < tolerance
    for name in ("x", "weight", "bias", "a", "b"):
        assert (t[name].grad is None) == (frozen and name in ("weight", "bias"))
        if t[name].grad is not None:
            assert t[name].grad.dtype == torch.float32
            assert error(t[name].grad, expected[name]) < tolerance, name


@pytest.mark.parametrize(("rows", "rank"), [(64, 8), (37, 3), (1, 24)])
def test_fp8_product_against_float64(rows, rank):
    """e4m3 has three bits behind the point: a value is off by up to 1/16 of itself, and 2 to 3 % on average."""
    t = layer(rows, 48, 80, rank, frozen=True)
    y = product(t, torch.float8_e4m3fn)
    y.backward(t["dy"].to(y.dtype))
    expected = by_hand(t)
    assert error(y, expected["y"]) < 0.05
    assert all(error(t[name].grad, expected[name]) < 0.06 for name in ("x", "a", "b"))


def test_fp8_quantizes_each_row_by_its_own_largest_value():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3e4, 1.0, -1e4]])
    values, scale = quantize(x)
    assert values.is_contiguous()
    assert scale[0].item() == pytest.approx(2 / 448)
    assert values.float().abs().amax(1).tolist() == [448, 0, 448]
    assert ((values.float() * scale - x).abs() <= x.abs() / 16 + scale * 2**-10).all()


@pytest.mark.parametrize("share", [1e-2, 1e-3])
def test_a_small_change_of_b_is_seen(share):
    """W alone in bf16 would hide most of an adapter that is a thousandth of it."""
    t = layer(512, 256, 256, 16, frozen=True)
    with torch.no_grad():
        t["b"] *= share * t["weight"].norm() / (SCALING * t["b"] @ t["a"]).norm()
        response = product(t, torch.bfloat16).double() - product(t | {"b": 0 * t["b"]}, torch.bfloat16).double()
        exact = t["x"].double() @ (SCALING * t["b"].double() @ t["a"].double()).T
    assert float((response * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("format_", "tolerance", "frozen"),
    [("fp32", 1e-4, False), ("fp32", 1e-4, True), ("bf16", 5e-2, False), ("bf16", 5e-2, True), ("fp8", 0.5, True)],
    ids=["fp32 warmup", "fp32 lora", "bf16 warmup", "bf16 lora", "fp8 lora"],
)
def test_a_model_compiles_once_for_blocks_of_different_ranks(vit, images, format_, tolerance, frozen):
    targets = find_targets(vit)
    ranks = [2, 4, 8, 16]
    inject(vit, targets, {target.name: ranks[(i + i // 6) % 4] for i, target in enumerate(targets)})
    for adapted in lora_layers(vit).values():
        for b in adapted.lora_B.values():
            nn.init.normal_(b, std=0.1, generator=torch.Generator().manual_seed(1))
    if frozen:
        freeze_parameters(vit, targets, "adapted")
    plain = copy.deepcopy(vit).double()
    for held in use_products(vit, format_, "merged"):
        held.refresh()
    torch._dynamo.utils.counters.clear()
    compile_blocks(vit, backend="aot_eager")
    vit.train()
    vit(images).square().sum().backward()
    plain(images.double()).square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for (name, parameter), (_, reference) in zip(vit.named_parameters(), plain.named_parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if parameter.grad is not None:
            assert error(parameter.grad, reference.grad) < tolerance, name
