from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from tests.runs import TINY_VIT


@pytest.fixture
def vit() -> nn.Module:
    """A timm ViT of three blocks, width 16, for 8 x 8 images and 10 classes."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=10, **TINY_VIT).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
