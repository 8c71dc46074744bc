"""What `model.init_from` names, as the tensors of a timm model."""

from __future__ import annotations

import posixpath

import torch

from prelora_ray.engine.pretrained import read_pretrained
from prelora_ray.errors import UserError
from prelora_ray.inference.load import load_run_model
from prelora_ray.method.adapters import merged_state_dict
from prelora_ray.storage import Storage

_EXPORTED = ("timm/model.safetensors", "transformers/model.safetensors", "model.safetensors")


def initial_weights(source: str) -> dict[str, torch.Tensor]:
    """Tensors by timm's names, or transformers': of a run's newest whole checkpoint, or one of its checkpoints, with
    adapters merged; of the whole model in an export; or of a checkpoint of timm or transformers.

    Raises UserError where `source` is none of these, or cannot be read.
    """
    folder = Storage(source)
    if folder.exists("config.yaml") or folder.exists("state.json"):
        try:
            return merged_state_dict(load_run_model(source).module)
        except UserError as error:
            raise UserError(f"model.init_from = {source!r} is not allowed: {error}") from error
    exported = next((name for name in _EXPORTED if folder.exists(name)), None)
    return read_pretrained(source if exported is None else posixpath.join(source, exported))
