"""Masks by their statistics, the loss against transformers' own, and that neither depends on workers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertForMaskedLM
from transformers.models.bert import modeling_bert

from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.batch import Batch
from prelora_ray.data.manifest import Manifest, Shard, TextFormat
from prelora_ray.data.token_rows import TokenRows, mask, masked_tokens
from prelora_ray.engine.check import check_model
from prelora_ray.engine.flops import forward_flops
from prelora_ray.engine.model import create_model
from prelora_ray.engine.pretrained import load_pretrained
from prelora_ray.engine.state import TrainState
from prelora_ray.engine.step import TrainStep
from prelora_ray.errors import UserError
from prelora_ray.train.batch_stream import stream_plan

VOCABULARY, LENGTH, MASK = 50, 20, 4
TEXT = TextFormat(LENGTH, (0, 1, 2, 3, MASK), MASK)
TINY_BERT = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "max_position_embeddings": LENGTH,
}
IDS = np.array([*range(11), -1, *range(11, 14), -1])  # 14 of 16 slots


def settings(path: Path, **train: Any) -> Settings:
    return parse_settings(
        {
            "name": "run",
            "storage": str(path),
            "task": "mlm",
            "data": {"path": str(path), "batch_size": 16, "cell": 4},
            "model": {"name": "bert", "options": TINY_BERT},
            "train": {"precision": "fp64", "epochs": 20, "ramp_epochs": 0, "clip_norm": None, **train},
            "method": {"r_max": 8},
        }
    )


def manifest(rows: int = 14) -> Manifest:
    shard = Shard("none", (rows,), 0, "")
    tokens = tuple(f"token {i}" for i in range(VOCABULARY))
    return Manifest(tokens, {"train": (shard,), "val": (shard,)}, 0, {}, text=TEXT)


def stored() -> np.ndarray:
    """Sequences that begin with 2 and hold a document's end, 3."""
    tokens = np.random.default_rng(0).integers(5, VOCABULARY, (14, LENGTH), dtype=np.int32)
    tokens[:, 0], tokens[:, 7] = 2, 3
    return tokens


def batch(ids: np.ndarray = IDS, epoch: int = 0) -> Batch:
    column = pa.FixedSizeListArray.from_arrays(pa.array(stored()[ids[ids >= 0]].ravel()), LENGTH)
    arrays = TokenRows(TEXT, VOCABULARY, 0).decoder()("train", epoch, ids, {"tokens": column})
    return Batch("train", epoch, 0, {name: torch.from_numpy(array) for name, array in arrays.items()}, ids)


def train_step(run: Settings) -> TrainStep:
    state = TrainState(run, VOCABULARY, 1, torch.device("cpu"), 1)
    return TrainStep(state, stream_plan(run, manifest(), 0, 1))


def test_masks_are_those_of_bert():
    """15 % of a sequence's tokens, and of these 80 % hidden, 10 % replaced and 10 % as they were, within four standard
    errors; the tokens that separate documents never."""
    text, length, n = TextFormat(100, (0, 1, 2, 3, MASK), MASK), 100, 2000
    rng = np.random.default_rng(1)
    tokens = np.full(length, 7, np.int32)
    tokens[[0, 31, 99]] = 2, 3, 3
    hidden = kept = other = 0
    counts = np.zeros(length)
    for _ in range(n):
        shown, positions, targets = mask(tokens, text, 1000, rng)
        assert len(set(positions)) == 15 and (np.diff(positions) > 0).all()
        assert (targets == 7).all() and (np.delete(shown, positions) == np.delete(tokens, positions)).all()
        counts[positions] += 1
        hidden += (shown[positions] == MASK).sum()
        kept += (shown[positions] == 7).sum()
        other += (~np.isin(shown[positions], (MASK, 7))).sum()
    total = 15 * n
    for share, seen in ((0.8 + 0.1 / 1000, hidden), (0.1 + 0.1 / 1000, kept), (0.1 * 998 / 1000, other)):
        assert abs(seen / total - share) < 4 * math.sqrt(share * (1 - share) / total)
    assert (counts[[0, 31, 99]] == 0).all()
    share = 15 / 97
    assert (abs(np.delete(counts, [0, 31, 99]) / n - share) < 5 * math.sqrt(share * (1 - share) / n)).all()


