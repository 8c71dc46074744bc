"""What `model.init_from` names, as the tensors of a model, and whether they go with the data."""

from __future__ import annotations

import posixpath

import torch

from prelora_ray.data.manifest import Manifest
from prelora_ray.data.tokenizer import FILE as TOKENIZER
from prelora_ray.data.tokenizer import read_tokenizer, vocabulary_of
from prelora_ray.engine.pretrained import read_pretrained
from prelora_ray.errors import UserError
from prelora_ray.inference.fit import check_classes
from prelora_ray.inference.load import load_run_model, run_of
from prelora_ray.method.adapters import merged_state_dict
from prelora_ray.storage import Storage

_EXPORTED = ("timm/model.safetensors", "transformers/model.safetensors", "model.safetensors")


def initial_weights(source: str) -> dict[str, torch.Tensor]:
    """Tensors by timm's names, or transformers': of a run's newest whole checkpoint, or one of its checkpoints, with
    adapters merged; of the whole model in an export; or of a checkpoint of timm or transformers.

    Raises UserError where `source` is none of these, or cannot be read.
    """
    if _is_of_run(source):
        try:
            return merged_state_dict(load_run_model(source).module)
        except UserError as error:
            raise UserError(f"model.init_from = {source!r} is not allowed: {error}") from error
    return read_pretrained(_file_of(source))


def check_vocabulary(source: str, data: str, manifest: Manifest) -> None:
    """Raises UserError where `source` was trained with other tokens than those of the text of `data`.

    A file of tensors without a tokenizer.json beside it does not tell its tokens.
    """
    if _is_of_run(source):
        tokens = run_of(source)[0].read_classes()
    else:
        folder = posixpath.dirname(_file_of(source)) or "."
        if not Storage(folder).exists(TOKENIZER):
            return
        path = posixpath.join(folder, TOKENIZER)
        tokens = vocabulary_of(read_tokenizer(path, path))
    try:
        check_classes(source, tokens, data, manifest)
    except UserError as error:
        raise UserError(f"model.init_from = {source!r} is not allowed: {error}") from None


def _is_of_run(source: str) -> bool:
    folder = Storage(source)
    return folder.exists("config.yaml") or folder.exists("state.json")


def _file_of(source: str) -> str:
    """The file of a whole model's tensors: in an export, or `source` itself."""
    exported = next((name for name in _EXPORTED if Storage(source).exists(name)), None)
    return source if exported is None else posixpath.join(source, exported)
