"""Text from each kind of source to packed sequences, and back."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from prelora_ray.config import with_absolute_paths
from prelora_ray.config_file import parse_settings
from prelora_ray.data.check import check_prepared
from prelora_ray.data.manifest import read_manifest
from prelora_ray.data.prepare import prepare
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.data.prepare_text import pack, split_items
from prelora_ray.data.shards import PrepareError
from prelora_ray.data.sources.splits import Splits
from prelora_ray.data.sources.text import PIECE_BYTES, _lines, open_text
from prelora_ray.data.token_rows import mask
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage

POEM = "Der Mond ist aufgegangen,\ndie goldnen Sternlein prangen\nam Himmel hell und klar.\n"
SMALL = {"vocabulary": 400, "sequence_length": 16, "val_fraction": 0.5}


DAMAGED = bytes([*gzip.compress(POEM.encode(), mtime=0)[:10], *b"\xff\xff\xff", *gzip.compress(POEM.encode(), mtime=0)[13:]])
"""A stream of gzip whose header is whole."""


def documents(source: Path, column: str = "text") -> dict[str, list[str | None]]:
    """The texts of each split, in order."""
    opened = open_text(str(source), Splits(), column)
    return {split: [d.text for item in items for d in opened.reader.read(item)] for split, items in opened.items.items()}


def stored(folder: Path, split: str) -> np.ndarray:
    manifest = read_manifest(Storage(folder))
    tables = [pq.read_table(folder / shard.file)["tokens"] for shard in manifest.splits[split]]
    return np.concatenate([np.array(table.to_pylist(), np.int32).reshape(-1, 16) for table in tables])


def test_every_kind_of_file_holds_the_same_documents(tmp_path):
    texts = ["Ein Stein.", "Zwei Äpfel\nund ein Ei.", "Drei"]
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    for name, content in {"a.jsonl": lines.encode(), "a.jsonl.gz": gzip.compress(lines.encode())}.items():
        (tmp_path / name).write_bytes(content)
        assert documents(tmp_path / name) == {"train": texts}
    pq.write_table(pa.table({"body": texts}), tmp_path / "a.parquet", row_group_size=2)
    assert documents(tmp_path / "a.parquet", "body") == {"train": texts}
    (tmp_path / "LICENSE").write_text(POEM)
    assert documents(tmp_path / "LICENSE") == {"train": [POEM]}
    (tmp_path / "poem.txt.gz").write_bytes(gzip.compress(POEM.encode()))
    assert documents(tmp_path / "poem.txt.gz") == {"train": [POEM]}


def test_a_folder_has_splits_by_its_names_and_leaves_out_what_is_no_text(tmp_path):
    for name in ("train/a.txt", "train/b.md", "test/c.rst", "notes.txt", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    opened = open_text(str(tmp_path), Splits(), "text")
    assert documents(tmp_path) == {"train": ["train/a.txt", "train/b.md"], "val": ["test/c.rst"]}
    assert opened.skipped == {("no text", ".png"): 1, ("in no split", ".txt"): 1}


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_long_file_is_cut_at_the_ends_of_lines_and_nothing_is_lost(tmp_path, is_packed):
    lines = [f"line {i} ü {'x' * (i % 700)}\n" for i in range(500)]
    path = tmp_path / ("long.txt.gz" if is_packed else "long.txt")
    path.write_bytes(gzip.compress("".join(lines).encode()) if is_packed else "".join(lines).encode())
    pieces = documents(path)["train"]
    assert len(pieces) > 5 and "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") or not piece for piece in pieces)


def test_a_short_end_is_no_document_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text(POEM * (PIECE_BYTES // len(POEM) + 1))
    assert PIECE_BYTES < (tmp_path / "a.txt").stat().st_size < PIECE_BYTES + len(POEM)
    assert documents(tmp_path / "a.txt")["train"] == [(tmp_path / "a.txt").read_text()]


def test_a_row_that_is_no_utf_8_is_told_and_the_others_are_read(tmp_path):
    column = pa.array([b"fine", b"caf\xe9", None]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    opened = open_text(str(tmp_path / "a.parquet"), Splits(), "text")
    found = [document for item in opened.items["train"] for document in opened.reader.read(item)]
    assert [document.text for document in found] == ["fine", None, None]
    assert [bool(document.reason) for document in found] == [False, True, True]


@pytest.mark.parametrize(("unit", "end"), [("naïve ", " "), ("ü", "ü"), ("月", "月")])
def test_a_long_line_is_cut_behind_words_or_characters(tmp_path, unit, end):
    for shift in range(4):
        text = "\n" * shift + unit * (5 * PIECE_BYTES // len(unit.encode()))
        (tmp_path / "long.txt").write_text(text)
        pieces = documents(tmp_path / "long.txt")["train"]
        assert "".join(pieces) == text
        assert all(piece.endswith(end) and len(piece.encode()) < 2 * PIECE_BYTES + 8 for piece in pieces)


def test_a_long_json_line_stays_whole_and_is_read_once(tmp_path):
    texts = ["short", "x y " * (5 * PIECE_BYTES), "short too"]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "long.jsonl").write_bytes(content)
    assert documents(tmp_path / "long.jsonl") == {"train": texts}

    class Counted(io.BytesIO):
        num_bytes = 0

        def readline(self, size: int | None = -1) -> bytes:
            line = super().readline(size)
            self.num_bytes += len(line)
            return line

    file = Counted(content)
    for start in range(0, len(content), PIECE_BYTES):
        list(_lines(file, start, min(start + PIECE_BYTES, len(content))))
    assert file.num_bytes <= 2 * len(content)


def test_another_file_changes_nothing_of_what_is_held_out(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("text")
    settings = PrepareSettings(val_fraction=0.3)

    def held() -> set[str]:
        return {item.name for item in split_items(open_text(str(tmp_path), Splits(), "text"), "x", settings)["val"]}

    before = held()
    (tmp_path / "more.txt").write_text("text")
    assert 4 < len(before) < 20 and held() - before <= {"more.txt from byte 0"}


def test_packing_by_hand():
    sequences, left_out = pack([[10, 11, 12], [13], [14, 15]], 4, begin=2, end=3)
    assert sequences.tolist() == [[2, 10, 11, 12], [2, 3, 13, 3], [2, 14, 15, 3]] and left_out == 0
    sequences, left_out = pack([[10, 11, 12, 13]], 4, begin=2, end=3)
    assert sequences.tolist() == [[2, 10, 11, 12]] and left_out == 2
    sequences, left_out = pack([], 4, begin=2, end=3)
    assert sequences.shape == (0, 4) and left_out == 0


@pytest.fixture
def poems(tmp_path: Path) -> Path:
    """Files of verses that differ, and name special tokens."""
    source = tmp_path / "poems"
    source.mkdir()
    for i in range(8):
        (source / f"{i}.txt").write_text("".join(f"{'1' * (i + 1)} {verse} [SEP] [MASK]\n" for verse in POEM.splitlines() * 10))
    return source


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_sequences_hold_the_text(ray_cluster, tmp_path, poems, kind):
    """Byte for byte of BPE; of WordPiece but for spaces, which it does not keep."""
    out = tmp_path / "out"
    manifest = prepare(str(poems), str(out), PrepareSettings(**SMALL, tokenizer=kind), task="mlm")
    assert (manifest.task, manifest.text.sequence_length) == ("mlm", 16)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert list(manifest.classes) == [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    assert [manifest.classes[i] for i in manifest.text.special] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert manifest.classes[manifest.text.mask] == "[MASK]"
    texts = [(poems / f"{i}.txt").read_text() for i in range(8)]
    found = 0
    for split in ("train", "val"):
        rows = stored(out, split)
        assert (rows[:, 0] == tokenizer.token_to_id("[CLS]")).all() and (rows[:, 1:] != tokenizer.token_to_id("[CLS]")).all()
        assert manifest.text.mask not in rows  # that the text names it is no reason
        stream = rows[:, 1:].ravel()
        ends = np.flatnonzero(stream == tokenizer.token_to_id("[SEP]"))
        for start, stop in zip([0, *(ends[:-1] + 1)], ends, strict=True):
            text = tokenizer.decode(stream[start:stop].tolist())
            if kind == "bpe":
                assert text in texts
            else:
                assert "".join(text.split()) in ["".join(whole.split()) for whole in texts]
            found += 1
    assert found >= 6  # the last of a split may not be whole
    assert check_prepared(Storage(out)) == []
    folder, rows = Storage(out), stored(out, "train")
    content = folder.read_json("manifest.json")
    folder.write_json("manifest.json", content | {"classes": content["classes"][: rows.max()]})
    assert f"{folder}/train-00000.parquet has token {rows.max()}, and there are {rows.max()} tokens" in check_prepared(folder)


@pytest.mark.slow
def test_a_job_that_goes_on_makes_the_same_bytes_and_only_what_is_missing(ray_cluster, tmp_path, poems):
    settings = PrepareSettings(**SMALL, shard_rows=16)

    def contents(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    prepare(str(poems), str(tmp_path / "out"), settings, task="mlm")
    whole = contents(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "killed")
    (tmp_path / "killed" / "manifest.json").unlink()
    (tmp_path / "killed" / "train-00000.parquet").unlink()
    kept = tmp_path / "killed" / "tokenizer.json"
    before = kept.stat().st_mtime_ns
    prepare(str(poems), str(tmp_path / "killed"), settings, task="mlm")
    assert contents(tmp_path / "killed") == whole
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(b"{}")  # by a job with other settings, killed before it could note it
    prepare(str(poems), str(tmp_path / "killed"), settings, task="mlm")
    assert contents(tmp_path / "killed") == whole
    prepare(str(poems), str(tmp_path / "anew"), settings, task="mlm")  # the tokenizer too
    assert contents(tmp_path / "anew") == whole


def test_a_given_tokenizer_is_taken_as_it_is(ray_cluster, tmp_path, poems):
    out = tmp_path / "out"
    prepare(str(poems), str(out), PrepareSettings(**SMALL), task="mlm")
    given = tmp_path / "tokenizer.json"
    content = json.loads((out / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 4, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    given.write_text(json.dumps(content))
    settings = PrepareSettings(**SMALL, tokenizer=str(given))
    again = prepare(str(poems), str(tmp_path / "again"), settings, task="mlm")
    assert again.classes == read_manifest(Storage(out)).classes
    assert (stored(out, "train") == stored(tmp_path / "again", "train")).all()
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[MASK]"]
    del content["model"]["vocab"]["[MASK]"]
    given.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer.json is not allowed: it has no token \[MASK\] or <mask>"):
        prepare(str(poems), str(tmp_path / "third"), settings, task="mlm")


def test_sequences_with_too_few_tokens_to_mask_are_left_out_and_told(ray_cluster, tmp_path, poems):
    prepare(str(poems), str(tmp_path / "out"), PrepareSettings(**SMALL), task="mlm")
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "val").mkdir()
    (tmp_path / "in" / "train" / "a.txt").write_text(POEM * 40)
    (tmp_path / "in" / "train" / "b.txt").write_text("月" * 300)  # 20 sequences of what the tokenizer does not know
    (tmp_path / "in" / "val" / "a.txt").write_text(POEM * 20)
    settings = PrepareSettings(**SMALL, tokenizer=str(tmp_path / "out" / "tokenizer.json"))
    manifest = prepare(str(tmp_path / "in"), str(tmp_path / "again"), settings, task="mlm")
    rows = stored(tmp_path / "again", "train")
    for row in rows:
        mask(row, manifest.text, len(manifest.classes), np.random.default_rng(0))
    told = [note for note in manifest.counts.notes if "with too few tokens to mask" in note]
    assert told[0].split()[:2] in (["19", "sequences"], ["20", "sequences"])
    assert len(rows) > 20
    (tmp_path / "in" / "val" / "a.txt").write_text("月" * 300)
    with pytest.raises(PrepareError, match=r"to validate with: 301 tokens.*; 20 sequences left out, with too few"):
        prepare(str(tmp_path / "in"), str(tmp_path / "again"), settings, task="mlm")


def test_images_take_the_place_of_text_and_leave_nothing_of_it(ray_cluster, tmp_path, poems):
    out = tmp_path / "out"
    prepare(str(poems), str(out), PrepareSettings(**SMALL), task="mlm")
    manifest = prepare("digits", str(out))
    assert not (out / "tokenizer.json").exists() and not (out / "parts" / "tokenizer.json.json").exists()
    assert "size" in manifest.settings and "vocabulary" not in manifest.settings
    assert check_prepared(Storage(out)) == []


def test_the_path_of_a_tokenizer_is_made_absolute_and_its_kinds_are_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, made in {"a/t.json": str(tmp_path / "a/t.json"), "bpe": "bpe", "wordpiece": "wordpiece"}.items():
        content = {"name": "run", "task": "mlm", "model": {"name": "bert"}}
        settings = parse_settings({**content, "data": {"path": "d", "prepare": {"tokenizer": given}}})
        assert with_absolute_paths(settings).data.prepare.tokenizer == made


@pytest.mark.parametrize(
    ("files", "settings", "error", "told"),
    [
        ({"a.png": b""}, {}, UserError, "has no text to train on"),
        ({"a.parquet": b"no"}, {}, UserError, "a.parquet cannot be read"),
        ({"a.txt.gz": b"no"}, {}, UserError, "a.txt.gz cannot be read"),
        ({"a.jsonl": b"{}\n" * 9, "val.txt": b"a"}, {}, PrepareError, "it has no text under the key 'text'"),
        ({"a.jsonl": b"[\n" * 9, "val.txt": b"a"}, {}, PrepareError, "it is no JSON"),
        ({"a.jsonl": b"[" * 200_000 + b"\n", "val.txt": b"a"}, {}, PrepareError, "it is no JSON"),
        ({"a.txt.gz": DAMAGED}, {}, UserError, "a.txt.gz cannot be read: Error -3"),
        ({"a.jsonl": b'{"text": "\\ud800"}\n' * 9, "val.txt": b"a"}, {}, PrepareError, "it holds half a surrogate pair"),
        ({"a.txt": b"\xff", "val.txt": b"a"}, {}, PrepareError, "it is no text in UTF-8: invalid start byte at byte 0"),
        ({"a.txt": b"a b", "val.txt": b"a"}, {}, PrepareError, "has too little text to train on: 3 tokens, and a sequence has"),
        ({"a.txt": b"a"}, {}, UserError, "--val-fraction 0.2 leaves no text of"),
        ({"a.txt": b"a"}, {"quality": 5}, UserError, "--quality 5 is not allowed with --task mlm, which prepares text"),
        ({"a.txt": b"a", "val.txt": b"a"}, {"tokenizer": "no"}, UserError, "it must be wordpiece, bpe, or a tokenizer.json"),
    ],
)
def test_bad_input_gets_one_sentence(ray_cluster, tmp_path, files, settings, error, told):
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(error) as raised:
        prepare(str(tmp_path / "in"), str(tmp_path / "out"), PrepareSettings(**settings), task="mlm")
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_options_of_text_say_nothing_to_images(ray_cluster, tmp_path):
    with pytest.raises(UserError, match="--vocabulary 500 is not allowed with --task classification, which prepares images"):
        prepare("digits", str(tmp_path / "out"), PrepareSettings(vocabulary=500))
