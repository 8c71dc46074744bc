"""The rows of prepared text, and what decoders make of them: sequences of tokens, some of them masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prelora_ray.data.batch import Arrays, Columns, Decoder
from prelora_ray.data.draws import Draw, generator
from prelora_ray.data.manifest import Split, TextFormat
from prelora_ray.data.order import Ids

Tokens = NDArray[np.int32]
MASKED_SHARE = 0.15
"""Of a sequence's tokens, as in BERT."""
_HIDDEN, _REPLACED = 0.8, 0.1
"""Of the masked tokens: shares that the mask stands in for, and a token that is drawn; the others stay as they are."""


def masked_tokens(sequence_length: int) -> int:
    """How many tokens of each sequence are masked: as in BERT's own code a fixed number, not one by chance."""
    return max(1, round(MASKED_SHARE * sequence_length))


def mask(
    tokens: Tokens, text: TextFormat, vocabulary: int, rng: np.random.Generator
) -> tuple[Tokens, NDArray[np.int32], Tokens]:
    """Masks a sequence (length,): what the model takes (length,), and of the k masked tokens, in order, the positions
    (k,) and the tokens that were there (k,).

    Special tokens are never masked; at least k others must be there. A token that is drawn may be any of the
    vocabulary.
    """
    candidates = np.flatnonzero(~np.isin(tokens, text.special))
    positions = np.sort(rng.choice(candidates, masked_tokens(len(tokens)), replace=False)).astype(np.int32)
    targets, shown = tokens[positions], tokens.copy()
    chance, drawn = rng.random(len(positions)), rng.integers(vocabulary, size=len(positions), dtype=np.int32)
    shown[positions] = np.where(chance < _HIDDEN, text.mask, np.where(chance < _HIDDEN + _REPLACED, drawn, targets))
    return shown, positions, targets


@dataclass(frozen=True)
class TokenRows:
    """Sequences of tokens, which become `tokens` (n, length), masked, `positions` of the masked ones (n, k), and their
    `targets` (n, k), all int32; 0, 0 and -1 where a slot is empty."""

    text: TextFormat
    vocabulary: int
    seed: int

    @property
    def columns(self) -> Columns:
        return {"tokens": pa.list_(pa.int32(), self.text.sequence_length)}

    def row_bytes(self, split: Split, epoch: int) -> int:
        return 4 * (self.text.sequence_length + 2 * masked_tokens(self.text.sequence_length))

    @property
    def all_row_bytes(self) -> set[int]:
        return {self.row_bytes("train", 0)}

    def decoder(self) -> Decoder:
        return self._decode

    def _decode(self, split: Split, epoch: int, ids: Ids, columns: Mapping[str, pa.Array]) -> Arrays:
        length = self.text.sequence_length
        tokens = np.zeros((len(ids), length), np.int32)
        positions = np.zeros((len(ids), masked_tokens(length)), np.int32)
        targets = np.full_like(positions, -1)
        stored = columns["tokens"].flatten().to_numpy().reshape(-1, length)
        for slot, row in zip(np.flatnonzero(ids >= 0), stored, strict=True):
            rng = self._generator(split, epoch, int(ids[slot]))
            tokens[slot], positions[slot], targets[slot] = mask(row, self.text, self.vocabulary, rng)
        return {"tokens": tokens, "positions": positions, "targets": targets}

    def _generator(self, split: Split, epoch: int, sample: int) -> np.random.Generator:
        """Validation has the same masks in each epoch, in each run and for each model, so that all can be compared."""
        return generator(self.seed, Draw.MASK, epoch, sample) if split == "train" else generator(0, Draw.FIXED_MASK, sample)
