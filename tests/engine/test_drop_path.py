"""Stochastic depth as masks and as subsets: what each sample meets, sample by sample in float64, and what is drawn."""

from __future__ import annotations

import copy
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from prelora_ray.config import DropPathForm, ModelSettings
from prelora_ray.engine.drop_path import (
    KeyedDropPath,
    SubsetDropPath,
    compute_subsets,
    draw_drop_path,
    drop_path_modules,
    kept_counts,
    set_drop_path,
    use_form,
)
from prelora_ray.engine.model import compile_blocks, create_model
from prelora_ray.engine.precision import autocast, use_products
from prelora_ray.errors import UserError
from prelora_ray.method.adapters import inject
from prelora_ray.method.architecture import find_targets
from prelora_ray.method.phases import freeze_parameters
from tests.runs import TINY_VIT

SAMPLES, CELL = 16, 8


def model_of(rate: float, rule: str = "linear", cell: int | None = None, **options) -> nn.Module:
    """In training; with masks, or in cells of so many samples with subsets."""
    settings = ModelSettings(
        name="vit_tiny_patch16_224",
        image_size=8,
        options={**TINY_VIT, **options},
        drop_path=rate,
        drop_path_rule=rule,
    )
    model = create_model(settings, num_classes=10, seed=0).train()
    if cell is not None:
        compute_subsets(model, cell)
    return model


def forms(model: nn.Module, form: DropPathForm, cell: int) -> set[type]:
    """What drop paths are once a form was asked for."""
    use_form(model, form, cell)
    return {type(module) for module in drop_path_modules(model)}


def test_auto_is_a_subset_where_model_and_cell_allow_it():
    assert forms(model_of(0.5), "auto", CELL) == {SubsetDropPath}
    assert forms(model_of(0.5), "mask", CELL) == {KeyedDropPath}
    assert forms(model_of(0.5), "auto", cell=1) == {KeyedDropPath}  # which leaves out none
    shared = ModelSettings(name="cait_xxs24_224", image_size=8, options={**TINY_VIT, "depth_token_only": 1}, drop_path=0.5)
    assert forms(create_model(shared, num_classes=10, seed=0), "auto", CELL) == {KeyedDropPath}
    with pytest.raises(UserError, match="a LayerScaleBlock is made of"):
        use_form(create_model(shared, num_classes=10, seed=0), "subset", CELL)


