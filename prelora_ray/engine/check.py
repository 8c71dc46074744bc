"""Tries what a run will do to its model before Ray starts, on tensors with shapes and number formats but no values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import fake_tensor

from prelora_ray.config import ModelSettings, Settings
from prelora_ray.engine.batch_norm import cell_norms
from prelora_ray.engine.drop_path import drop_path_modules, set_drop_path, use_form
from prelora_ray.engine.model import create_model, example_inputs
from prelora_ray.engine.optim import build_optimizer
from prelora_ray.engine.precision import Format, autocast, keep_residual_in_bf16, phase_format, use_products
from prelora_ray.errors import UserError, one_line
from prelora_ray.method.adapters import inject, peft_config, peft_state_dict
from prelora_ray.method.architecture import Target, find_targets
from prelora_ray.method.phases import Phase, freeze_parameters
from prelora_ray.schedule import largest_ranks

_SAMPLES, _CLASSES = 2, 10


def check_model(settings: Settings) -> list[Target]:
    """Takes the model through every phase of a run, and returns its target modules.

    Raises UserError where the model, its targets or the ranks do not fit each other; where it makes other things of
    images than a row of logits each, or takes none of a size that the run has; where a phase cannot train it; and where
    a target's layer is used by its weight alone, so that an adapter on it would have no effect.
    """
    method = settings.method
    # Kernels of e4m3 take no tensors without values, so fp8 is tried as the bf16 in front of it.
    format_ = phase_format(settings.train.precision, fp8_from=Phase.LORA, phase=Phase.FULL, device=torch.device("cuda"))
    with torch.device("meta"):
        model = create_model(settings.model, _CLASSES, seed=0, any_size=bool(settings.train.resolution))
    if settings.data.cell == 1 and cell_norms(model):
        raise UserError(
            f"data.cell = 1 is not allowed with model.name = {settings.model.name!r}: it has batch norm, whose statistics are "
            "those of a cell's images, so it must be larger"
        )
    model.to(torch.float64 if format_ == "fp64" else torch.float32)
    try:
        targets = find_targets(model, method.targets)
    except ValueError as error:
        raise UserError(f"model.name = {settings.model.name!r} is not allowed: {error}") from None
    ranks = largest_ranks(method, targets)
    with _without_values():
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # on a CPU: autocast needs a device
        if settings.model.takes_text:
            model.tie_weights()  # type: ignore[operator]  # they came apart
        if settings.train.residual == "bf16":
            keep_residual_in_bf16(model)
        use_form(model, settings.model.drop_path_form, settings.data.cell)
        called = _calls(model, targets)
        _try_phase(model, settings, format_, Phase.FULL)
        for step in settings.train.resolution:
            _try_size(model, settings, format_, step.image_size)
        if by_weight := [target for target in targets if target.stored_in not in called]:
            families = ", ".join(dict.fromkeys(target.family for target in by_weight))
            raise UserError(
                f"model.name = {settings.model.name!r} is not allowed: it uses {by_weight[0].stored_in} by its weight alone, "
                f"so no adapter can be put on it; leave {families} out of method.targets"
            )
        if method.enabled:
            inject(model, targets, ranks, method.scaling)
            _try_phase(model, settings, format_, Phase.WARMUP)
            try:
                freeze_parameters(model, targets, method.freeze)
            except ValueError as error:
                raise UserError(f"method.freeze = {method.freeze!r} is not allowed: {error}") from None
            _try_phase(model, settings, format_, Phase.LORA)
    return targets


def drop_path_form(settings: ModelSettings, cell: int) -> tuple[Literal["mask", "subset"], str | None]:
    """What `model.drop_path_form` comes to in cells of so many samples; of `auto` that comes to a mask, why.

    Raises UserError as a run does.
    """
    if settings.drop_path == 0 or settings.drop_path_form == "mask":
        return "mask", None
    with torch.device("meta"):
        model = create_model(settings, _CLASSES, seed=0)
    why_not = use_form(model, settings.drop_path_form, cell)
    return "subset" if why_not is None else "mask", why_not


@contextmanager
def _without_values() -> Iterator[None]:
    """Tensors inside have no values; what an operation that cannot be says is in its error, and not in the log too."""
    log = logging.getLogger(fake_tensor.__name__)
    was_disabled, log.disabled = log.disabled, True
    try:
        with fake_tensor.FakeTensorMode():
            yield
    finally:
        log.disabled = was_disabled


def _calls(model: nn.Module, targets: list[Target]) -> set[str]:
    """Names of the targets' layers, each of which comes in once it is called."""
    called: set[str] = set()
    for name in {target.stored_in for target in targets}:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    return called


def _try_phase(model: nn.Module, settings: Settings, format_: Format, phase: Phase) -> None:
    """What a phase does to a model: a step, an evaluation, a checkpoint."""
    asked = settings.model
    size = "" if asked.takes_text else f"image_size {asked.image_size} and "
    told = f"model.name = {asked.name!r} is not allowed with {size}options {asked.options}"
    try:
        for layer in use_products(model, format_, settings.train.adapters):
            layer.refresh()
        branches = drop_path_modules(model)
        set_drop_path(branches, torch.ones(len(branches), _SAMPLES))
        inputs = example_inputs(asked, model, _SAMPLES, next(model.parameters()).dtype)
        expected = (*inputs.shape, _CLASSES) if asked.takes_text else (_SAMPLES, _CLASSES)
        with autocast(format_, inputs.device):
            outputs = [model.train()(inputs), model.eval()(inputs)]
        if all(_is_shaped(output, expected) for output in outputs):
            logits = outputs[0].double().flatten(0, -2)
            F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
            build_optimizer(model, settings)
            if phase is not Phase.FULL:
                peft_config(model)
                peft_state_dict(model)
    except Exception as error:  # whatever a model that was made for other things raises
        raise UserError(f"{told}: phase {phase} fails with {type(error).__name__}: {one_line(error)}") from error
    for output in outputs:
        if not _is_shaped(output, expected):
            raise UserError(
                f"{told}: of {_SAMPLES} {settings.sample}s it must make {expected} logits for {_CLASSES} classes, and makes "
                f"{tuple(output.shape) if isinstance(output, torch.Tensor) else f'a {type(output).__name__}'}"
            )
    idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if idle and settings.workers.max > 1:  # DDP waits for each gradient
        raise UserError(f"{told} on several workers: no logit depends on its {idle[0]}")
    model.zero_grad()


def _try_size(model: nn.Module, settings: Settings, format_: Format, image_size: int) -> None:
    """Training images of a size that is not the model's own."""
    resized = settings.model.model_copy(update={"image_size": image_size})
    images = example_inputs(resized, model, _SAMPLES, next(model.parameters()).dtype)
    told = f"train.resolution.image_size = {image_size} is not allowed with model.name = {settings.model.name!r}"
    try:
        with autocast(format_, images.device):
            outputs = model.train()(images)
    except Exception as error:  # whatever a model that was made for one size raises
        raise UserError(f"{told}: {type(error).__name__}: {one_line(error)}") from error
    if not _is_shaped(outputs, (_SAMPLES, _CLASSES)):
        raise UserError(f"{told}: of such images it makes no row of logits each")


def _is_shaped(output: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(output, torch.Tensor) and output.shape == shape
