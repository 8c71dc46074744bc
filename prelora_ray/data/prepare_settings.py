"""How images are prepared. `prelora prepare` has an option for each field."""

from typing import Annotated

from pydantic import Field

from prelora_ray.section import Count, Section, Share, Whole


class PrepareSettings(Section):
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each class held out for validation, where the source has no validation images of its own."""
    size: Count = 256
    """Longest that the shorter side of a stored image may be, in pixels; larger images are reduced."""
    max_bad: Share = 0.001
    """Largest share of unreadable images before the job fails."""
    max_overlap: Share = 0.01
    """Largest share of validation images that are among the training images too, before the job fails."""
    seed: Whole = 0
    """Seed of the held-out choice and of the rows' order."""
    quality: Annotated[int, Field(ge=1, le=100)] = 92
    """JPEG quality of images that are encoded anew; those with a side of up to 64 pixels become lossless PNG."""
    train_split: str | None = None
    """Pattern of the files or folders that train, where their names have no word such as `train`."""
    val_split: str | None = None
    """Pattern of the files or folders that validate, where their names have no word such as `val` or `test`."""
    image_column: str | None = None
    """Column with images or their files, in a table or Parquet file; by default one named as usual, such as `image`."""
    label_column: str | None = None
    """Column that holds labels; by default one with a usual name, such as `label`."""
    max_pixels: Count = 100_000_000
    """Most pixels of a source image; a larger one is taken for a decompression bomb and counts as unreadable."""
    shard_rows: Count = 2048
    """Images in a Parquet file."""
    row_group_bytes: Count = 2**20
    """Encoded bytes in a row group, about: the unit that training reads."""
