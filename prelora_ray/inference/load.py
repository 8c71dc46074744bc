"""A trained model, wherever it lies: a run folder, one of its checkpoints, or what `export` wrote.

An export is a folder of three forms, each of which is a trained model by itself:

    timm/      config.json, model.safetensors                  the merged model, as timm writes it for Hugging Face
    adapter/   adapter_config.json, adapter_model.safetensors  the adapters in PEFT's layout, once a run has them,
               base/ with config.json, model.safetensors       and the timm model that they go on
    onnx/      config.json, model.onnx                         the merged model; input `pixels`, output `logits`

Of text the merged model is in transformers/, as transformers and its tokenizers write it, and so is base/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import nn

from prelora_ray.config import Settings
from prelora_ray.data.tokenizer import FILE as TOKENIZER
from prelora_ray.data.tokenizer import read_tokenizer, vocabulary_of
from prelora_ray.engine.snapshot import Snapshot
from prelora_ray.engine.state import restore_model
from prelora_ray.errors import UserError, one_line
from prelora_ray.extras import check_installed
from prelora_ray.fault_tolerance.checkpoint import Checkpoints, DamagedCheckpointError
from prelora_ray.inference.predict import Image, Prediction, is_image, predict
from prelora_ray.inference.preprocessing import Preprocessing
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage
from prelora_ray.words import counted

_LIBRARY = {"adapter": ("peft", "peft"), "onnx": ("onnx", "onnxruntime"), "transformers": ("text", "transformers")}
"""The extra and the module that a form is loaded with."""
_MARKERS = {
    "timm": "model.safetensors",
    "transformers": "model.safetensors",
    "adapter": "adapter_config.json",
    "onnx": "model.onnx",
}


@dataclass(frozen=True)
class TrainedModel:
    module: nn.Module
    """Normalised float32 images (n, channels, image_size, image_size) to logits (n, classes), or tokens (n, length),
    int64, to logits (n, length, classes), in evaluation mode."""
    classes: tuple[str, ...]
    preprocessing: Preprocessing | None
    """None of a model that takes text."""
    data: str | None
    """The prepared folder that it was trained on, where that is known."""

    @overload
    def predict(self, images: Image, top: int = 5) -> Prediction: ...  # type: ignore[overload-overlap]  # str is a sequence
    @overload
    def predict(self, images: Sequence[Image], top: int = 5) -> list[Prediction]: ...
    def predict(self, images: Image | Sequence[Image], top: int = 5) -> Prediction | list[Prediction]:
        """Classifies an image, or each of several: files of any kind that `prelora prepare` reads, also in a bucket, or
        Pillow's images. `top`: classes that are told of each, at most all.

        Files are read as `prepare` with its defaults and evaluation read them. Computes where the module is. Raises
        UserError, before anything is computed, where one is no image that can be read.
        """
        if self.preprocessing is None:
            raise UserError("predict is for images, and this model takes text: its export runs in transformers")
        is_one = is_image(images)
        given = cast("Sequence[Image]", [images] if is_one else images)
        found = predict(self.module, self.classes, self.preprocessing, given, top)
        return found[0] if is_one else found


@dataclass(frozen=True)
class RunModel(TrainedModel):
    """A model from a run folder: the timm model with its adapters, which are not merged; or with averaged weights."""

    settings: Settings
    folder: RunFolder
    checkpoint: str
    """Name of the checkpoint that it was read from."""
    is_ema: bool = False
    """Whether its weights are the averaged ones (`train.ema`), which are merged and without adapters."""


def load_trained(source: str) -> TrainedModel:
    """Loads a run's newest checkpoint, a checkpoint, an exported folder or one of its forms, on the CPU.

    Raises UserError where `source` is none of these or not whole, or its form's library is not installed.
    """
    folder = Storage(source)
    if folder.exists("config.yaml") or folder.exists("state.json"):
        return load_run_model(source)
    if not folder.is_local:
        raise UserError(f"{source!r} is no run folder or checkpoint; copy an exported model to a disk first")
    path = Path(folder.path)
    for kind, load in _FORMS.items():
        for at in (path / kind, path):
            if (at / _MARKERS[kind]).exists() and _takes_text(at) == (kind == "transformers"):
                if kind in _LIBRARY:
                    check_installed(str(at / _MARKERS[kind]), *_LIBRARY[kind])
                try:
                    return load(at)
                except UserError:
                    raise
                except Exception as error:  # whatever a damaged or foreign file makes a reader raise
                    reason = f"{type(error).__name__}: {one_line(error)[:200]}"
                    raise UserError(f"{str(at)!r} is no exported model: {reason}") from error
    raise UserError(f"{source!r} is no trained model: give a run folder, one of its checkpoints, or an exported model")


def load_run_model(source: str, *, ema: bool = False) -> RunModel:
    """Loads a run's newest whole checkpoint, or the checkpoint whose folder is given; with `ema` its averaged weights.

    Raises UserError where `source` is no run or checkpoint, or no checkpoint is whole, or it has no averaged weights.
    """
    folder, name = run_of(source)
    settings = folder.read_settings()
    checkpoints = Checkpoints(folder)
    try:
        checkpoint = checkpoints.newest()[0] if name is None else checkpoints.load(name)
    except DamagedCheckpointError as error:
        raise UserError(f"{source!r}: {error}") from None
    if checkpoint is None:
        raise UserError(f"{source!r} has no whole checkpoint yet")
    if ema and not checkpoint.ema:
        raise UserError(f"{source!r} has no averaged weights: its run was trained without train.ema")
    return _run_model(folder, settings, checkpoint, ema=ema)


def run_of(source: str) -> tuple[RunFolder, str | None]:
    """The run folder that `source` is, or that the checkpoint `source` is in; and the checkpoint's name."""
    folder = RunFolder(source)
    if not folder.exists("state.json"):
        return folder, None
    root, _, name = folder.uri.rstrip("/").rsplit("/", 2)
    return RunFolder(str(Storage(root))), name


