"""The model cards of an export: what the model is, what it was trained with, and code that runs each form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prelora_ray.engine.snapshot import epoch_of
from prelora_ray.inference.load import RunModel
from prelora_ray.inference.preprocessing import Preprocessing
from prelora_ray.measures import last_value, measures_of
from prelora_ray.summaries import phase_summaries, rank_counts
from prelora_ray.words import counted, modules_by_rank

_LIBRARY = {"timm": "timm", "transformers": "transformers", "adapter": "peft", "onnx": "onnxruntime"}
_WHAT = {
    "timm": "The merged model, as timm writes it for Hugging Face",
    "transformers": "The merged model and its tokenizer, as transformers writes them",
    "adapter": "The adapters in PEFT's layout, and in `base` the {library} model that they go on",
    "onnx": "The merged model as ONNX: images (n, {channels}, {size}, {size}) as `pixels` to `logits` (n, {classes})",
}


def write_cards(run: RunModel, root: Path, differences: Mapping[str, float], samples: int) -> None:
    """Writes a README.md into an export and into each of its forms.

    `differences`: the largest difference of a logit from the run's own model by form, over so many samples.
    """
    facts = _facts(run, has_adapters="adapter" in differences)
    for form, difference in differences.items():
        over = counted(samples, run.settings.sample)
        told = f"Its logits differ from the run's own model by at most {difference:.2g} over {over}."
        (root / form / "README.md").write_text(_head(run, _LIBRARY[form], facts) + _section(run, form, ".") + f"\n{told}\n")
    sections = "".join(_section(run, form, form) for form in differences)
    (root / "README.md").write_text(_head(run, _whole(run), facts) + sections)


def _whole(run: RunModel) -> str:
    """The library whose form the merged model has."""
    return "timm" if run.preprocessing is not None else "transformers"


def _head(run: RunModel, library: str, facts: Mapping[str, str]) -> str:
    classes, kind = counted(len(run.classes), "class", "classes"), "image-classification"
    if run.preprocessing is None:
        classes, kind = f"a vocabulary of {counted(len(run.classes), 'token')}", "fill-mask"
    return f"""---
library_name: {library}
pipeline_tag: {kind}
tags: [{kind}, prelora, {library}]
---

# {run.settings.name}

`{run.settings.model.name}` for {classes}, trained by prelora_ray with PreLoRA
([arXiv 2509.21619](https://arxiv.org/abs/2509.21619)).

| | |
| --- | --- |
{"".join(f"| {key} | {value} |{chr(10)}" for key, value in facts.items())}"""


def _facts(run: RunModel, *, has_adapters: bool) -> dict[str, str]:
    """What the model was trained with, as far as the run has recorded it, and what it takes."""
    done = epoch_of(run.checkpoint)
    facts = {"checkpoint": f"`{run.checkpoint}`, after {done} of {counted(run.settings.train.epochs, 'epoch')}"}
    if lines := [line for line in run.folder.epochs() if line.epoch < done]:
        phases = phase_summaries(lines).values()
        facts["training"] = ", ".join(f"{counted(phase.epochs, 'epoch')} of phase {phase.phase}" for phase in phases)
        facts[f"training {run.settings.sample}s"] = f"{lines[-1].images:,}"
        for measure in measures_of(run.settings.task)[: 1 if run.is_ema else None]:
            value = last_value(lines, measure.averaged if run.is_ema else measure.key)
            of = "of" if run.preprocessing is not None else "over"
            told = f"{measure.told(value)} {of} the run's validation {run.settings.sample}s"
            facts[measure.title] = "not validated so far" if value is None else told
    if run.is_ema:
        facts["weights"] = f"a moving average over the steps, with decay {run.settings.train.ema:g}"
    if has_adapters and run.folder.exists("ranks.json"):
        ranks = rank_counts(run.folder.read_json("ranks.json"))
        facts["adapters"] = modules_by_rank(ranks)
    return facts | (_image_facts(run, run.preprocessing) if run.preprocessing is not None else _text_facts(run))


def _text_facts(run: RunModel) -> dict[str, str]:
    length = run.settings.model.options.get("max_position_embeddings", 512)
    return {"text": f"up to {counted(length, 'token')}, by the tokenizer in `tokenizer.json`"}


def _image_facts(run: RunModel, prepared: Preprocessing) -> dict[str, str]:
    channels, size, _ = run.settings.model.input_shape
    facts = {}
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
    what = _WHAT[form].format(channels=channels, size=size, classes=len(run.classes), library=_whole(run))
    if run.preprocessing is None:
        return f"\n## {form}\n\n{what}.\n\n```python\n{_text_code(form, path)}```\n"
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


def _text_code(form: str, path: str) -> str:
    base = f"{path}/base" if form == "adapter" else path
    peft = "from peft import PeftModel\n" if form == "adapter" else ""
    adapt = f'model = PeftModel.from_pretrained(model, "{path}").merge_and_unload()\n' if form == "adapter" else ""
    return f"""{peft}from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

model, tokenizer = AutoModelForMaskedLM.from_pretrained("{base}"), AutoTokenizer.from_pretrained("{base}")
{adapt}fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
for guess in fill(f"A function may return {{tokenizer.mask_token}} or raise an exception."):
    print(guess["token_str"], f"{{guess['score']:.4f}}")
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
