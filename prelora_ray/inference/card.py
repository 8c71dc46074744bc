"""The model cards of an export: what the model is, what it was trained with, and code that runs each form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prelora_ray.engine.snapshot import epoch_of
from prelora_ray.inference.load import RunModel
from prelora_ray.summaries import last_ema_top1, last_top1, phase_summaries, rank_counts
from prelora_ray.words import counted, modules_by_rank, percent

_LIBRARY = {"timm": "timm", "adapter": "peft", "onnx": "onnxruntime"}
_WHAT = {
    "timm": "The merged model, as timm writes it for Hugging Face",
    "adapter": "The adapters in PEFT's layout, and in `base` the timm model that they go on",
    "onnx": "The merged model as ONNX: images (n, {channels}, {size}, {size}) as `pixels` to `logits` (n, {classes})",
}


def write_cards(run: RunModel, root: Path, differences: Mapping[str, float], images: int) -> None:
    """Writes a README.md into an export and into each of its forms.

    `differences`: the largest difference of a logit from the run's own model by form, over so many images.
    """
    facts = _facts(run, has_adapters="adapter" in differences)
    for form, difference in differences.items():
        told = f"Its logits differ from the run's own model by at most {difference:.2g} over {counted(images, 'image')}."
        (root / form / "README.md").write_text(_head(run, _LIBRARY[form], facts) + _section(run, form, ".") + f"\n{told}\n")
    sections = "".join(_section(run, form, form) for form in differences)
    (root / "README.md").write_text(_head(run, "timm", facts) + sections)


def _head(run: RunModel, library: str, facts: Mapping[str, str]) -> str:
    classes = counted(len(run.classes), "class", "classes")
    return f"""---
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, prelora, {library}]
---

# {run.settings.name}

`{run.settings.model.name}` for {classes}, trained by prelora_ray with PreLoRA
([arXiv 2509.21619](https://arxiv.org/abs/2509.21619)).

| | |
| --- | --- |
{"".join(f"| {key} | {value} |{chr(10)}" for key, value in facts.items())}"""


def _facts(run: RunModel, *, has_adapters: bool) -> dict[str, str]:
    """What the model was trained with, as far as the run has recorded it, and what it takes."""
    prepared, done = run.preprocessing, epoch_of(run.checkpoint)
    channels, size, _ = run.settings.model.input_shape
    facts = {"checkpoint": f"`{run.checkpoint}`, after {done} of {counted(run.settings.train.epochs, 'epoch')}"}
    if lines := [line for line in run.folder.epochs() if line.epoch < done]:
        phases = phase_summaries(lines).values()
        facts["training"] = ", ".join(f"{counted(phase.epochs, 'epoch')} of phase {phase.phase}" for phase in phases)
        facts["training images"] = f"{lines[-1].images:,}"
        top1 = last_ema_top1(lines) if run.is_ema else last_top1(lines)
        facts["top-1"] = "not validated so far" if top1 is None else f"{percent(top1)} of the run's validation images"
    if run.is_ema:
        facts["weights"] = f"a moving average over the steps, with decay {run.settings.train.ema:g}"
    if has_adapters and run.folder.exists("ranks.json"):
        ranks = rank_counts(run.folder.read_json("ranks.json"))
        facts["adapters"] = modules_by_rank(ranks)
    kind = "RGB" if channels == 3 else "grey values (Pillow's mode `L`)"
    facts["images"] = f"{kind}, {size} x {size} pixels: the centre {prepared.crop_ratio:g} of the shorter side, bicubic"
    facts["values"] = f"in 0..1, less mean {_each(prepared.mean)}, over standard deviation {_each(prepared.std)}"
    facts["classes"] = "`label_names` in `config.json`, in the order of the logits"
    return facts


def _each(values: tuple[float, ...]) -> str:
    """Of each channel, or of all alike."""
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values)) if len(set(values)) == 1 else str(list(values))


def _section(run: RunModel, form: str, path: str) -> str:
    """What a form is, and code for it. `path`: the form's folder, from where the code is run."""
    channels, size, _ = run.settings.model.input_shape
    what = _WHAT[form].format(channels=channels, size=size, classes=len(run.classes))
    code = _onnx_code(path) if form == "onnx" else _torch_code(form, path, "RGB" if channels == 3 else "L")
    return f"\n## {form}\n\n{what}.\n\n```python\n{code}```\n"


def _torch_code(form: str, path: str, mode: str) -> str:
    base, peft, load = path, "", "model.eval()"
    if form == "adapter":
        base = f"{path}/base"
        peft, load = "from peft import PeftModel\n", f'network = PeftModel.from_pretrained(model, "{path}").eval()'
    network = "network" if form == "adapter" else "model"
    return f"""import contextlib

import torch
from PIL import Image

with contextlib.suppress(ImportError):  # prelora_ray's own environment may have a torch that torchvision does not match
    from prelora_ray.torchvision_ops import make_importable

    make_importable()

import timm
{peft}
model = timm.create_model("local-dir:{base}", pretrained=True)
{load}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.open("image.png").convert("{mode}"))
with torch.no_grad():
    shares = {network}(image[None])[0].softmax(0)
print(model.pretrained_cfg["label_names"][shares.argmax()], f"{{shares.max():.4f}}")
"""


def _onnx_code(path: str) -> str:
    return f"""import json

import numpy as np
import onnxruntime
from PIL import Image

with open("{path}/config.json") as file:
    config = json.load(file)
inputs = config["pretrained_cfg"]
channels, size, _ = inputs["input_size"]
image = Image.open("image.png").convert("RGB" if channels == 3 else "L")
side = min(image.size) * inputs["crop_pct"]
left, top = (image.width - side) / 2, (image.height - side) / 2
image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
pixels = np.asarray(image, np.float32).reshape(size, size, channels) / 255
pixels = (pixels - np.float32(inputs["mean"])) / np.float32(inputs["std"])
session = onnxruntime.InferenceSession("{path}/model.onnx")
(logits,) = session.run(["logits"], {{"pixels": pixels.transpose(2, 0, 1)[None]}})
shares = np.exp(logits[0] - logits[0].max())
shares /= shares.sum()
print(config["label_names"][shares.argmax()], f"{{shares.max():.4f}}")
"""
