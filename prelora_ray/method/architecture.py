"""What timm and transformers call the parts of their models. Nothing else of the project takes a name apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

Layers = dict[str, tuple[str, ...]]
"""Layers by their names in a block, and the families of the weights in each, from its first row on: linear layers and
convolutions. A convolution without families gets no adapter."""

_ATTENTION: tuple[Layers, ...] = (
    {"attn.qkv": ("query", "key", "value"), "attn.proj": ("proj",)},
    {"attn.q_proj": ("query",), "attn.k_proj": ("key",), "attn.v_proj": ("value",), "attn.proj": ("proj",)},
    {"attn.qk": ("query", "key"), "attn.v": ("value",), "attn.proj": ("proj",)},
    {"attn.q": ("query",), "attn.kv": ("key", "value"), "attn.sr": ("sr",), "attn.proj": ("proj",)},
    {"attn.q": ("query",), "attn.kv": ("key", "value"), "attn.proj": ("proj",)},
)
_MLP: tuple[Layers, ...] = (
    {"mlp.fc1": ("fc1",), "mlp.fc2": ("fc2",)},
    {"mlp.fc1_g": ("fc1_g",), "mlp.fc1_x": ("fc1_x",), "mlp.fc2": ("fc2",)},
)
_TOKENS: tuple[Layers, ...] = (
    {"mlp_tokens.fc1": ("tokens_fc1",), "mlp_tokens.fc2": ("tokens_fc2",)},
    {"linear_tokens": ("tokens",)},
    {"mlp_channels.gate.proj": ("tokens",)},
)
_CHANNELS: tuple[Layers, ...] = ({"mlp_channels.fc1": ("channels_fc1",), "mlp_channels.fc2": ("channels_fc2",)},)
_DEPTHWISE: Layers = {"conv_dw": ()}
_CROSS_COVARIANCE: Layers = {"xca.qkv": ("query", "key", "value"), "xca.proj": ("proj",)}
_TOKEN_MIXER: tuple[Layers, ...] = (
    {"token_mixer.qkv": ("query", "key", "value"), "token_mixer.proj": ("proj",)},
    {"token_mixer.pwconv1": ("pwconv1",), "token_mixer.dwconv": (), "token_mixer.pwconv2": ("pwconv2",)},
)
_MODULATION: tuple[Layers, ...] = ({"modulation.f": ("f",), "modulation.h": ("h",), "modulation.proj": ("proj",)},)
_RESIDUAL: tuple[Layers, ...] = (
    {"conv1": ("conv1",), "conv2": ("conv2",), "conv3": ("conv3",)},
    {"conv1": ("conv1",), "conv2": (), "conv3": ("conv3",)},
    {"conv1": ("conv1",), "conv2": ("conv2",)},
)
_BERT_ATTENTION: Layers = {
    "attention.self.query": ("query",),
    "attention.self.key": ("key",),
    "attention.self.value": ("value",),
    "attention.output.dense": ("proj",),
}
_TRANSFORMERS_ATTENTION: Layers = {
    "attention.q_proj": ("query",),
    "attention.k_proj": ("key",),
    "attention.v_proj": ("value",),
    "attention.o_proj": ("proj",),
}
_GATED: tuple[Layers, ...] = ({"fc1": ("fc1",), "conv": (), "fc2": ("fc2",)},)


@dataclass(frozen=True)
class Architecture:
    """A kind of model, known by what its blocks are made of."""

    name: str
    stages: str
    """A regular expression that the names of the modules match whose children are the blocks."""
    parts: tuple[tuple[Layers, ...], ...]
    """Of each of these a block has one form: all its layers, of which one that several families share has as many rows
    for each as the last has columns."""


ARCHITECTURES = (
    Architecture("Vision Transformer", r"(encoder\.)?blocks", (_ATTENTION, _MLP)),
    Architecture(
        "Vision Transformer in stages",
        r"(layers|stages|transformers)\.\d+\.blocks|levels\.\d+\.transformer_encoder",
        (_ATTENTION, _MLP),
    ),
    Architecture("MLP-Mixer", r"blocks", (_TOKENS, _CHANNELS)),
    Architecture("ConvNeXt", r"stages\.\d+\.blocks", ((_DEPTHWISE,), _MLP)),
    Architecture("EdgeNeXt", r"stages\.\d+\.blocks", ((_DEPTHWISE, _CROSS_COVARIANCE), _MLP)),
    Architecture("MetaFormer", r"stages\.\d+\.blocks", (_TOKEN_MIXER, _MLP)),
    Architecture("FocalNet", r"layers\.\d+\.blocks", (_MODULATION, _MLP)),
    Architecture("MambaOut", r"stages\.\d+\.blocks", (_GATED,)),
    Architecture("ResNet", r"layer\d+|stages\.\d+\.blocks", (_RESIDUAL,)),
    Architecture("Vision Transformer of transformers", r"(vit|deit)\.layers", ((_TRANSFORMERS_ATTENTION,), _MLP)),
    Architecture(
        "BERT",
        r"bert\.encoder\.layer",
        ((_BERT_ATTENTION,), ({"intermediate.dense": ("fc1",), "output.dense": ("fc2",)},)),
    ),
)
_ANY_STAGE = "|".join(architecture.stages for architecture in ARCHITECTURES)

_CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier")
"""As transformers names those of its ViT and DeiT."""
_BLOCK = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
"""The parts of a plain block but layer scales: two residual branches, each a norm, what it is for, and a drop path."""


@dataclass(frozen=True)
class Target:
    """One adapted weight matrix of one block.

    timm often stores query, key and value fused in one ``attn.qkv`` of 3D rows; each is the row slice
    ``start:stop`` of that weight, with a norm and a rank of its own.
    """

    name: str
    """Module name, such as ``blocks.3.attn.query``."""
    family: str
    layer: int
    """Number of the block, counted from 0 through all stages."""
    stored_in: str
    """Name of the layer that stores the weight, such as ``blocks.3.attn.qkv``."""
    start: int
    stop: int
    in_features: int
    """Columns of the matrix: of a convolution, input channels times height and width of the kernel."""

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    @property
    def max_rank(self) -> int:
        return min(self.in_features, self.out_features)


def find_targets(model: nn.Module, families: Iterable[str] | None = None) -> list[Target]:
    """Target modules of a timm model, by layer and then in the order of its architecture; None is all families.

    Raises ValueError where the model is of none of the `ARCHITECTURES`, or has not one of the families.
    """
    targets = []
    for layer, (name, form) in enumerate(_forms(model, architecture_of(model)).items()):
        for path, held in form.items():
            stored_in, parent = f"{name}.{path}", f"{name}.{path}".rpartition(".")[0]
            out_features, in_features = model.get_parameter(f"{stored_in}.weight").flatten(1).shape
            rows = out_features // len(held)
            for i, family in enumerate(held):
                span = i * rows, (i + 1) * rows
                targets.append(Target(f"{parent}.{family}", family, layer, stored_in, *span, in_features))
    has = dict.fromkeys(target.family for target in targets)
    wanted = list(has if families is None else families)
    if unknown := [family for family in wanted if family not in has]:
        raise ValueError(f"{type(model).__name__} has no target {unknown[0]!r}: its targets are {', '.join(has)}")
    return [target for target in targets if target.family in wanted]


def architecture_of(model: nn.Module) -> Architecture:
    """What a timm model without adapters is. Raises ValueError where it is none of the `ARCHITECTURES`."""
    lacking = {}
    for architecture in ARCHITECTURES:
        if blocks := _named_blocks(model, architecture.stages):
            missing = [
                f"{name}.{next(iter(part[0]))}"
                for name, block in blocks.items()
                for part in architecture.parts
                if next(_fitting(block, part), None) is None
            ]
            if not missing:
                return architecture
            lacking[architecture.name] = missing
    if not lacking:
        raise ValueError(f"{type(model).__name__} has no blocks that PreLoRA knows (prelora models)")
    closest = min(lacking, key=lambda name: len(lacking[name]))
    raise ValueError(
        f"{type(model).__name__} has no {lacking[closest][0]} as a {closest} has it, nor what stands for it in another form "
        "(prelora models)"
    )


def _forms(model: nn.Module, architecture: Architecture) -> dict[str, Layers]:
    """By the name of each block its layers that get adapters, with the families in each, of a model that is of the
    architecture."""
    blocks = _named_blocks(model, architecture.stages)
    return {
        name: {path: held for part in architecture.parts for path, held in next(_fitting(block, part)).items() if held}
        for name, block in blocks.items()
    }


def _named_blocks(model: nn.Module, stages: str) -> dict[str, nn.Module]:
    """The blocks by name, in the order in which an image passes them."""
    return {f"{name}.{child}": block for name, stage in _named_stages(model, stages) for child, block in stage.named_children()}


def _fitting(block: nn.Module, part: tuple[Layers, ...]) -> Iterator[Layers]:
    """The forms of a part that a block has; the first one counts."""
    return (form for form in part if _fits(block, form))


def _fits(block: nn.Module, form: Layers) -> bool:
    modules = dict(block.named_modules())
    for path, held in form.items():
        if not (takes_adapter(modules.get(path)) if held else isinstance(modules.get(path), nn.Conv2d)):
            return False
    shapes = {path: block.get_parameter(f"{path}.weight").shape for path in form}
    *_, last = shapes.values()
    return all(len(held) <= 1 or shapes[path][0] == len(held) * last[1] for path, held in form.items())


def takes_adapter(layer: nn.Module | None) -> bool:
    """Whether a layer is linear, or a convolution that PEFT has an adapter for: over all channels, not dilated, and
    with zeros around the image. A class of its own may not apply its weight as it is."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def stages_of(model: nn.Module) -> list[nn.Sequential | nn.ModuleList]:
    """The modules that hold the blocks, in order. Raises ValueError where the model has none."""
    stages = [stage for _, stage in _named_stages(model, _ANY_STAGE)]
    if not stages:
        raise ValueError(f"{type(model).__name__} has no blocks that PreLoRA knows (prelora models)")
    return stages


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of all stages, in order. Raises ValueError where the model has none."""
    return [block for stage in stages_of(model) for block in stage]


def _named_stages(model: nn.Module, stages: str) -> list[tuple[str, nn.Sequential | nn.ModuleList]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) and re.fullmatch(stages, name)
    ]


def family_of(name: str) -> str:
    """Family of a module name: ``blocks.3.attn.query`` is of family ``query``."""
    return name.rsplit(".", 1)[-1]


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """Which block each module is in, from 0 through all stages, by the names of modules of all blocks, in order."""
    blocks = {name: re.findall(r"(?:\.|\blayer)(\d+)", name) for name in names}
    numbers = {block: layer for layer, block in enumerate(dict.fromkeys(map(tuple, blocks.values())))}
    return {name: numbers[tuple(block)] for name, block in blocks.items()}


def residual_branches(block: nn.Module) -> dict[str, str]:
    """By the name of the module that begins a residual branch of a block, the name of the drop path that ends it.

    Raises ValueError where the block is not timm's plain one.
    """
    parts = tuple(name for name, _ in block.named_children() if name not in ("ls1", "ls2"))
    if parts != _BLOCK:
        raise ValueError(f"a {type(block).__name__} is made of {', '.join(parts)}, where a plain block has {', '.join(_BLOCK)}")
    return {_BLOCK[0]: _BLOCK[2], _BLOCK[3]: _BLOCK[5]}


def parameters_in_front(model: nn.Module, layer: int) -> list[nn.Parameter]:
    """Parameters of all that an image passes before block `layer`, as timm registers modules in its forward's order."""
    block = list(_named_blocks(model, _ANY_STAGE))[layer]
    in_front = itertools.takewhile(lambda named: not named[0].startswith(f"{block}."), model.named_parameters())
    return [parameter for _, parameter in in_front]


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of the classifier, or of all classifiers; none where the model has none."""
    own = tuple(getattr(model, name) for name in _CLASSIFIERS if hasattr(model, name))
    classifiers = model.get_classifier() if hasattr(model, "get_classifier") else own  # type: ignore[operator]
    if isinstance(classifiers, nn.Module):
        classifiers = (classifiers,)
    head = {id(parameter) for classifier in classifiers for parameter in classifier.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in head}


def is_embedding(name: str) -> bool:
    """Whether a parameter is a token or embeds positions."""
    return name.endswith(("_token", "pos_embed"))
