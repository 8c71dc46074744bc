"""Tokenizers of the library `tokenizers`: trained on a text, or given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prelora_ray.data.manifest import TextFormat
from prelora_ray.errors import UserError, one_line
from prelora_ray.extras import check_installed
from prelora_ray.storage import Storage

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
_CHARACTERS = 1000
"""Most in an alphabet, as in BERT."""
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BEGIN, _END, _MASK = ("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[MASK]", "<mask>")
"""What BERT and RoBERTa call them."""


def train_tokenizer(kind: str, texts: Callable[[], Iterator[str]], vocabulary: int) -> Tokenizer:
    """A WordPiece tokenizer as BERT has it, which keeps case and accents, or a byte-level BPE, which loses nothing.

    The same texts give the same tokenizer; they are read anew by each call of `texts`.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    options: dict[str, Any] = {"vocab_size": vocabulary, "show_progress": False}
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        alphabet = _alphabet(tokenizer.normalizer.normalize_str(text) for text in texts())
        # The trainer numbers the characters inside words as it finds them, each time in another order, and breaks ties
        # by number: as special tokens they have theirs from the start.
        special = [*_SPECIAL, *(f"##{character}" for character in alphabet)]
        options |= {"initial_alphabet": alphabet, "limit_alphabet": len(alphabet), "special_tokens": special}
        tokenizer.train_from_iterator(texts(), trainers.WordPieceTrainer(**options))
        words = models.WordPiece(vocab=tokenizer.get_vocab(), unk_token="[UNK]")
        trained, tokenizer = tokenizer, Tokenizer(words)
        tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.add_special_tokens(_SPECIAL)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": _SPECIAL}
        tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(**options))
    begin, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", begin), ("[SEP]", end)]
    )
    return tokenizer


def _alphabet(texts: Iterator[str]) -> list[str]:
    """The characters that occur most often, sorted; words with others are unknown."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    known = sorted((character for character in counts if not character.isspace()), key=lambda c: (-counts[c], c))
    return sorted(known[:_CHARACTERS])


def read_tokenizer(path: str, what: str) -> Tokenizer:
    """A `tokenizer.json`. Raises UserError, which names it as `what`, where it cannot be read, is none, or lacks a
    token that masked language modelling needs."""
    check_installed(what, "text", "tokenizers")
    from tokenizers import Tokenizer

    root, _, name = path.rpartition("/")
    try:
        tokenizer = Tokenizer.from_str(Storage(root or ".").read_bytes(name).decode())
    except OSError as error:
        raise UserError(f"{what} cannot be read: {one_line(error)}") from None
    except Exception as error:  # whatever the library raises over a damaged file
        raise UserError(f"{what} is no tokenizer of the library `tokenizers`: {one_line(error)[:200]}") from None
    for names in (_BEGIN, _END, _MASK):
        if _id_of(tokenizer, names) is None:
            raise UserError(f"{what} is not allowed: it has no token {names[0]} or {names[1]}")
    return tokenizer


def vocabulary_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens by their numbers; a number without one has a name of its own."""
    tokens = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    return tuple(tokens.get(number, f"[unused{number}]") for number in range(max(tokens) + 1))


def text_format(tokenizer: Tokenizer, sequence_length: int) -> TextFormat:
    """What sequences of a tokenizer are."""
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ends = [_id_of(tokenizer, names) for names in (_BEGIN, _END, _MASK)]
    assert None not in ends, "a tokenizer is checked as it is read"
    return TextFormat(sequence_length, tuple(sorted(special | set(ends))), ends[2])  # type: ignore[arg-type]


def ends_of(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens that begin a sequence and end a document."""
    return _id_of(tokenizer, _BEGIN), _id_of(tokenizer, _END)  # type: ignore[return-value]


def named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens by what transformers calls them."""
    names = {
        "pad_token": ("[PAD]", "<pad>"),
        "unk_token": ("[UNK]", "<unk>"),
        "cls_token": _BEGIN,
        "sep_token": _END,
        "mask_token": _MASK,
    }
    found = {name: next((t for t in tokens if tokenizer.token_to_id(t) is not None), None) for name, tokens in names.items()}
    return {name: token for name, token in found.items() if token is not None}


def _id_of(tokenizer: Tokenizer, names: tuple[str, ...]) -> int | None:
    return next((number for name in names if (number := tokenizer.token_to_id(name)) is not None), None)