def test_a_mask_is_drawn_by_seed_epoch_and_sample_and_in_validation_by_the_sample_alone():
    def decoded(split: str, seed: int, epoch: int, ids: list[int]) -> np.ndarray:
        column = pa.FixedSizeListArray.from_arrays(pa.array(stored()[ids].ravel()), LENGTH)
        arrays = TokenRows(TEXT, VOCABULARY, seed).decoder()(split, epoch, np.array(ids), {"tokens": column})  # type: ignore[arg-type]
        return np.concatenate([arrays["tokens"], arrays["positions"], arrays["targets"]], axis=1)

    whole = decoded("train", 5, 2, list(range(14)))
    assert (decoded("train", 5, 2, [9, 3]) == whole[[9, 3]]).all()  # whatever else is in a block
    assert (decoded("train", 5, 3, list(range(14))) != whole).any(1).all()
    assert (decoded("train", 6, 2, list(range(14))) != whole).any(1).all()
    fixed = decoded("val", 5, 2, list(range(14)))
    assert (decoded("val", 6, 7, [13]) == fixed[[13]]).all()


@pytest.mark.parametrize("micro_batch", [None, 4, 8])
def test_loss_and_gradients_are_those_of_transformers(tmp_path, micro_batch):
    """`BertForMaskedLM` with labels takes the mean over all masked tokens of a batch, however it is cut."""
    step, content = train_step(settings(tmp_path, micro_batch=micro_batch)), batch()
    reference = BertForMaskedLM(step.state.model.config).double()
    reference.load_state_dict(step.state.model.state_dict())
    tokens, positions = (content.tensors[name][IDS >= 0].long() for name in ("tokens", "positions"))
    labels = torch.full_like(tokens, -100).scatter(1, positions, content.tensors["targets"][IDS >= 0].long())
    result = reference(input_ids=tokens, labels=labels)
    result.loss.backward()
    gradients: dict[str, torch.Tensor] = {}
    step.state.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in step.state.model.named_parameters()})
    )
    step.train(content)
    assert gradients.keys() == dict(reference.named_parameters()).keys()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
    count = 14 * masked_tokens(LENGTH)
    assert step.epoch_sums() == (pytest.approx(count * result.loss.item(), rel=1e-9), count)


def test_bert_makes_no_mask(tmp_path, monkeypatch):
    """What transformers decides of one may depend on whether a CUDA graph is captured, and blocks are compiled once."""
    masked: list[Any] = []
    step = train_step(settings(tmp_path))
    block = step.state.model.get_submodule("bert.encoder.layer.0")
    block.register_forward_pre_hook(lambda _, given, named: masked.extend([*given[1:], *named.values()]), with_kwargs=True)
    monkeypatch.setattr(modeling_bert, "create_bidirectional_mask", lambda **_: pytest.fail("a mask is made"))
    step.train(batch())
    assert not [argument for argument in masked if isinstance(argument, torch.Tensor)]


def test_evaluation_is_of_masked_tokens_alone(tmp_path):
    step, content = train_step(settings(tmp_path, micro_batch=8)), batch()
    (result,) = step.evaluate([content, content])
    filled = IDS >= 0
    tokens, positions, targets = (content.tensors[name][filled].long() for name in ("tokens", "positions", "targets"))
    with torch.no_grad():
        logits = step.state.model.eval()(tokens)
    own = logits[torch.arange(14)[:, None], positions]
    loss = torch.nn.functional.cross_entropy(own.flatten(0, 1), targets.flatten()).item()
    assert result.tokens == 2 * 14 * masked_tokens(LENGTH)
    assert result.loss == pytest.approx(loss) and result.perplexity == pytest.approx(math.exp(loss))
    assert result.accuracy == pytest.approx((own.argmax(-1) == targets).double().mean().item())


def test_the_head_of_a_model_shares_its_embeddings_through_all_phases(tmp_path):
    state = train_step(settings(tmp_path)).state
    assert state.model.cls.predictions.decoder.weight is state.model.bert.embeddings.word_embeddings.weight
    names = [name for name, _ in state.model.named_parameters()]
    assert "cls.predictions.decoder.weight" not in names


