"""A run on text through all phases, and what becomes of its model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM, AutoTokenizer

from prelora_ray import cli
from prelora_ray.config import Settings
from prelora_ray.config_file import parse_settings
from prelora_ray.data.manifest import read_manifest
from prelora_ray.data.prepare import prepare
from prelora_ray.data.prepare_settings import PrepareSettings
from prelora_ray.data.rows import read_tokens
from prelora_ray.data.token_rows import masked_tokens
from prelora_ray.errors import UserError
from prelora_ray.fault_tolerance.checkpoint import Checkpoints
from prelora_ray.inference.evaluate import evaluate
from prelora_ray.inference.export import Exported, export
from prelora_ray.inference.load import load_trained
from prelora_ray.recorded.run import RunRecords
from prelora_ray.report.page import write_report
from prelora_ray.run_folder import RunFolder
from prelora_ray.storage import Storage
from prelora_ray.terminal.console import would_train
from prelora_ray.train.checks import check_data, check_settings
from prelora_ray.train.dry_run import dry_run
from prelora_ray.train.initial_weights import initial_weights
from prelora_ray.train.run import train
from tests.disturbed import train_disturbed
from tests.runs import assert_same_bits, final

LENGTH = 16
OPTIONS = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "max_position_embeddings": LENGTH,
}
SWITCH, FREEZE, EPOCHS = 3, 4, 5


@pytest.fixture(scope="module")
def text(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's reference, in tokens."""
    out = tmp_path_factory.mktemp("text") / "pydoc"
    prepare("pydoc", str(out), PrepareSettings(vocabulary=500, sequence_length=LENGTH, val_fraction=0.1), task="mlm")
    return out


def settings(text: Path, storage: Path, name: str, workers: int = 2, **sections: Any) -> Settings:
    content: dict[str, Any] = {
        "data": {"path": str(text), "batch_size": 48, "cell": 8, "max_batches": 8, "decoders": 1},
        "model": {"name": "bert", "options": OPTIONS},
        "train": {"epochs": EPOCHS, "ramp_epochs": 1, "seed": 5, "ema": 0.9},
        "method": {"tau": 1000, "zeta": 1000, "window_epochs": 1, "warmup_epochs": 1, "r_min": 2, "r_max": 8},
        "workers": {"min": workers, "max": workers, "cpus": 0.5},
        "checkpoint": {"every_steps": 3},
    }
    for section, keys in sections.items():
        content[section] = content.get(section, {}) | keys
    return parse_settings({"name": name, "storage": str(storage), "task": "mlm", "audit_samples": True, **content})


@pytest.fixture(scope="module")
def run(text: Path, storage: Path) -> Settings:
    run = settings(text, storage, "bert")
    train(run)
    return run


