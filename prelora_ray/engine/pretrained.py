"""Weights that a run starts from: a timm checkpoint, on a disk or in a bucket."""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from prelora_ray.errors import UserError, one_line
from prelora_ray.method.architecture import head_parameters
from prelora_ray.storage import Storage
from prelora_ray.torchvision_ops import make_importable
from prelora_ray.words import counted

make_importable()

from timm.models import adapt_input_conv, load_state_dict  # noqa: E402
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn  # noqa: E402


def load_pretrained(model: nn.Module, tensors: dict[str, torch.Tensor], path: str) -> list[str]:
    """Loads a timm model's tensors, which come from `path`, into `model`, in place.

    Position embeddings and patches of another size are resampled, as timm does, and patches of RGB become
    those of grey, or the other way round. A head of another size stays as it was drawn. Returns a sentence
    for each thing that is not simply loaded: other channels, a head that was replaced, missing tensors,
    unexpected ones.

    Raises UserError where none of the tensors fits, or one other than the head's has another shape.
    """
    own, tensors = model.state_dict(), {_named_anew(name): tensor for name, tensor in tensors.items()}
    head = head_parameters(model)
    if isinstance(model, VisionTransformer):
        try:
            tensors = checkpoint_filter_fn(tensors, model)
        except (RuntimeError, ValueError, KeyError, AssertionError) as error:
            raise UserError(f"model.init_from = {path!r} does not fit the model: {one_line(error)}") from error
    told = []
    if sentence := _adapt_channels(tensors, own, f"{getattr(model, 'pretrained_cfg', {}).get('first_conv')}.weight"):
        told.append(sentence)
    other_shape = [name for name in tensors if name in own and tensors[name].shape != own[name].shape]
    if replaced := [name for name in other_shape if name in head]:
        classes = tuple(len(of[replaced[0]]) for of in (tensors, own))
        told.append(f"its head has {counted(classes[0], 'class', 'classes')} and this run {classes[1]}: the head starts anew")
    for name in other_shape:
        if name not in replaced:
            shapes = [tuple(of[name].shape) for of in (tensors, own)]
            raise UserError(
                f"model.init_from = {path!r} does not fit the model: {name} is {shapes[0]} there and {shapes[1]} here"
            )
    fitting = {name: tensor for name, tensor in tensors.items() if name in own and name not in replaced}
    if not fitting:
        raise UserError(f"model.init_from = {path!r} does not fit the model: it has none of its tensors")
    model.load_state_dict(fitting, strict=False)
    told += [
        f"{counted(len(names), 'tensor')} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (
            ("of the model not in it, begun anew", sorted(own.keys() - tensors.keys() - _shared(own, fitting))),
            ("in it not the model's, left out", sorted(tensors.keys() - own.keys())),
        )
        if names
    ]
    return [f"{path}: {sentence}" for sentence in told]


def _named_anew(name: str) -> str:
    """What transformers calls a tensor of its first BERTs, whose files still have other names."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _shared(own: dict[str, torch.Tensor], loaded: Iterable[str]) -> set[str]:
    """Names of the model's tensors that are the same as loaded ones, such as a head's that are the embeddings'."""
    known = {own[name].data_ptr() for name in loaded}
    return {name for name, tensor in own.items() if tensor.data_ptr() in known}


def _adapt_channels(tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor], name: str) -> str | None:
    """Makes the weights `name` (width, channels, height and width of a patch) RGB's or grey's, as the model's own are.

    A grey image, normalised alike, then means the same to both. Returns a sentence where they were not so before.
    """
    if name not in tensors or name not in own or tensors[name].ndim != 4:
        return None
    theirs, ours = tensors[name].shape[1], own[name].shape[1]
    if {theirs, ours} != {1, 3}:
        return None
    tensors[name] = adapt_input_conv(ours, tensors[name], base_chans=theirs)
    how = "summed" if ours == 1 else "spread"
    return f"its images have {counted(theirs, 'channel')} and this run's {ours}: {name} is {how} over red, green and blue"


def read_pretrained(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a timm checkpoint, ``.safetensors`` or torch's own format, in which no object is unpickled.

    Raises UserError where there is no such file, or it is no checkpoint.
    """
    folder, name = posixpath.split(path)
    storage = Storage(folder or ".")
    if not storage.exists(name) or name in storage.list_folders():
        raise UserError(
            f"model.init_from = {path!r} is no file: give a timm checkpoint, such as model.safetensors, a run or an export"
        )
    with tempfile.TemporaryDirectory() as directory:
        local = Path(storage.file(name))
        if not storage.is_local:
            local = Path(directory, name)
            local.write_bytes(storage.read_bytes(name))
        try:
            tensors = load_state_dict(str(local), weights_only=True)
            if all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
                return dict(tensors)
        except Exception as error:  # whatever a damaged or foreign file makes a reader raise
            reason = f"{type(error).__name__}: {one_line(error)[:200]}"
            raise UserError(f"model.init_from = {path!r} cannot be read as a timm checkpoint: {reason}") from error
    raise UserError(f"model.init_from = {path!r} is no timm checkpoint: it holds other things than tensors")