def test_every_token_has_an_embedding_that_learns(tmp_path):
    embeddings = train_step(settings(tmp_path)).state.model.bert.embeddings.word_embeddings
    tokens = torch.arange(VOCABULARY)
    embeddings(tokens).sum().backward()
    assert (embeddings.weight != 0).all() and (embeddings.weight.grad == 1).all()


def test_the_targets_of_bert_are_a_vits_by_name(tmp_path):
    state = train_step(settings(tmp_path)).state
    stored_in = {target.name: target.stored_in for target in state.targets if target.layer == 1}
    block = "bert.encoder.layer.1"
    assert stored_in == {
        **{f"{block}.attention.self.{name}": f"{block}.attention.self.{name}" for name in ("query", "key", "value")},
        f"{block}.attention.output.proj": f"{block}.attention.output.dense",
        f"{block}.intermediate.fc1": f"{block}.intermediate.dense",
        f"{block}.output.fc2": f"{block}.output.dense",
    }
    assert [target.family for target in state.targets] == ["query", "key", "value", "proj", "fc1", "fc2"] * 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": "classification"}, "model.name = 'bert' is not allowed with task = 'classification': set task: mlm"),
        ({"model": {"name": "resnet50"}}, "model.name = 'resnet50' is not allowed with task = 'mlm': it trains bert"),
        ({"augment": {"mixup": 0.8}}, "augment.mixup = 0.8 is not allowed with task = 'mlm': it is for images alone"),
        ({"data": {"path": "x", "mean": [0.5]}}, "data.mean = [0.5, 0.5, 0.5] is not allowed with task = 'mlm'"),
        ({"data": {"path": "x", "prepare": {"quality": 5}}}, "data.prepare.quality = 5 is not allowed with task = 'mlm'"),
        ({"model": {"name": "bert", "drop_path": 0.1}}, "model.drop_path = 0.1 is not allowed with task = 'mlm'"),
        ({"train": {"layer_decay": 0.5}}, "train.layer_decay = 0.5 is not allowed with task = 'mlm'"),
        ({"train": {"precision": "fp8"}}, "train.precision = 'fp8' is not allowed with task = 'mlm'"),
        ({"train": {"resolution": [{"until": 1, "image_size": 4}]}}, "train.resolution = "),
    ],
)
def test_what_says_nothing_to_text_is_refused(changes, told):
    content = {"name": "run", "task": "mlm", "data": {"path": "x"}, "model": {"name": "bert"}, **changes}
    with pytest.raises(UserError) as error:
        parse_settings(content)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"vocab_size": 7}, "vocab_size is not allowed: the vocabulary comes with the data"),
        ({"pad_token_id": 0}, "pad_token_id is not allowed: no sequence is padded"),
        ({"depth": 7}, "BertConfig knows no depth"),
        (
            {"hidden_dropout_prob": 0.1},
            "turn on dropout in bert.embeddings.dropout, which no restart could repeat: leave it out",
        ),
        ({"hidden_size": 15}, "is not a multiple of the number of attention heads"),
    ],
)
def test_options_that_bert_has_not_are_refused(options, told):
    model = {"name": "bert", "options": {**TINY_BERT, **options}}
    with pytest.raises(UserError) as error:
        check_model(parse_settings({"name": "run", "task": "mlm", "data": {"path": "x"}, "model": model}))
    assert told in str(error.value)


def test_operations_are_those_of_sequences_as_long_as_the_datas(tmp_path):
    model = settings(tmp_path).model
    short = model.model_copy(update={"options": TINY_BERT | {"max_position_embeddings": LENGTH // 2}})
    expected = forward_flops(short, VOCABULARY)
    assert forward_flops(model, VOCABULARY, sequence_length=LENGTH // 2) == expected < forward_flops(model, VOCABULARY)


def test_the_names_of_the_first_berts_are_known(tmp_path):
    """transformers renames them too as it loads a file."""
    model = settings(tmp_path).model
    trained, fresh = (create_model(model, VOCABULARY, seed=seed) for seed in (1, 2))
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, tensor in trained.state_dict().items():
        ending = ".".join(name.split(".")[-2:])
        old[name.removesuffix(ending) + names.get(ending, ending)] = tensor
    assert sum("gamma" in name for name in old) == 6
    assert load_pretrained(fresh, old, "x") == []
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in fresh.state_dict().items())