def test_a_run_on_text_goes_through_all_phases(run, tmp_path):
    folder = RunFolder.of(run)
    records, result = RunRecords(folder), folder.read_result()
    assert [line.phase for line in records.epochs] == ["full"] * SWITCH + ["warmup", "lora"]
    assert (result["switch_epoch"], result["freeze_epoch"], result["val_top1"]) == (SWITCH, FREEZE, None)
    last = records.epochs[-1]
    assert last.images == 8 * 48 and last.image_size is None and last.val_top1 is None
    assert last.val_perplexity == pytest.approx(math.exp(last.val_loss)) and 0 < last.val_accuracy < 1
    assert last.loss < records.epochs[0].loss < 1.1 * math.log(500)
    for key in ("val_loss", "val_accuracy", "val_perplexity"):
        assert result[key] == getattr(last, key)
    assert result["best_val_perplexity"] == min(line.val_perplexity for line in records.epochs)
    assert result["ema_perplexity"] == last.ema_perplexity > 1
    write_report([str(folder)], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "loss per masked token" in page and "perplexity" in page and "top-1" not in page


@pytest.fixture(scope="module")
def exported(run: Settings, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With the data of another folder, whose tokenizer makes letters small."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(text, folder / "data")
    tokenizer = folder / "data" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["normalizer"]["lowercase"] = True
    tokenizer.write_text(json.dumps(content))
    return export(str(RunFolder.of(run)), str(folder / "out"), str(folder / "data"))


def test_its_export_is_what_transformers_and_peft_load(run, text, exported):
    """On real text: the logits of the run's own model, whoever loads it."""
    done, out = exported, Path(exported.path)
    assert done.forms == ("adapter", "transformers") and max(done.max_abs_diff.values()) < 1e-4
    manifest = read_manifest(Storage(text))
    tokens = torch.from_numpy(read_tokens(str(text), manifest, 4)).long()
    own = load_trained(str(RunFolder.of(run))).module
    whole = AutoModelForMaskedLM.from_pretrained(out / "transformers").eval()
    base = AutoModelForMaskedLM.from_pretrained(out / "adapter" / "base").eval()
    adapted = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    with torch.no_grad():
        expected = own(tokens)
        for model in (whole, adapted):
            torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
        assert (AutoModelForMaskedLM.from_pretrained(out / "adapter" / "base")(input_ids=tokens).logits != expected).any()
    tokenizer = AutoTokenizer.from_pretrained(out / "transformers")
    assert (tokenizer.mask_token, tokenizer.cls_token, tokenizer.sep_token) == ("[MASK]", "[CLS]", "[SEP]")
    assert whole.config.pad_token_id == tokenizer.pad_token_id == manifest.classes.index("[PAD]")
    assert json.loads((out / "transformers" / "tokenizer.json").read_text())["normalizer"]["lowercase"]
    assert tokenizer.convert_ids_to_tokens(list(range(500))) == list(manifest.classes)
    initial = initial_weights(str(out))
    assert all(torch.equal(initial[name], tensor) for name, tensor in whole.state_dict().items() if name in initial)
    with pytest.raises(UserError, match="predict is for images, and this model takes text"):
        load_trained(str(out)).predict("image.png")


def test_folders_of_transformers_that_are_no_whole_bert_are_refused(exported, tmp_path):
    whole, folder = Path(exported.path, "transformers"), tmp_path / "other"
    shutil.copytree(whole, folder)
    tensors = safetensors.torch.load_file(whole / "model.safetensors")
    del tensors["bert.embeddings.position_embeddings.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"its model.safetensors lacks 1 tensor: bert.embeddings.position_embeddings.weight$"):
        load_trained(str(folder))
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    with pytest.raises(UserError, match=r"^'.*other' is not allowed: its config.json has model_type 'roberta', and it must be"):
        load_trained(str(folder))


def test_a_run_starts_from_weights_of_its_own_tokens_alone(run, text, exported, tmp_path):
    folder, other = RunFolder.of(run), tmp_path / "other"
    shutil.copytree(text, other)
    content = json.loads((other / "manifest.json").read_text())
    content["classes"][7] = "another"
    (other / "manifest.json").write_text(json.dumps(content))
    (newest, _) = Checkpoints(folder).newest()
    for source in (str(folder), f"{folder}/checkpoints/{newest.name}", exported.path, f"{exported.path}/transformers"):
        same = settings(text, tmp_path, "same", model={"init_from": source})
        assert check_settings(same, RunFolder.of(same)) is None
        assert check_data(same, RunFolder.of(same)).classes == read_manifest(Storage(text)).classes
        begun = settings(other, tmp_path, "begun", model={"init_from": source})
        with pytest.raises(UserError, match=r"model\.init_from = .* is not allowed: token 7 is 'another' in '.*other', and"):
            train(begun)


def test_what_it_would_train_on_is_told(text, tmp_path):
    told = "\n".join(would_train(dry_run(settings(text, tmp_path, "new"))))
    assert "validation sequences over a vocabulary of 500 tokens\n" in told


@pytest.mark.slow
def test_it_is_evaluated_over_all_of_the_validation_text(run, text, digits):
    """As the run did over its own share of it: with masks of their own for each sequence."""
    report = evaluate(str(RunFolder.of(run)))
    manifest = read_manifest(Storage(text))
    assert report.evaluation.tokens == manifest.num_images("val") * masked_tokens(LENGTH)
    assert report.evaluation.loss == pytest.approx(RunFolder.of(run).read_result()["val_loss"], rel=0.1)
    with pytest.raises(UserError, match=r"holds images, and .* was trained on text"):
        evaluate(str(RunFolder.of(run)), str(digits))
    with pytest.raises(UserError, match=r"--confusion is not allowed: .* takes text, which has no classes"):
        cli.evaluate(str(RunFolder.of(run)), "/nowhere", confusion=True)  # before the data are looked at
    with pytest.raises(UserError, match=r"not allowed with task = 'mlm': it was prepared for 'classification'"):
        train(settings(digits, Path(run.storage), "other"))
    longer = settings(text, Path(run.storage), "short", model={"options": {**OPTIONS, "max_position_embeddings": 8}})
    with pytest.raises(UserError, match=r"max_position_embeddings = 8 is not allowed: sequences in .* have 16 tokens"):
        train(longer)


@pytest.mark.slow
def test_a_run_that_is_killed_in_each_phase_ends_with_the_same_bits(text, storage):
    """Phases of two epochs, so that a kill which comes late is still in its own."""
    longer = {"train": {"epochs": 7}, "method": {"warmup_epochs": 2}}
    disturbed, undisturbed = (settings(text, storage, name, **longer) for name in ("killed", "left-alone"))
    done = train_disturbed(disturbed, dict.fromkeys((1, 3, 5), "worker killed"))
    assert done.result["restarts"] == 3 and done.phases == ["full", "warmup", "lora"]
    train(undisturbed)
    assert_same_bits(final(disturbed), final(undisturbed))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_other_numbers_of_workers_come_to_the_same(text, storage, workers):
    """In float64 to rounding: the masks are the same, and so is what the loss is the mean over."""
    ends = []
    for number in (2, workers):
        own = settings(
            text,
            storage,
            f"fp64-{number}-{workers}",
            number,
            train={"precision": "fp64", "epochs": 2},
            method={"enabled": False},
        )
        train(own)
        ends.append(final(own).model)
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=0, atol=1e-8)
