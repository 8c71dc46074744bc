"""Whether a trained model and prepared data are of one kind."""

from __future__ import annotations

from collections.abc import Sequence

from prelora_ray.data.manifest import Manifest
from prelora_ray.engine.model import check_length
from prelora_ray.errors import UserError
from prelora_ray.inference.load import TrainedModel
from prelora_ray.words import counted


def check_fits(source: str, model: TrainedModel, data: str, manifest: Manifest) -> None:
    """Raises UserError where the model of `source` takes other samples than `data` holds, or tells apart other classes
    or tokens."""
    if (model.preprocessing is None) != (manifest.text is not None):
        holds, takes = ("text", "images") if manifest.text is not None else ("images", "text")
        raise UserError(f"{data!r} holds {holds}, and {source!r} was trained on {takes}")
    check_classes(source, model.classes, data, manifest)
    if manifest.text is not None:
        check_length(model.module, data, manifest.text.sequence_length)


def check_classes(source: str, trained: Sequence[str], data: str, manifest: Manifest) -> None:
    """Raises UserError where `data` has other classes or tokens than those that `source` was trained with."""
    word = ("class", "classes") if manifest.text is None else ("token", "tokens")
    prepared = manifest.classes
    if len(trained) != len(prepared):
        raise UserError(f"{data!r} has {counted(len(prepared), *word)}, and {source!r} was trained on {len(trained)}")
    if (i := next((i for i in range(len(trained)) if trained[i] != prepared[i]), None)) is not None:
        raise UserError(f"{word[0]} {i} is {prepared[i]!r} in {data!r}, and {source!r} was trained with {trained[i]!r}")
