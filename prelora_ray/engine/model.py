"""The model of a run, timm's or BERT: made, and freed of what would depend on workers or restarts."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from prelora_ray.config import ModelSettings
from prelora_ray.engine.batch_norm import use_cells
from prelora_ray.engine.drop_path import KeyedDropPath, drop_uniformly
from prelora_ray.errors import UserError, one_line
from prelora_ray.extras import check_installed
from prelora_ray.kernels.merged import HeldProduct
from prelora_ray.method.adapters import lora_layers
from prelora_ray.method.architecture import blocks_of
from prelora_ray.torchvision_ops import make_importable

make_importable()

import timm  # noqa: E402
from timm.layers import DropPath, Mlp, PatchDropout  # noqa: E402

_ANY_SIZE = "dynamic_img_size"
"""timm's option for models that interpolate their positions."""


def create_model(settings: ModelSettings, num_classes: int, seed: int, *, any_size: bool = False) -> nn.Module:
    """A model with freshly drawn weights, float32, on the CPU: timm's, or transformers' BERT.

    With `any_size` it takes images of other sizes too, for which timm interpolates the positions in each forward, in
    float32. Its parameters are the same, and so are the logits of images of `image_size`. A model that timm makes
    without a size of images is the same either way.

    Raises UserError where timm or transformers knows no such model or refuses an option, and where the model would
    draw from a generator in training, as dropout does: stochastic depth is the regulariser that can
    be keyed by sample; and where it has batch norm over other things than images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            sizes = {_ANY_SIZE: True} if any_size else {}
            if settings.takes_text:
                model = text_model(settings, num_classes)
            else:
                model = timm_model(settings, num_classes, drop_path_rate=settings.drop_path, **sizes)
        except UserError:
            raise
        except Exception as error:  # timm raises RuntimeError, TypeError, AssertionError and more
            if any_size and _ANY_SIZE in str(error):
                raise UserError(
                    f"train.resolution is not allowed with model.name = {settings.name!r}, which timm makes for images of one "
                    f"size alone: {type(error).__name__}: {one_line(error)}"
                ) from error
            if settings.takes_text:
                raise UserError(f"model.options = {settings.options} is not allowed: {one_line(error)}") from error
            raise UserError(
                f"model.name = {settings.name!r} is not allowed with image_size {settings.image_size} and options "
                f"{settings.options}: timm says {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    for name, module in list(model.named_modules()):
        if isinstance(module, DropPath):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, KeyedDropPath(module.drop_prob))
        elif isinstance(module, PatchDropout) or (isinstance(module, nn.Dropout) and module.p > 0):
            instead = "leave it out" if settings.takes_text else "use model.drop_path instead"
            raise UserError(
                f"model.options of {settings.name!r} turn on dropout in {name}, which no restart could repeat: {instead}"
            )
    try:
        use_cells(model)
    except ValueError as error:
        raise UserError(f"model.name = {settings.name!r} is not allowed: {error}") from None
    if settings.drop_path_rule == "uniform" and settings.drop_path > 0:
        try:
            drop_uniformly(model, settings.drop_path)
        except ValueError as error:
            raise UserError(f"model.drop_path_rule = 'uniform' is not allowed: {error}") from None
    return model


def text_model(settings: ModelSettings, vocabulary: int) -> nn.Module:
    """transformers' own model, freshly drawn. Raises UserError where transformers is not installed, and ValueError for
    options that it refuses."""
    check_installed(f"model.name = {settings.name!r}", "text", "transformers")
    from prelora_ray.engine.text_model import bert  # an extra, which takes seconds to import

    return bert(copy.deepcopy(settings.options), vocabulary)


def timm_model(settings: ModelSettings, num_classes: int, **options: Any) -> nn.Module:
    """timm's own model, freshly drawn, with nothing of ours in it; `options` are timm's, beside those of the settings.

    Raises what timm does.
    """
    own = copy.deepcopy(settings.options)
    make = functools.partial(timm.create_model, settings.name, pretrained=False, num_classes=num_classes)
    try:
        model: nn.Module = make(img_size=settings.image_size, **own | options)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        model = make(**own | {key: value for key, value in options.items() if key != _ANY_SIZE})  # it asks for no size
    return model


def example_inputs(
    settings: ModelSettings, model: nn.Module, n: int, dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """What a model takes, on the CPU: n images, or n sequences of tokens of the model's full length.

    They are zeros; with `generator` they are drawn, from a normal distribution or from the whole vocabulary.
    """
    if settings.takes_text:
        config: Any = model.config
        shape = n, config.max_position_embeddings
        if generator is None:
            return torch.zeros(shape, dtype=torch.long)
        return torch.randint(config.vocab_size, shape, generator=generator)
    if generator is None:
        return torch.zeros(n, *settings.input_shape, dtype=dtype)
    return torch.randn(n, *settings.input_shape, generator=generator).to(dtype)


def check_length(model: nn.Module, data: str, sequence_length: int) -> None:
    """Raises UserError where sequences of the prepared folder `data` are longer than a text model takes them."""
    config: Any = model.config
    if sequence_length > config.max_position_embeddings:
        raise UserError(
            f"model.options.max_position_embeddings = {config.max_position_embeddings} is not allowed: sequences in {data!r} "
            f"have {sequence_length} tokens"
        )


def compile_blocks(model: nn.Module, backend: str = "inductor", *, any_size: bool = False) -> None:
    """Sends every block through torch.compile.

    Blocks share their compiled code, so that compiling costs seconds instead of a minute at each start and change of
    phase. Ranks differ from block to block: as sizes that may vary, two of which may be equal in one block and not in
    the next, they need no code of their own. With `any_size` the images' size changes as the run goes on: each gets
    code of its own at its first step, as code for all of them would be slower.
    """
    torch._dynamo.reset()
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # it would cut blocks in two; gradients of whole blocks are early enough
    if any(isinstance(module, HeldProduct) for module in model.modules()):
        from prelora_ray.kernels.compiler import suit_held_products  # the compiler takes a second to import

        suit_held_products()
    # With sizes that are numbers the compiler would not find out by itself which of them vary.
    varying = [layer for layer in lora_layers(model).values() if any_size or layer.product is not None]
    torch.fx.experimental._config.use_duck_shape = not varying
    for layer in varying:
        for family in layer.rows:
            torch._dynamo.maybe_mark_dynamic(layer.lora_A[family], 0)
            torch._dynamo.maybe_mark_dynamic(layer.lora_B[family], 1)
    for module in model.modules():
        if isinstance(getattr(module, "product", None), HeldProduct):
            # By shape: with sizes that vary a compiler would not know that it can hold a row.
            module.refresh = torch.compile(module.refresh, dynamic=False, backend=backend)  # type: ignore[assignment, arg-type]
    for block in blocks_of(model):
        block.compile(backend=backend, dynamic=False if any_size else None)


def gelu_mlps(model: nn.Module) -> dict[str, Mlp]:
    """By name, the MLPs that are two layers, `fc1` and `fc2`, with exact GELU and nothing else between them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Mlp)
        and isinstance(module.act, nn.GELU)
        and module.act.approximate == "none"
        and isinstance(module.norm, nn.Identity)
    }
