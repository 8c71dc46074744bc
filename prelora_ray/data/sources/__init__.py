"""Where images come from: what `prelora prepare SOURCE` understands. docs/data.md has a page's worth on each."""

from __future__ import annotations

from prelora_ray.data.sources.digits import Digits
from prelora_ray.data.sources.folder import ImageFolder
from prelora_ray.data.sources.idx import Idx
from prelora_ray.data.sources.imagenet import ImageNet
from prelora_ray.data.sources.parquet import HuggingFaceParquet
from prelora_ray.data.sources.source import Item, Source, files_below, is_folder
from prelora_ray.data.sources.tars import WebDataset
from prelora_ray.storage import Storage

__all__ = ["Item", "Source", "open_source"]


def open_source(source: str) -> Source:
    """Opens a source: `digits`, or a folder, told by what is in it.

    Raises ValueError where there is no such source, it is damaged, or nothing is in it.
    """
    if source == "digits":
        return Digits()
    folder = Storage(source)
    if not is_folder(folder):
        raise ValueError(f"{source!r} is no source: give `digits`, or a folder of images, tars, Parquet or IDX files")
    if ImageNet.fits(folder):
        return ImageNet.open(source)
    if Idx.fits(folder):
        return Idx.open(source)
    if HuggingFaceParquet.fits(folder):
        return HuggingFaceParquet.open(source)
    if any(name.endswith(".tar") for name in files_below(folder)):
        return WebDataset.open(source)
    return ImageFolder.open(source)
