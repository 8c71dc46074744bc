"""What the examples train: a small timm Vision Transformer, on scikit-learn's 1,797 images of handwritten digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from prelora_ray.torchvision_ops import make_importable

make_importable()  # beside a torch that torchvision was not built for, timm could not be imported

import timm  # noqa: E402

EPOCHS = 10
METHOD = {"switch_epoch": 5, "warmup_epochs": 2, "r_min": 2, "r_max": 8, "window_epochs": 1, "adapter_ramp_steps": 10}
"""In a run of your own leave `switch_epoch` out: then the test decides when to switch, by `tau` and `zeta`."""


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=4, num_heads=3, num_classes=10
    )


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images to train on and to validate on, 1 x 8 x 8, with their labels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 - 0.5
    labels = torch.tensor(labels)
    return TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])
