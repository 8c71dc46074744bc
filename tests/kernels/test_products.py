"""The fast products against float64 by hand, and against the plain adapters."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prelora_ray.config import ModelSettings
from prelora_ray.engine.model import compile_blocks, create_model
from prelora_ray.engine.precision import use_products
from prelora_ray.kernels.fp8 import Adapter, Fp8FrozenLinear, fp8_mlp
from prelora_ray.kernels.fp8_trained import Fp8TrainedLinear, fp8_trained_mlp
from prelora_ray.kernels.merged import FrozenConvolution, FrozenLinear, merged_product
from prelora_ray.kernels.passes import (
    gelu_quantize,
    gelu_quantize_backward,
    gelu_quantize_both,
    gelu_quantize_both_backward,
    quantize_and_sum,
)
from prelora_ray.kernels.rows import quantize
from prelora_ray.method.adapters import inject, lora_layers
from prelora_ray.method.architecture import Target, find_targets
from prelora_ray.method.phases import freeze_parameters
from prelora_ray.torchvision_ops import make_importable
from tests.runs import TINY_VIT

make_importable()

import timm  # noqa: E402

SCALING = 2.0
E4M3 = torch.float8_e4m3fn
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
        return trained(t)(t["x"], *arguments) if dtype == E4M3 else merged_product(t["x"], *arguments, dtype)
    held = t["weight"], t["bias"], math.ceil(len(t["a"]) / 16) * 16 + 16  # room to spare
    form = Fp8FrozenLinear(*held) if dtype == E4M3 else FrozenLinear(*held, dtype)
    form.refresh(t["weight"], t["a"], t["b"], SCALING)
    return form(t["x"], *arguments)


def trained(t: dict[str, torch.Tensor]) -> Fp8TrainedLinear:
    form = Fp8TrainedLinear(t["weight"])
    form.refresh(t["weight"], t["a"], t["b"], SCALING)
    return form


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


WIDE = {"channels": (48, 40), "kernel_size": 3, "padding": 1}
"""A convolution whose gradient of W is worth sparing at a width of 16."""


class ConvolutionalBlock(nn.Module):
    """One convolution, and two families of its rows that get an adapter."""

    def __init__(self, channels: tuple[int, int] = (6, 8), **form) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*channels, **form)
        self.families = {"first": (0, 3), "rest": (3, channels[1])}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def model_of_convolutions(form: dict[str, int], ranks: list[dict[str, int]]) -> nn.Module:
    """A model whose blocks are such, with adapters of these ranks."""
    torch.manual_seed(4)
    model = nn.Module()
    model.blocks = nn.Sequential(*(ConvolutionalBlock(**form) for _ in ranks))
    for layer, of_block in enumerate(ranks):
        conv = model.blocks[layer].conv
        targets = [
            Target(f"blocks.{layer}.{family}", family, layer, f"blocks.{layer}.conv", *rows, conv.weight[0].numel())
            for family, rows in model.blocks[layer].families.items()
        ]
        inject(model, targets, {f"blocks.{layer}.{family}": rank for family, rank in of_block.items()}, SCALING)
        for b in model.blocks[layer].conv.lora_B.values():
            nn.init.normal_(b)
    return model.to(DEVICE)


@pytest.mark.parametrize(
    ("format_", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5), ("bf16", 1e-2), ("fp8", 1e-2)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("frozen", [False, True], ids=["warmup", "lora"])
@pytest.mark.parametrize(
    "form",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        WIDE,
        {"channels": (48, 40), "kernel_size": (3, 4), "stride": (2, 1), "padding": (0, 2), "bias": False},
    ],
    ids=["1 x 1", "1 x 1 stride 2", "3 x 3", "wide 3 x 3", "wide 3 x 4"],
)
def test_merged_convolution_against_float64(form, frozen, format_, tolerance):
    """Also in fp8, which has no convolutions, so that they are those of bf16."""
    model = model_of_convolutions(form, [{"first": 2, "rest": 3}])
    model.double() if format_ == "fp64" else model.float()
    layer = model.blocks[0].conv
    if frozen:
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    for held in use_products(model, format_, "merged"):
        held.refresh()
    assert isinstance(layer.product, FrozenLinear) == (frozen and form == {"kernel_size": 1})
    assert isinstance(layer.product, FrozenConvolution) == (frozen and "channels" in form)
    x = torch.randn(5, layer.weight.shape[1], 7, 7, device=DEVICE, dtype=layer.weight.dtype, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    y, expected = layer(x), exact(exact_x)
    dy = torch.randn_like(expected)
    y.backward(dy.to(y.dtype))
    expected.backward(dy)
    assert y.dtype == {"fp64": torch.float64, "fp32": torch.float32}.get(format_, torch.bfloat16)
    assert error(y, expected.detach()) < tolerance
    assert error(x.grad, exact_x.grad) < tolerance
    for (name, parameter), (_, reference) in zip(layer.named_parameters(), exact.named_parameters(), strict=True):
        assert (parameter.grad is None) == (frozen and "lora_" not in name)
        assert parameter.grad is None or error(parameter.grad, reference.grad) < tolerance, name


@pytest.mark.parametrize("form", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, WIDE], ids=["1 x 1", "3 x 3", "wide"])
@pytest.mark.parametrize("frozen", [False, True], ids=["warmup", "lora"])
def test_convolutions_of_different_ranks_compile_once(form, frozen):
    model = model_of_convolutions(form, [{"first": 2, "rest": 4}, {"first": 3, "rest": 3}, {"first": 2, "rest": 5}])
    for block in model.blocks:
        for parameter in (block.conv.weight, block.conv.bias):
            parameter.requires_grad_(not frozen)
    x = torch.randn(5, model.blocks[0].conv.weight.shape[1], 7, 7, device=DEVICE)
    expected = [block(x) for block in model.blocks]
    for held in use_products(model, "fp32", "merged"):
        held.refresh()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model, backend="aot_eager")
    for block, each in zip(model.blocks, expected, strict=True):
        assert error(block(x), each.detach().double()) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_frozen_convolution_spares_the_gradient_of_its_weight_and_saves_no_more():
    """By torch's count of operations, forward and backward: two convolutions and four of the adapters' width, two of
    them of 1 x 1, in place of three. Beside x it saves nothing that has pixels."""
    model = model_of_convolutions(WIDE, [{"first": 2, "rest": 4}])
    layer = model.blocks[0].conv
    x = torch.randn(5, 48, 7, 7, device=DEVICE, requires_grad=True)
    one, of_a, of_b = 2 * 5 * 49 * 48 * 9 * 40, 2 * 5 * 49 * 48 * 9 * 16, 2 * 5 * 49 * 16 * 40
    for is_frozen, expected in ((False, 3 * one), (True, 2 * one + 2 * of_a + 2 * of_b)):
        layer.weight.requires_grad_(not is_frozen)
        layer.bias.requires_grad_(not is_frozen)
        for held in use_products(model, "fp32", "merged"):
            held.refresh()
        saved: list[torch.Tensor] = []
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                y = layer(x)
            y.sum().backward()
        count = counter.get_flop_counts()["Global"]
        assert sum(n for operation, n in count.items() if "conv" in str(operation)) == expected
        assert [t.shape for t in saved if t.ndim == 4 and t.shape != layer.weight.shape] == [x.shape]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("rows", "rank"), [(64, 8), (37, 3), (1, 24), (64, 0)])
def test_fp8_product_against_float64(rows, rank, frozen):
    """e4m3 has three bits behind the point: a value is off by up to 1/16 of itself, and 2 to 3 % on average.

    Gradients of weights that train, and of the adapters that these give, see nothing of it.
    """
    t = layer(rows, 48, 80, rank, frozen=frozen)
    y = product(t, E4M3)
    y.backward(t["dy"].to(y.dtype))
    expected = by_hand(t)
    assert 0.01 < error(y, expected["y"]) < 0.05
    assert 0.01 < error(t["x"].grad, expected["x"]) < 0.06
    for name in ("a", "b") if frozen else ("weight", "bias", "a", "b"):
        if t[name].numel():
            assert t[name].grad.dtype == torch.float32
            assert error(t[name].grad, expected[name]) < (0.06 if frozen else 5e-3), name


def test_what_a_step_changes_of_weights_that_train_is_seen_after_a_refresh():
    t = layer(64, 48, 80, 8, frozen=False)
    form = trained(t)
    with torch.no_grad():
        t["weight"] *= -1
        t["b"] *= -1
    form.refresh(t["weight"], t["a"], t["b"], SCALING)
    y = form(t["x"], t["weight"], t["bias"], t["a"], t["b"], SCALING)
    y.backward(t["dy"].to(y.dtype))
    expected = by_hand(t)
    assert error(y, expected["y"]) < 0.05
    assert error(t["x"].grad, expected["x"]) < 0.06


def test_fp8_quantizes_each_row_by_its_own_largest_value():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3e4, 1.0, -1e4]])
    values, scale = quantize(x)
    assert values.is_contiguous()
    assert scale[0].item() == pytest.approx(2 / 448)
    assert values.float().abs().amax(1).tolist() == [448, 0, 448]
    assert ((values.float() * scale - x).abs() <= x.abs() / 16 + scale * 2**-10).all()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("rows", "rank"), [(64, 8), (37, 3), (1, 24)])
def test_fp8_mlp_against_float64(rows, rank, frozen):
    first, second = layer(rows, 48, 160, rank, frozen=frozen), layer(rows, 160, 80, rank + 1, frozen=frozen)
    held, adapters = [], []
    for t in (first, second):
        for name in ("weight", "b"):
            t[name].detach().div_(7)  # or GELU would see values that are almost all far from 0
        form = Fp8FrozenLinear(t["weight"], t["bias"], 32) if frozen else Fp8TrainedLinear(t["weight"])
        form.refresh(t["weight"], t["a"], t["b"], SCALING)
        held.append(form)
        adapters.append(Adapter(t["a"], t["b"], SCALING))
    if frozen:
        y = fp8_mlp(first["x"], held[0], adapters[0], held[1], adapters[1])
    else:
        y = fp8_trained_mlp(
            first["x"],
            (held[0], first["weight"], first["bias"], adapters[0]),
            (held[1], second["weight"], second["bias"], adapters[1]),
        )
    y.backward(second["dy"].to(y.dtype))
    names = ("a", "b") if frozen else ("weight", "bias", "a", "b")
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
        assert all(error(t[name].grad, exact[name][i].grad) < 0.12 for name in names)


@pytest.mark.parametrize(("rows", "columns"), [(5, 96), (64, 384), (1, 16)])
def test_gelu_between_products_against_float64(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    h, dg = (torch.randn(rows, columns + 16, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(2))
    x = h[:, :columns].double().requires_grad_()
    gelu = nn.functional.gelu(x)
    gelu.backward(dg[:, :columns].double())
    assert x.grad is not None
    values, rounded = gelu_quantize_both(h, columns)
    for found, exact in ((values, gelu), (rounded, x), (gelu_quantize(h[:, :columns]), gelu)):
        expected = quantize(exact.detach())
        assert error(found[1], expected[1].double()) < 1e-6
        assert (found[0].float() != expected[0].float()).double().mean() < 0.01  # a tie may go either way
    kept = (rounded.values.double() * rounded.scale).requires_grad_()
    gelu_of_kept = nn.functional.gelu(kept)
    gelu_of_kept.backward(dg[:, :columns].double())
    g, dh, dh_rounded = gelu_quantize_both_backward(dg, rounded)
    assert error(g, gelu_of_kept.detach()) < 2**-8
    assert error(dh, kept.grad) < 2**-8
    assert error(dh, x.grad) < 0.04
    assert error(dh_rounded.values.double() * dh_rounded.scale, x.grad) < 0.05
    g, dh, dh_rounded, total = gelu_quantize_backward(dg[:, :columns], h[:, :columns])
    assert error(g, gelu.detach()) < 2**-8
    assert error(dh, x.grad) < 2**-8
    assert error(dh_rounded.values.double() * dh_rounded.scale, x.grad) < 0.04
    assert error(total, x.grad.sum(0)) < 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(5, 96), (67, 384), (1, 16)])
def test_rows_are_rounded_and_summed_in_one_pass(rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(DEVICE, torch.bfloat16)
    rounded, total = quantize_and_sum(x)
    assert all(torch.equal(found.float(), expected.float()) for found, expected in zip(rounded, quantize(x), strict=True))
    assert error(total, x.double().sum(0)) < 1e-6


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
    [
        ("fp32", 1e-4, False),
        ("fp32", 1e-4, True),
        ("bf16", 5e-2, False),
        ("bf16", 5e-2, True),
        ("fp8", 0.5, False),
        ("fp8", 0.5, True),
    ],
    ids=["fp32 warmup", "fp32 lora", "bf16 warmup", "bf16 lora", "fp8 warmup", "fp8 lora"],
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


@pytest.mark.parametrize("adapters", [pytest.param("plain", marks=pytest.mark.slow), "merged"])
@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True], ids=["warmup", "lora"])
def test_a_model_compiles_once_for_each_size_of_images(frozen, adapters):
    """Shapes are numbers, for blocks of different ranks still in one: code for any number of tokens would be slower."""
    settings = ModelSettings(name="vit_tiny_patch16_224", image_size=8, options=TINY_VIT)
    model = create_model(settings, 10, seed=0, any_size=True)
    targets = find_targets(model)
    inject(model, targets, {target.name: [2, 4, 8, 16][(i + i // 6) % 4] for i, target in enumerate(targets)})
    if frozen:
        freeze_parameters(model, targets, "adapted")
    for held in use_products(model, "fp32", adapters):
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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fp8_trains_a_whole_model_in_phase_full(vit, images, compiled):
    """Against float64, before and after a step: what is held follows the weights."""
    holding = use_products(vit, "fp8", "merged")
    assert len(holding) == 12
    torch._dynamo.utils.counters.clear()
    if compiled:
        compile_blocks(vit, backend="aot_eager")
    vit.train()
    for _ in range(2):
        for held in holding:
            held.refresh()
        plain = plain_copy(vit)
        logits, exact = vit(images), plain(images.double())
        logits.square().sum().backward()
        exact.square().sum().backward()
        assert 1e-3 < error(logits, exact.detach()) < 0.1
        for (name, parameter), (_, reference) in zip(vit.named_parameters(), plain.named_parameters(), strict=True):
            assert error(parameter.grad, reference.grad) < 0.25, name
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter -= 0.1 * parameter.grad / parameter.grad.norm() * parameter.norm()
                parameter.grad = None
    shapes = {held.weight.shape for held in holding}  # each is packed by code of its own, and all blocks are one
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (len(shapes) + 1 if compiled else 0)


def plain_copy(vit: nn.Module) -> nn.Module:
    """The model that one in fp8 stands for, in float64."""
    plain = timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, **TINY_VIT)
    plain.load_state_dict(vit.state_dict())
    return plain.double()


def test_fp8_and_back_leaves_the_models_own_modules_and_tensors(vit):
    targets = find_targets(vit)
    inject(vit, targets, {"blocks.1.mlp.fc1": 4})
    freeze_parameters(vit, targets, "prefix")
    own, tensors, parameters = dict(vit.named_modules()), copy.deepcopy(vit.state_dict()), dict(vit.named_parameters())
    for format_, trains in (("fp8", False), ("fp8", False), ("fp32", False), ("fp8", True), ("fp32", True)):
        vit.requires_grad_(trains)
        holding = use_products(vit, format_, "plain")
        standing_in = {name for name, module in vit.named_modules() if name in own and module is not own[name]}
        linears = {f"blocks.{layer}.{path}" for layer in range(3) for path in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        linears = linears - {"blocks.1.mlp.fc1"} | {f"blocks.{layer}.mlp" for layer in range(3)}
        assert len(holding) == (0 if format_ != "fp8" else 12 if trains else 1)
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
    assert len(forms) == len({target.stored_in for target in targets})
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
