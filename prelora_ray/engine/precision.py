"""Which number format a phase computes in, and what that means for the model."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from prelora_ray.engine.fp8 import Fp8Linear, Fp8Mlp, StandIn
from prelora_ray.engine.model import gelu_mlps
from prelora_ray.errors import UserError
from prelora_ray.kernels.fp8 import MULTIPLE, Fp8FrozenLinear
from prelora_ray.kernels.fp8_trained import Fp8TrainedLinear
from prelora_ray.kernels.merged import FrozenConvolution, FrozenLinear, HeldProduct, merged_product
from prelora_ray.method.adapters import LoraConv2d, LoraLayer, LoraLinear, Product, lora_layers
from prelora_ray.method.architecture import stages_of
from prelora_ray.method.phases import Phase

Format = Literal["fp64", "fp32", "bf16", "fp8"]
_FP8_CAPABILITY = (8, 9)
"""The first NVIDIA GPUs with products of e4m3: Ada; Hopper is (9, 0)."""


def phase_format(precision: Literal["auto"] | Format, fp8_from: Phase, phase: Phase, device: torch.device) -> Format:
    """The format of a phase's products; `fp8` is that from phase `fp8_from` on, and bf16 in front of it."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    phases = list(Phase)
    if precision == "fp8" and phases.index(phase) < phases.index(fp8_from):
        return "bf16"
    return precision


def has_fp8(device: torch.device) -> bool:
    """Whether the device has products of e4m3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def check_precision(precision: Literal["auto"] | Format, device: torch.device, key: str = "train.precision") -> None:
    """Raises UserError where the device has not what the setting asks for. `key`: what it is called."""
    if precision == "fp8" and not has_fp8(device):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UserError(
            f"{key} = 'fp8' is not allowed on {found}: it needs an NVIDIA GPU of the Ada or Hopper generation or "
            "later; use bf16"
        )


def autocast(format_: Format, device: torch.device) -> AbstractContextManager[Any]:
    """The context that the model is called in."""
    return torch.autocast(device.type, torch.bfloat16) if format_ in ("bf16", "fp8") else nullcontext()


def use_products(model: nn.Module, format_: Format, adapters: Literal["plain", "merged"]) -> list[LoraLayer | Fp8Linear]:
    """Has the layers of the blocks computed as the settings say.

    Returns those that want a `refresh` before each forward.
    """
    stand_back(model)
    layers = list(lora_layers(model).values())
    widths: dict[torch.Size, int] = {}
    for layer in layers:
        width = math.ceil(layer.rank / MULTIPLE) * MULTIPLE
        widths[layer.matrix.shape] = max(width, widths.get(layer.matrix.shape, 0))
    for layer in layers:
        layer.product = _product(layer, format_, adapters, widths[layer.matrix.shape])
    if format_ == "fp8":
        for stage in stages_of(model):
            _stand_in(stage)
    adapted = [layer for layer in layers if isinstance(layer.product, HeldProduct)]
    return adapted + [layer for layer in model.modules() if isinstance(layer, Fp8Linear) and layer.weight.requires_grad]


def _stand_in(blocks: nn.Module) -> None:
    """Puts modules of e4m3 in place of layers without adapters, and of MLPs whose layers are both e4m3 and alike."""
    for name, layer in list(blocks.named_modules()):
        if type(layer) is nn.Linear and _fits_fp8(layer):
            blocks.set_submodule(name, Fp8Linear(layer))
    for name, mlp in gelu_mlps(blocks).items():
        if {type(getattr(layer, "product", None)) for layer in (mlp.fc1, mlp.fc2)} in ({Fp8FrozenLinear}, {Fp8TrainedLinear}):
            blocks.set_submodule(name, Fp8Mlp(mlp))


def stand_back(model: nn.Module) -> None:
    """Gives the model its own modules back."""
    for stage in stages_of(model):
        for name, module in list(stage.named_modules()):
            if isinstance(module, StandIn):
                stage.set_submodule(name, module.plain())


def _fits_fp8(layer: nn.Linear | LoraLinear) -> bool:
    return all(side % MULTIPLE == 0 for side in layer.weight.shape)


def _product(layer: LoraLayer, format_: Format, adapters: Literal["plain", "merged"], width: int) -> Product | None:
    if adapters == "plain" and format_ != "fp8":
        return None
    dtype = {"fp64": torch.float64, "fp32": torch.float32}.get(format_, torch.bfloat16)
    trains = layer.weight.requires_grad
    if format_ == "fp8" and isinstance(layer, LoraLinear) and _fits_fp8(layer):
        return Fp8TrainedLinear(layer.weight) if trains else Fp8FrozenLinear(layer.weight, layer.bias, width)
    if isinstance(layer, LoraConv2d) and not layer.is_linear:
        if trains or isinstance(layer.padding, str) or not FrozenConvolution.saves(layer.weight, width):
            return partial(merged_product, dtype=dtype, compute=layer.compute)
        return FrozenConvolution(layer.weight, layer.bias, width, dtype, layer.stride, layer.padding)
    return partial(merged_product, dtype=dtype) if trains else FrozenLinear(layer.matrix, layer.bias, width, dtype)


def keep_residual_in_bf16(model: nn.Module) -> None:
    """Has the blocks of a timm model hand their residual stream on in bfloat16, wherever autocast is on.

    Norms still compute in float32. A step reads and writes the stream several times, so half its bytes are time.
    """
    for stage in stages_of(model):
        entry = stage if isinstance(stage, nn.Sequential) else stage[0]  # a list is never called
        entry.register_forward_pre_hook(lambda _, inputs: (_narrow(inputs[0]), *inputs[1:]))
        for block in stage:  # a layer scale, float32, would widen it again
            block.register_forward_hook(lambda _, __, output: _narrow(output))


def _narrow(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16) if torch.is_autocast_enabled(x.device.type) else x
