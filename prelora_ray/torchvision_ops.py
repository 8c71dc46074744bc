"""Makes torchvision importable beside a torch build that its binary does not match.

timm and PEFT import torchvision for transforms that are plain Python. But torchvision's import
registers shapes for its compiled operators, and fails where they cannot be loaded, as with a CPU-only
torch and the CUDA wheel of torchvision that package indexes serve. Declaring two operators is
enough for all that timm and PEFT use; the compiled decoders stay unavailable.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []  # a Library's declarations end with the object


def make_importable() -> None:
    """Declares torchvision's operators where its own library cannot be loaded. Call before importing timm or peft."""
    spec = importlib.util.find_spec("torchvision")
    if _declared or spec is None or spec.origin is None:
        return
    for path in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
