"""The fast products against float64 by hand, and against the plain adapters."""

import copy
import math

import pytest
import torch
from torch import nn

from prelora_ray.config import ModelSettings
from prelora_ray.engine.model import compile_blocks, create_model
from prelora_ray.engine.precision import use_products
from prelora_ray.kernels.fp8 import Adapter, Fp8FrozenLinear, fp8_mlp
from prelora_ray.kernels.gelu import gelu_quantize, gelu_quantize_backward
from prelora_ray.kernels.merged import FrozenLinear, merged_linear
from prelora_ray.kernels.rows import quantize
from prelora_ray.method.adapters import inject, lora_layers
from prelora_ray.method.architecture import find_targets
from prelora_ray.method.phases import freeze_parameters
from tests.runs import TINY_VIT

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


@pytest.mark.parametrize(("rows", "rank"), [(64, 8), (37, 3), (1, 24)])
def test_fp8_mlp_against_float64(rows, rank):
    first, second = layer(rows, 48, 160, rank, frozen=True), layer(rows, 160, 80, rank + 1, frozen=True)
    held, adapters = [], []
    for t in (first, second):
        for name in ("weight", "b"):
            t[name].detach().div_(7)  # or GELU would see values that are almost all far from 0
        form = Fp8FrozenLinear(t["weight"], t["bias"], 32)
        form.refresh(t["weight"], t["a"], t["b"], SCALING)
        held.append(form)
        adapters.append(Adapter(t["a"], t["b"], SCALING))
    y = fp8_mlp(first["x"], held[0], adapters[0], held[1], adapters[1])
    y.backward(second["dy"].to(y.dtype))
    exact = {
        name: [t[name].detach().double().requires_grad_() for t in (first, second)]
        for name in ("x", "weight", "bias", "a", "b")
    }
    z = exact["x"][0]
    for i in range(2):
        merged = exact["weight"][i] + SCALING * exact["b"][i] @ exact["a"][i]
        z = nn.functional.linear(nn.functional.gelu(z) if i else z, merged, exact["bias"][i])
    z.backward(second["dy"].double())
    assert error(y, z.detach()) < 0.08
    assert error(first["x"].grad, exact["x"][0].grad) < 0.12
    for i, t in enumerate((first, second)):
        assert all(error(t[name].grad, exact[name][i].grad) < 0.12 for name in ("a", "b"))


@pytest.mark.parametrize(("rows", "columns"), [(5, 96), (64, 384), (1, 16)])
def test_gelu_between_products_against_float64(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    h, dg = (torch.randn(rows, columns + 16, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    x = h[:, :columns].double().requires_grad_()
    gelu = nn.functional.gelu(x)
    gelu.backward(dg[:, :columns].double())
    assert x.grad is not None
    values, rounded = gelu_quantize(h, columns)
    for found, exact in ((values, gelu), (rounded, x)):
        expected = quantize(exact.detach())
        assert error(found[1], expected[1].double()) < 1e-6
        assert (found[0].float() != expected[0].float()).double().mean() < 0.01  # a tie may go either way
    kept = (rounded.values.double() * rounded.scale).requires_grad_()
    gelu_of_kept = nn.functional.gelu(kept)
    gelu_of_kept.backward(dg[:, :columns].double())
    g, dh, dh_rounded = gelu_quantize_backward(dg, rounded)
    assert error(g, gelu_of_kept.detach()) < 2**-8
    assert error(dh, kept.grad) < 2**-8
    assert error(dh, x.grad) < 0.04
    assert error(dh_rounded.values.double() * dh_rounded.scale, x.grad) < 0.05


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


@pytest.mark.parametrize("frozen", [False, True], ids=["warmup", "lora"])
def test_a_model_compiles_once_for_each_size_of_images(frozen):
    """Shapes that are numbers, for blocks of different ranks still in one: code for any number of tokens would be slower."""
    settings = ModelSettings(name="vit_tiny_patch16_224", image_size=8, options=TINY_VIT)
    model = create_model(settings, 10, seed=0, any_size=True)
    targets = find_targets(model)
    inject(model, targets, {target.name: [2, 4, 8, 16][(i + i // 6) % 4] for i, target in enumerate(targets)})
    if frozen:
        freeze_parameters(model, targets, "adapted")
    for held in use_products(model, "fp32", "merged"):
        held.refresh()
    compiled: list[torch.Size] = []

    def backend(graph, inputs):
        compiled.extend(x.shape for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 3)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compile_blocks(model, backend, any_size=True)
    for size in (4, 4, 6, 8, 4):
        model.train()(torch.randn(5, 3, size, size)).square().sum().backward()
    assert [tuple(shape) for shape in compiled] == [(5, 5, 16), (5, 10, 16), (5, 17, 16)]
    assert all(type(length) is int for shape in compiled for length in shape)


def test_fp8_and_back_leaves_the_models_own_modules_and_tensors(vit):
    targets = find_targets(vit)
    inject(vit, targets, {"blocks.1.mlp.fc1": 4})
    freeze_parameters(vit, targets, "prefix")
    own, tensors, parameters = dict(vit.named_modules()), copy.deepcopy(vit.state_dict()), dict(vit.named_parameters())
    for format_ in ("fp8", "fp8", "fp32"):
        use_products(vit, format_, "plain")
        standing_in = {name for name, module in vit.named_modules() if name in own and module is not own[name]}
        linears = {f"blocks.{layer}.{path}" for layer in range(3) for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        linears = linears - {"blocks.1.mlp.fc1"} | {f"blocks.{layer}.mlp" for layer in range(3)}
        assert standing_in == (linears if format_ == "fp8" else set())
        assert not [name for name, module in vit.named_modules() if "forward" in vars(module)]
        assert list(vit.state_dict()) == list(tensors)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in vit.state_dict().items())
        assert all(parameter is parameters[name] for name, parameter in vit.named_parameters())
    assert list(dict(vit.named_modules())) == list(own)


def test_fp8_computes_frozen_layers_without_adapters_too(vit, images):
    targets = find_targets(vit)
    last = max(target.layer for target in targets)
    inject(vit, targets, {target.name: 4 for target in targets if target.layer == last and target.family != "fc2"})
    for adapted in lora_layers(vit).values():
        for b in adapted.lora_B.values():
            nn.init.normal_(b, std=0.1, generator=torch.Generator().manual_seed(1))
    freeze_parameters(vit, targets, "prefix")
    plain = copy.deepcopy(vit).double()
    for held in use_products(vit, "fp8", "merged"):
        held.refresh()
    forms = [module for module in vit.modules() if isinstance(module, Fp8FrozenLinear)]
    assert len(forms) == len({target.linear for target in targets})
    logits, exact = vit(images), plain(images.double())
    logits.square().sum().backward()
    exact.square().sum().backward()
    assert 1e-3 < error(logits, exact.detach()) < 0.2
    for (name, parameter), (_, reference) in zip(vit.named_parameters(), plain.named_parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if parameter.grad is not None:
            assert error(parameter.grad, reference.grad) < 0.5, name
    use_products(vit, "fp32", "plain")
    assert error(vit(images), exact.detach()) < 1e-5
