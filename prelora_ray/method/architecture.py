"""What timm calls the parts of its plain Vision Transformer. Nothing else of the project takes a name apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

FAMILIES = ("query", "key", "value", "proj", "fc1", "fc2")

_LINEAR_OF = {
    "query": "attn.qkv",
    "key": "attn.qkv",
    "value": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}

_BLOCK = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
"""The parts of a plain block but layer scales: two residual branches, each a norm, what it is for, and a drop path."""


@dataclass(frozen=True)
class Target:
    """One adapted weight matrix of one block.

    timm stores query, key and value fused in one ``attn.qkv`` of 3D rows; each is the row slice
    ``start:stop`` of that weight, with a norm and a rank of its own.
    """

    name: str
    """Module name, such as ``blocks.3.attn.query``."""
    family: str
    layer: int
    linear: str
    """Name of the linear layer that stores the weight, such as ``blocks.3.attn.qkv``."""
    start: int
    stop: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    @property
    def max_rank(self) -> int:
        return min(self.in_features, self.out_features)


def find_targets(model: nn.Module, families: Iterable[str] = FAMILIES) -> list[Target]:
    """Target modules of a timm ViT, by layer and then in the order of ``FAMILIES``.

    Raises ValueError where the model is no ViT with ``blocks.N.attn.qkv``, ``.attn.proj``,
    ``.mlp.fc1`` and ``.mlp.fc2`` as linear layers, or a family is unknown.
    """
    families = set(families)
    if unknown := families - set(FAMILIES):
        raise ValueError(f"unknown target {sorted(unknown)[0]!r}: the targets are {', '.join(FAMILIES)}")
    targets = []
    for layer, block in enumerate(blocks_of(model)):
        for family in FAMILIES:
            if family not in families:
                continue
            path = _LINEAR_OF[family]
            try:
                linear = block.get_submodule(path)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise ValueError(
                    f"{type(model).__name__} has no linear layer blocks.{layer}.{path}, which target {family!r} "
                    "stands for: choose a timm Vision Transformer with a fused qkv and a plain MLP"
                )
            start, stop = 0, linear.out_features
            if path == "attn.qkv":
                third = linear.out_features // 3
                start = third * FAMILIES.index(family)
                stop = start + third
            name = f"blocks.{layer}.{path.split('.')[0]}.{family}"
            targets.append(Target(name, family, layer, f"blocks.{layer}.{path}", start, stop, linear.in_features))
    return targets


def family_of(name: str) -> str:
    """Family of a module name: ``blocks.3.attn.query`` is of family ``query``."""
    return name.rsplit(".", 1)[-1]


def layer_of(name: str) -> int:
    """Which block a module is in, from 0: ``blocks.3.attn.query`` is in block 3."""
    return int(name.split(".")[1])


def blocks_of(model: nn.Module) -> nn.Sequential | nn.ModuleList:
    """The blocks, in order. Raises ValueError where the model has none."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ValueError(f"{type(model).__name__} has no `blocks`: PreLoRA adapts the blocks of a timm Vision Transformer")
    return blocks


def residual_branches(block: nn.Module) -> dict[str, str]:
    """By the name of the module that begins a residual branch of a block, the name of the drop path that ends it.

    Raises ValueError where the block is not timm's plain one.
    """
    parts = tuple(name for name, _ in block.named_children() if name not in ("ls1", "ls2"))
    if parts != _BLOCK:
        raise ValueError(f"a {type(block).__name__} is made of {', '.join(parts)}, where a plain block has {', '.join(_BLOCK)}")
    return {_BLOCK[0]: _BLOCK[2], _BLOCK[3]: _BLOCK[5]}


def parameters_in_front(model: nn.Module, layer: int) -> list[nn.Parameter]:
    """Parameters of all that an image passes before block `layer`."""
    children = [name for name, _ in model.named_children()]  # timm registers them in the order of its forward
    behind = {f"blocks.{i}" for i in range(layer, len(blocks_of(model)))} | set(children[children.index("blocks") + 1 :])
    return [
        parameter for name, parameter in model.named_parameters() if not any(name.startswith(f"{part}.") for part in behind)
    ]


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of the classifier, or of all classifiers; none where the model has none."""
    classifiers = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    if isinstance(classifiers, nn.Module):
        classifiers = (classifiers,)
    head = {id(parameter) for classifier in classifiers for parameter in classifier.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in head}


def is_embedding(name: str) -> bool:
    """Whether a parameter is a token or embeds positions."""
    return name.endswith(("_token", "pos_embed"))
