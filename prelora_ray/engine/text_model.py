"""The models of transformers that a run trains, by their configuration alone: nothing is downloaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
from transformers.utils import logging

from prelora_ray.data.tokenizer import named_tokens

logging.disable_progress_bar()
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # transformers' own

_RESERVED = {
    "vocab_size": "the vocabulary comes with the data, and model.num_classes may say what it must be",
    "pad_token_id": "no sequence is padded",
    "is_decoder": "masked tokens are guessed from both sides",
    "add_cross_attention": "masked tokens are guessed from their own sequence alone",
}


class Bert(BertForMaskedLM):
    """BERT (arXiv 1810.04805) without dropout, whose tensors have transformers' own names."""

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (n, length), int64, to logits (n, length, vocabulary); with `positions` (n, k), int64, to those of the
        tokens there, (n, k, vocabulary), which spares the head the others. Sequences are packed: none is padded."""
        # Past BertModel's own forward, some versions of which make a mask once a CUDA graph is captured.
        hidden = self.bert.encoder(self.bert.embeddings(input_ids=tokens)).last_hidden_state
        if positions is not None:
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        logits: torch.Tensor = self.cls(hidden)
        return logits

    def get_classifier(self) -> nn.Module:
        """The head, the embeddings of tokens among it, whose weight it shares: as timm names it."""
        head: nn.Module = self.cls
        return head


def save_pretrained(config: Any, tensors: dict[str, torch.Tensor], folder: str | Path, tokenizer: Tokenizer) -> None:
    """Writes a BERT of a configuration, with a tokenizer, as transformers loads them: `from_pretrained` of its Auto
    classes."""
    names, config = named_tokens(tokenizer), copy.deepcopy(config)
    config.pad_token_id = tokenizer.token_to_id(names["pad_token"]) if "pad_token" in names else None
    plain = BertForMaskedLM(config)
    plain.load_state_dict(tensors)
    plain.save_pretrained(folder)
    length = config.max_position_embeddings
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names).save_pretrained(folder)


def bert(options: dict[str, Any], vocabulary: int) -> Bert:
    """A freshly drawn model. `options` are those of `transformers.BertConfig`, with dropout off by default.

    Raises ValueError for an option that it has not, or that is not allowed.
    """
    known = BertConfig().to_dict()
    for key in options:
        if key in _RESERVED:
            raise ValueError(f"{key} is not allowed: {_RESERVED[key]}")
        if key not in known:
            raise ValueError(f"BertConfig knows no {key}")
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # Else transformers takes token 0 for padding, whose embedding begins as zeros and learns nothing.
    own: dict[str, Any] = {"vocab_size": vocabulary, "pad_token_id": None, "architectures": ["BertForMaskedLM"]}
    return Bert(BertConfig(**without_dropout | options | own))
