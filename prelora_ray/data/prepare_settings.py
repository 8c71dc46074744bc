"""How images or text are prepared. `prelora prepare` has an option for each field."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from prelora_ray.section import Count, Section, Share, Whole

NAMED_SOURCES = ("digits", "pydoc")
"""Sources that come inside a package; all others are paths and addresses."""
TRAINED_TOKENIZERS = ("wordpiece", "bpe")
"""Those that are trained on the text; all others are paths."""
_OF_IMAGES = {"size", "quality", "max_overlap", "image_column", "label_column", "max_pixels"}
_OF_TEXT = {"tokenizer", "vocabulary", "sequence_length", "text_column"}


class PrepareSettings(Section):
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each class, or of a text, held out for validation, where the source has nothing to validate with."""
    size: Count = 256
    """Longest that the shorter side of a stored image may be, in pixels; larger images are reduced."""
    max_bad: Share = 0.001
    """Largest share of unreadable images or documents before the job fails."""
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
    text_column: str = "text"
    """Column of a Parquet file, or key of a JSON line, that holds a document."""
    tokenizer: str = "wordpiece"
    """How text becomes tokens: `wordpiece` or `bpe` is trained on it; or the path of a `tokenizer.json`."""
    vocabulary: Annotated[int, Field(ge=300, strict=True)] = 30_000
    """Most tokens of a tokenizer that is trained."""
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 512
    """Tokens in a sequence of text, which is always full."""
    max_pixels: Count = 100_000_000
    """Most pixels of a source image; a larger one is taken for a decompression bomb and counts as unreadable."""
    shard_rows: Count = 2048
    """Images, or about so many sequences of text, in a Parquet file."""
    row_group_bytes: Count = 2**20
    """Bytes in a row group, about: the unit that training reads."""

    def of_other_tasks(self, task: str) -> Iterator[str]:
        """Keys that are not as by default, and say nothing to a recipe's `task`."""
        for key in sorted(_OF_IMAGES if task == "mlm" else _OF_TEXT):
            if getattr(self, key) != type(self).model_fields[key].default:
                yield key

    def of_images(self) -> dict[str, object]:
        """The keys that images are prepared by."""
        return {key: value for key, value in self.model_dump().items() if key not in _OF_TEXT}