def _run_model(folder: RunFolder, settings: Settings, checkpoint: Snapshot, *, ema: bool) -> RunModel:
    classes, data = folder.read_classes(), settings.data
    try:
        model = restore_model(settings, len(classes), checkpoint, ema=ema).float().eval()
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"{folder}: config.yaml or data.json does not fit checkpoint {checkpoint.name}: {one_line(error)[:200]}"
        ) from None
    preprocessing = None
    if not settings.model.takes_text:
        preprocessing = Preprocessing(settings.model.image_size, *settings.normalization, data.crop_ratio)
    return RunModel(model, classes, preprocessing, data.path, settings, folder, checkpoint.name, is_ema=ema)


def _load_timm(path: Path) -> TrainedModel:
    import timm

    model = timm.create_model(f"local-dir:{path}", pretrained=True)
    return TrainedModel(model.eval(), *_description(path), data=None)


def _load_adapter(path: Path) -> TrainedModel:
    from peft import PeftModel

    base = (_load_transformers if _takes_text(path / "base") else _load_timm)(path / "base")
    return replace(base, module=PeftModel.from_pretrained(base.module, str(path)).eval())


def _load_transformers(path: Path) -> TrainedModel:
    from prelora_ray.engine.text_model import Bert  # an extra, which takes seconds to import

    kind = json.loads((path / "config.json").read_text())["model_type"]
    if kind != "bert":
        raise UserError(f"{str(path)!r} is not allowed: its config.json has model_type {kind!r}, and it must be 'bert'")
    tokenizer = read_tokenizer(str(path / TOKENIZER), f"{path}/{TOKENIZER}")
    model, told = Bert.from_pretrained(path, output_loading_info=True)
    if missing := sorted(told["missing_keys"]):
        some = f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        raise UserError(f"{str(path)!r} is not allowed: its model.safetensors lacks {counted(len(missing), 'tensor')}: {some}")
    return TrainedModel(model.eval(), vocabulary_of(tokenizer), preprocessing=None, data=None)


def _takes_text(path: Path) -> bool:
    """Whether a form is of text: transformers' description of a model says what it calls itself."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _load_onnx(path: Path) -> TrainedModel:
    return TrainedModel(OnnxModel(str(path / "model.onnx")), *_description(path), data=None)


def _description(path: Path) -> tuple[tuple[str, ...], Preprocessing]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    inputs = config["pretrained_cfg"]
    preprocessing = Preprocessing(inputs["input_size"][-1], tuple(inputs["mean"]), tuple(inputs["std"]), inputs["crop_pct"])
    return tuple(config["label_names"]), preprocessing


class OnnxModel(nn.Module):
    """An ONNX file on the CPU. It is opened where it is first called, as an open one cannot travel to a Ray task."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self._session: Any = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._session is None:
            import onnxruntime

            self._session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        (logits,) = self._session.run(["logits"], {"pixels": images.cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)


_FORMS = {"timm": _load_timm, "transformers": _load_transformers, "adapter": _load_adapter, "onnx": _load_onnx}
