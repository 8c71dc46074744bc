"""A run's model in the forms that other tools load, each loaded back and compared before `out` appears."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.fs
import safetensors.torch
import torch

from prelora_ray.data.manifest import read_manifest
from prelora_ray.data.rows import read_encoded, read_tokens
from prelora_ray.data.tokenizer import FILE as TOKENIZER
from prelora_ray.data.tokenizer import read_tokenizer
from prelora_ray.engine.model import timm_model
from prelora_ray.engine.prelora import save_adapter
from prelora_ray.errors import UserError, WorkError
from prelora_ray.extras import check_installed
from prelora_ray.inference.card import write_cards
from prelora_ray.inference.fit import check_fits
from prelora_ray.inference.load import RunModel, TrainedModel, load_run_model, load_trained
from prelora_ray.method.adapters import base_state_dict, lora_layers, merged_state_dict
from prelora_ray.storage import Storage, check_out_folder
from prelora_ray.torchvision_ops import make_importable

make_importable()

from timm.models import save_for_hf  # noqa: E402

TOLERANCE = 1e-4
"""Largest difference of a logit between the run's own model and an exported one, in float32."""
_IMAGES = 64
_SEQUENCES = 8
_NEEDS = {"adapter": ("peft", "peft"), "onnx": ("onnx", "onnx", "onnxruntime", "onnxscript")}
"""An extra and its modules, by form; a form without them is left out."""
_Write = Callable[[RunModel, Path, dict[str, torch.Tensor]], None]
logger = logging.getLogger(__name__)


class ExportError(WorkError):
    """An exported model does not compute what the run's own does."""


@dataclass(frozen=True)
class Exported:
    path: str
    forms: tuple[str, ...]
    """The folders inside `path`: `timm`, `onnx`, and `adapter` once the run has adapters; less what was left out. Of
    text `transformers` and `adapter`."""
    max_abs_diff: dict[str, float]
    """Largest difference of a logit by form."""
    images: int
    """Real images, or sequences of text, over which the forms were compared."""


def export(source: str, out: str, data: str | None = None, *, ema: bool = False) -> Exported:
    """Exports the newest checkpoint of a run, or a checkpoint of it, into the new folder `out`; with `ema` its averaged
    weights.

    Each form is loaded back by the tool it is for and compared with the run's own model over
    validation images of `data`, by default those that the run was trained with; `out` appears only if
    all agree. A form whose library is not installed is left out, which the log says.

    Raises UserError where `source`, `out` or `data` will not do, or there are no averaged weights; ExportError where a
    form differs.
    """
    check_out_folder(out)
    target = Storage(out)
    if target.list_files() or target.list_folders():
        raise UserError(f"{out!r} is not empty: name a new folder")
    run = load_run_model(source, ema=ema)
    takes_adapter = bool(lora_layers(run.module)) and _can_make("adapter")
    takes_onnx = run.preprocessing is not None and _can_make("onnx")
    data = data or run.settings.data.path
    samples = _real_samples(run, data)
    whole = "timm" if run.preprocessing is not None else "transformers"
    write: _Write = _write_timm if run.preprocessing is not None else partial(_write_transformers, data=data)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory, "export")
        write(run, root / whole, merged_state_dict(run.module))
        if takes_adapter:
            write(run, root / "adapter" / "base", base_state_dict(run.module))
            save_adapter(run.module, root / "adapter")
        if takes_onnx:
            _write_onnx(run, root / "onnx", root / "timm", samples[:2])
        forms = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
        differences = {form: _difference(run, load_trained(str(root / form)), samples) for form in forms}
        worst = max(differences, key=lambda form: differences[form])
        if not differences[worst] <= TOLERANCE:
            raise ExportError(f"the {worst} form differs from the run's model by {differences[worst]:.3g} in a logit")
        write_cards(run, root, differences, len(samples))
        if target.is_local:
            Path(target.path).parent.mkdir(parents=True, exist_ok=True)
            # Without the files' modes: safetensors makes its own readable to their owner alone.
            shutil.copytree(root, target.path, dirs_exist_ok=True, copy_function=shutil.copyfile)
        else:
            pyarrow.fs.copy_files(str(root), target.path, destination_filesystem=target.filesystem)
    return Exported(out, forms, differences, len(samples))


def _can_make(form: str) -> bool:
    """Whether what a form needs is installed; says what to install where it is not."""
    try:
        check_installed(f"{form} is left out, as it", *_NEEDS[form])
    except UserError as left_out:
        logger.warning("%s", left_out)
        return False
    return True


def _real_samples(run: RunModel, path: str) -> torch.Tensor:
    """The first validation images, normalised, (n, channels, size, size); or sequences of tokens, (n, length)."""
    manifest = read_manifest(Storage(path))
    if run.preprocessing is None or manifest.text is not None:
        check_fits(str(run.folder), run, path, manifest)
    if run.preprocessing is not None:
        return run.preprocessing.read(read_encoded(path, manifest.splits["val"], _IMAGES))
    return torch.from_numpy(read_tokens(path, manifest, _SEQUENCES)).long()


@torch.no_grad()
def _difference(run: RunModel, exported: TrainedModel, samples: torch.Tensor) -> float:
    return float((run.module(samples) - exported.module(samples)).abs().max())


def _write_transformers(run: RunModel, path: Path, tensors: dict[str, torch.Tensor], data: str) -> None:
    """A folder as transformers writes it, with the tokenizer of `data`."""
    from prelora_ray.engine.text_model import save_pretrained  # an extra, which takes seconds to import

    tokenizer = f"{Storage(data)}/{TOKENIZER}"
    save_pretrained(run.module.config, tensors, path, read_tokenizer(tokenizer, tokenizer))


def _write_timm(run: RunModel, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A folder as timm writes it for Hugging Face: config.json and model.safetensors."""
    model = timm_model(run.settings.model, len(run.classes))
    model.load_state_dict(tensors)
    prepared, settings = run.preprocessing, run.settings
    assert prepared is not None, "of images"
    save_for_hf(
        model,
        str(path),
        model_config={"label_names": list(run.classes), "pretrained_cfg": {"tag": settings.name}},  # not timm's weights
        safe_serialization=True,
        data_config={
            "input_size": settings.model.input_shape,
            "mean": prepared.mean,
            "std": prepared.std,
            "crop_pct": prepared.crop_ratio,
            "interpolation": "bicubic",
        },
    )


def _write_onnx(run: RunModel, path: Path, merged: Path, example: torch.Tensor) -> None:
    model = timm_model(run.settings.model, len(run.classes))
    model.load_state_dict(safetensors.torch.load_file(merged / "model.safetensors"))
    path.mkdir()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch's own, on its way through itself
        torch.onnx.export(
            model.eval(),
            (example,),
            str(path / "model.onnx"),
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    shutil.copy(merged / "config.json", path / "config.json")
