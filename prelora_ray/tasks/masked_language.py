"""Masked language modelling (BERT, arXiv 1810.04805): the tokens behind a mask are guessed from those around them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from prelora_ray.config import Settings
from prelora_ray.data.batch import Batch
from prelora_ray.data.manifest import Manifest
from prelora_ray.data.token_rows import TokenRows, masked_tokens
from prelora_ray.tasks.task import Evaluation, Evaluator, Forward, Inputs, Task
from prelora_ray.words import counted

_LARGEST = 700.0
"""Loss whose exponential is still finite."""


class MaskedLanguage(Task):
    """`forward` takes tokens (n, length) and masked positions (n, k) to logits (n, k, vocabulary).

    What is masked is drawn where rows are decoded, by (seed, epoch, sample).
    """

    def __init__(self, settings: Settings, manifest: Manifest, dtype: torch.dtype) -> None:
        assert manifest.text is not None, "the settings are checked against the data"
        self.counts_per_sample = masked_tokens(manifest.text.sequence_length)
        self._dtype = dtype

    @staticmethod
    def rows(settings: Settings, manifest: Manifest) -> TokenRows:
        assert manifest.text is not None, "the settings are checked against the data"
        return TokenRows(manifest.text, len(manifest.classes), settings.train.seed)

    def draw(self, batch: Batch, cells: Sequence[int], cell: int) -> Inputs:
        return dict(batch.tensors)

    def loss(self, forward: Forward, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of the masked tokens, and their number."""
        _, losses, masked = _losses(forward, inputs, self._dtype)
        return losses.sum(), masked.sum()

    def evaluator(self, device: torch.device) -> TokenEvaluator:
        return TokenEvaluator(device)


@dataclass(frozen=True)
class TokenEvaluation(Evaluation):
    """`loss` is the mean cross entropy of a masked token."""

    accuracy: float
    """Share of the masked tokens that are the likeliest of the vocabulary, in 0..1."""
    perplexity: float
    """e to the power of the loss."""
    tokens: int
    """Masked ones."""

    @property
    def told(self) -> str:
        measures = f"accuracy {self.accuracy:.2%}, perplexity {self.perplexity:.2f}"
        return f"loss {self.loss:.4f} per masked token, {measures} over {counted(self.tokens, 'masked token')}"


class TokenEvaluator(Evaluator):
    """Sums: losses, best guesses that are right, masked tokens."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(3, device)

    def add(self, forward: Forward, tensors: Mapping[str, torch.Tensor]) -> None:
        logits, losses, masked = _losses(forward, tensors, torch.float32)
        hits = (logits.argmax(-1) == tensors["targets"]) & masked
        self.sums += torch.stack([losses.sum().double(), hits.sum(), masked.sum()])

    def result(self, sums: torch.Tensor) -> TokenEvaluation:
        losses, hits, tokens = sums.tolist()
        loss = losses / tokens
        return TokenEvaluation(loss, hits / tokens, math.exp(min(loss, _LARGEST)), int(tokens))


def _losses(
    forward: Forward, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each masked position, (n, k): logits; loss, 0 in an empty slot; whether the slot is filled."""
    logits, targets = forward(tensors["tokens"].long(), tensors["positions"].long()), tensors["targets"].long()
    logits = logits if logits.dtype == torch.float64 else logits.to(dtype)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    return logits, losses.view_as(targets), targets >= 0