def images(samples: int = SAMPLES) -> torch.Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def scales_of(model: nn.Module, cell: int = CELL, samples: int = SAMPLES, batch: int = 0) -> torch.Tensor:
    return draw_drop_path(drop_path_modules(model), 1, 0, batch, range(samples // cell), cell, samples).float()


def one_by_one(model: nn.Module, pixels: torch.Tensor, scales: list[torch.Tensor]) -> torch.Tensor:
    """Logits of a model without drop path, each sample by itself; a branch with scale 0 is not called.

    `scales`: of every branch, in order, those of the samples.
    """
    logits = []
    for i, image in enumerate(pixels):
        x = model._pos_embed(model.patch_embed(image[None]))
        factors = iter([scale[i] for scale in scales])
        for block in model.blocks:
            if factor := next(factors):
                x = x + factor * block.ls1(block.attn(block.norm1(x)))
            if factor := next(factors):
                x = x + factor * block.ls2(block.mlp(block.norm2(x)))
        logits.append(model.forward_head(model.norm(x)))
    return torch.cat(logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rule", ["linear", "uniform"])
def test_gradients_of_subsets_against_float64_sample_by_sample(rule, dtype, tolerance):
    model = model_of(0.5, rule, CELL, init_values=0.5).to(dtype)
    reference = model_of(0.0, init_values=0.5).double()
    reference.load_state_dict(model.state_dict())
    scales = scales_of(model)
    assert ((scales == 0).sum(1) >= 4).all()

    pixels = images()
    set_drop_path(drop_path_modules(model), scales)
    logits = model(pixels.to(dtype))
    whole = [torch.ones(SAMPLES)] * (6 - len(scales))  # the first block's, where it leaves out nothing
    expected = one_by_one(reference, pixels.double(), [*whole, *scales.double()])
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).double()
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = gradients[name].grad
        error = (parameter.grad.double() - gradient).norm() / gradient.norm()
        assert error < tolerance, name


def test_a_branch_computes_only_what_is_kept():
    model = model_of(0.5, "uniform", CELL)
    seen: list[int] = []
    for block in model.blocks:
        for module in (block.norm1, block.attn.proj, block.mlp):
            module.register_forward_hook(lambda *arguments: seen.append(len(arguments[2])))
    set_drop_path(drop_path_modules(model), scales_of(model))
    model(images())
    assert seen == [SAMPLES // 2] * 9


@pytest.mark.parametrize("branch", [0, 1])
def test_the_expectation_of_subsets_is_the_plain_block(branch):
    """Over 1,000 draws, within five standard errors in every number."""
    block = model_of(0.25, "uniform", CELL, depth=1).double().blocks[0]
    module = drop_path_modules(block)[branch]
    x = torch.randn(CELL, 17, 16, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        plain = block(x)
        outputs = []
        for batch in range(1000):
            set_drop_path([module], draw_drop_path([module], 1, 0, batch, [0], CELL, CELL))
            outputs.append(block(x))
    many = torch.stack(outputs)
    spread = many.std(0)
    assert (spread > 0).all()
    assert ((many.mean(0) - plain).abs() < 5 * spread / 1000**0.5).all()


def test_masks_against_a_branch_left_out():
    model = model_of(0.5)
    modules = drop_path_modules(model)
    assert [module.drop_prob for module in modules] == [0.25, 0.25, 0.5, 0.5]  # the first block has none
    pixels = images(2)
    set_drop_path(modules, torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))
    both = model(pixels)
    set_drop_path(modules, None)
    whole = model(pixels)
    model.blocks[2] = torch.nn.Identity()
    without = model(pixels)
    torch.testing.assert_close(both[0], whole[0])
    torch.testing.assert_close(both[1], without[1])


def test_masks_belong_to_cells():
    modules = drop_path_modules(model_of(0.5))
    whole = draw_drop_path(modules, 1, 2, 3, range(6), 4, 24)
    part = draw_drop_path(modules, 1, 2, 3, [4, 5], 4, 12)
    assert torch.equal(part[:, :8], whole[:, 16:])
    assert torch.equal(part[:, 8:], torch.ones(4, 4).double())
    many = torch.cat([draw_drop_path(modules, 1, 2, batch, range(6), 4, 24) for batch in range(200)], dim=1)
    assert np.allclose(many.mean(1), 1, atol=0.06)  # scaled by 1 / keep
    assert set(many[2].tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_subsets_belong_to_cells_whoever_serves_them(workers):
    modules = drop_path_modules(model_of(0.5, cell=4))
    assert [module.count for module in modules] == [3, 3, 2, 2]
    whole = draw_drop_path(modules, 1, 2, 3, range(7), 4, 28)
    parts = []
    for rank in range(workers):
        cells = range(rank * 7 // workers, (rank + 1) * 7 // workers)
        part = draw_drop_path(modules, 1, 2, 3, cells, 4, -(-7 // workers) * 4)
        assert ((part.view(4, -1, 4) > 0).sum(2) == torch.tensor([[3], [3], [2], [2]])).all()  # without a cell too
        parts.append(part[:, : len(cells) * 4])
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert len({tuple(row) for row in whole.view(28, 4).tolist()}) > 8  # of 4 + 4 + 6 + 6


def test_every_sample_is_left_out_as_often():
    modules = drop_path_modules(model_of(0.5, cell=4))
    many = torch.stack([draw_drop_path(modules, 1, 2, batch, [0], 4, 4) for batch in range(1000)])
    often = (many > 0).double().mean(0)
    assert np.allclose(often, np.array([[0.75], [0.75], [0.5], [0.5]]), atol=0.08)  # five standard errors
    assert torch.allclose(many.sum(2), torch.tensor(4.0).double())  # scaled by the cell over its count


@pytest.mark.parametrize("cell", [2, 5, 12, 16, 17, 64])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.4, 0.5])
def test_counts_are_few_and_right_in_the_mean(cell, rate):
    for rates in ([rate] * 24, np.linspace(0, rate, 24).tolist()):
        counts = kept_counts(rates, cell)
        part = max(1, cell // 8)
        assert abs(sum(counts) - sum(cell * (1 - p) for p in rates)) <= max(part / 2, 1)
        assert all(abs(count - cell * (1 - p)) < 2 * part for count, p in zip(counts, rates, strict=True))
        assert len(set(counts)) <= 8 and min(counts) >= 1 and max(counts) <= cell
    assert statistics.mean(kept_counts([0.4] * 5, 16)) == 9.6


@pytest.mark.parametrize(("rate", "cell", "least"), [(0.1, 1, "at least 1, so it must be at most 0"), (0.9, 16, "2, .* 0.875")])
def test_a_cell_that_is_too_small_is_refused(rate, cell, least):
    with pytest.raises(UserError, match=rf"model\.drop_path = {rate} is not allowed .*data\.cell = {cell}.* {least}"):
        model_of(rate, cell=cell)


def test_a_share_that_is_too_small_for_a_cell_is_refused():
    with pytest.raises(UserError, match=r"model\.drop_path = 0\.01 is not allowed .*cell = 8: no block would leave out any"):
        model_of(0.01, cell=8)


def test_blocks_that_leave_out_nothing_and_evaluation_are_untouched():
    model = model_of(0.1, cell=CELL, depth=4)
    counts = kept_counts([0.1 / 3, 0.2 / 3, 0.1], CELL)
    assert counts == [8, 7, 7]
    changed = [any(isinstance(module, SubsetDropPath) for module in block.modules()) for block in model.blocks]
    assert changed == [False, False, True, True]
    assert [len(block.norm1._forward_pre_hooks) for block in model.blocks] == [0, 0, 1, 1]
    plain = model_of(0.0, depth=4)
    assert list(model.state_dict()) == list(plain.state_dict())
    set_drop_path(drop_path_modules(model), scales_of(model))
    assert torch.equal(model.eval()(images()), plain.eval()(images()))
    set_drop_path(drop_path_modules(model), None)
    assert torch.equal(model.train()(images(3)), plain.train()(images(3)))


@pytest.mark.parametrize(("rule", "graphs"), [("uniform", 1), ("linear", 2)])
@pytest.mark.parametrize("any_size", [False, True], ids=["", "images that grow"])
def test_subsets_of_all_sizes_share_compiled_code(rule, graphs, any_size):
    """But for blocks that leave out nothing."""
    model = model_of(0.6, rule, CELL, depth=8)
    modules = drop_path_modules(model)
    assert len({module.count for module in modules}) > (1 if rule == "uniform" else 3)
    compile_blocks(model, backend="aot_eager", any_size=any_size)
    counters = torch._dynamo.utils.counters
    counters.clear()
    results = []
    for batch in range(2):
        set_drop_path(modules, scales_of(model, batch=batch))
        logits = model(images())
        model.zero_grad()
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad.clone() for parameter in model.parameters())])
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    model.zero_grad()
    with torch.compiler.set_stance("force_eager"):
        logits = model(images())
        logits.square().sum().backward()
    for compiled, eager in zip(results[-1], [logits, *(parameter.grad for parameter in model.parameters())], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("format_", "tolerance"), [("fp32", 1e-5), ("fp8", 0.02)])
def test_subsets_and_masks_of_equal_scales_agree_where_the_base_is_frozen(format_, tolerance):
    """Norm-wise, for logits and adapters' gradients."""
    subset, mask = (model_of(0.5, "uniform", cell, embed_dim=32, init_values=1.0) for cell in (CELL, None))
    scales = scales_of(subset)
    results = []
    for model in (subset, mask):
        targets = find_targets(model)
        inject(model, targets, {target.name: 4 for target in targets})
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=generator)
        freeze_parameters(model, targets, "adapted")
        for layer in use_products(model, format_, "merged"):
            layer.refresh()
        set_drop_path(drop_path_modules(model), scales)
        with autocast(format_, torch.device("cpu")):
            logits = model(images())
        logits.double().square().sum().backward()
        results.append({"logits": logits} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours, theirs = results
    assert len(ours) > 20 and ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() < tolerance * value.norm(), name


def test_a_copy_of_a_model_has_subsets_of_its_own():
    model = model_of(0.5, cell=CELL)
    other = copy.deepcopy(model)
    set_drop_path(drop_path_modules(model), scales_of(model))
    assert other(images(3)).shape == (3, 10)
