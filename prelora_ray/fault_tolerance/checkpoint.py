"""Checkpoints in the run folder: written file by file, committed by a manifest that comes last.

    checkpoints/<epoch>-<batch>/
      model.safetensors     the timm model's tensors; in phase lora those that are not in base.safetensors
      adapter/              PEFT's adapter_model.safetensors and adapter_config.json, once switched
      optimizer.safetensors the optimizer's state by parameter name
      ema.safetensors       with `train.ema`, the averaged weights, merged, by timm's names
      state.json            position, phases, the test's windows, whether a change of phase is still to come (a fork)
      manifest.json         size and SHA-256 of every file above, and of the base that it refers to; phase and score
    checkpoints/base.safetensors    what phase lora has frozen, stored once

The name is the position: epochs done, and batches done in the next epoch. A checkpoint that was found damaged is set
aside as <epoch>-<batch>.damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from prelora_ray.engine.optim import OptimizerState
from prelora_ray.engine.snapshot import Snapshot, Tensors
from prelora_ray.errors import UserError
from prelora_ray.storage import Storage, patiently
from prelora_ray.words import counted

BASE = "base.safetensors"
_SCHEMA_VERSION = 3
_SCORES = {2: "val_top1", 3: "score"}
"""The score's name in the schemas that are read."""
_STAGING_BYTES = 2**24
_NAME = re.compile(r"\d{5,}-\d{6,}")
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
"""What a damaged JSON file, or one that holds something else, makes its reader raise."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest, the best, those on both sides of a change of phase, and the trunk's."""

    keep: int
    """Newest checkpoints that stay."""
    trunk_epochs: int | None = None
    """Keeps those of phase full at every multiple of so many epochs, where a fork may land; None keeps none."""

    def kept(self, about: dict[str, dict[str, Any]]) -> set[str]:
        """Names that stay, of `about`: what `Checkpoints.about` tells of all committed ones, oldest first."""
        names = list(about)
        stay = set(names[-self.keep :])
        validated = [name for name in names if about[name]["score"] is not None]
        stay |= {max(validated, key=lambda name: about[name]["score"])} if validated else set()
        for name, after in itertools.pairwise(names):
            if about[name]["phase"] != about[after]["phase"]:
                stay |= {name, after}
        if self.trunk_epochs is not None:
            stay |= {
                name
                for name, entry in about.items()
                if entry["phase"] == "full" and entry["batch"] == 0 and entry["epoch"] % self.trunk_epochs == 0
            }
        return stay


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Storage) -> None:
        self.folder = run / "checkpoints"
        self._about: dict[str, dict[str, Any]] = {}
        self._base: dict[str, Any] | None = None

    def save(self, checkpoint: Snapshot) -> None:
        """Writes and commits a checkpoint; on return it is whole. On failure, what it wrote to a disk is removed."""
        try:
            self._save(checkpoint)
        except BaseException:
            if self.folder.is_local:  # a bucket may take minutes to say once more that it cannot be reached
                with contextlib.suppress(OSError):
                    self.folder.remove_folder(checkpoint.name)
            raise

    def _save(self, checkpoint: Snapshot) -> None:
        files: dict[str, bytes] = {
            "model.safetensors": _safetensors(checkpoint.model),
            "optimizer.safetensors": _safetensors(_flat(checkpoint.optimizer)),
            "state.json": json.dumps(checkpoint.state, allow_nan=False).encode(),
        }
        if checkpoint.adapter:
            files["adapter/adapter_model.safetensors"] = _safetensors(checkpoint.adapter)
            files["adapter/adapter_config.json"] = json.dumps(checkpoint.adapter_config, indent=1).encode()
        if checkpoint.ema:
            files["ema.safetensors"] = _safetensors(checkpoint.ema)
        folder = self.folder / checkpoint.name
        if checkpoint.base:
            self._save_base(checkpoint.base)
        for name, content in files.items():
            folder.write_bytes(name, content)
        folder.write_json(
            "manifest.json",
            {
                "schema": _SCHEMA_VERSION,
                "files": {name: _describe(content) for name, content in files.items()},
                "base": self._base if checkpoint.refers_to_base else None,
                "epoch": checkpoint.state["epoch"],
                "batch": checkpoint.state["batch"],
                "phase": checkpoint.state["phases"]["phase"],
                "score": checkpoint.score,
            },
        )

    @property
    def holds_base(self) -> bool:
        """Whether this object has saved the frozen tensors, or has loaded a checkpoint that refers to them."""
        return self._base is not None

    def _save_base(self, base: Tensors) -> None:
        content = _safetensors(base)
        self.folder.write_bytes(BASE, content)
        self._base = _describe(content)

    def names(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        return patiently(lambda: [name for name in self._folders() if (self.folder / name).exists("manifest.json")])

    def _folders(self) -> list[str]:
        """Names of the checkpoints that were begun, oldest first."""
        return [name for name in self.folder.list_folders() if _NAME.fullmatch(name)]

    def load(self, name: str) -> Snapshot:
        """Reads a checkpoint, one file after the other: no more than the largest is in memory twice.

        Raises DamagedCheckpointError where a file is missing or is not what its manifest says, OtherSchemaError where
        another version of this program wrote it, and OSError where it cannot be read: then it may still be whole.
        """
        folder = self.folder / name
        try:
            manifest = _read_manifest(folder)
            _check_schema(name, manifest)
            files, base = manifest["files"], manifest["base"]

            def read(file: str) -> bytes:
                return _verified(folder, file, files[file])

            def tensors(file: str) -> Tensors:
                return safetensors.torch.load(read(file))

            is_adapted = "adapter/adapter_model.safetensors" in files
            checkpoint = Snapshot(
                state=json.loads(read("state.json")),
                model=tensors("model.safetensors"),
                optimizer=_by_parameter(tensors("optimizer.safetensors")),
                base=safetensors.torch.load(_verified(self.folder, BASE, base)) if base else {},
                refers_to_base=bool(base),
                adapter=tensors("adapter/adapter_model.safetensors") if is_adapted else {},
                adapter_config=json.loads(read("adapter/adapter_config.json")) if is_adapted else None,
                ema=tensors("ema.safetensors") if "ema.safetensors" in files else {},
                score=_score(manifest),
            )
        except OtherSchemaError:
            raise
        except (FileNotFoundError, safetensors.SafetensorError, *_UNREADABLE) as error:
            raise DamagedCheckpointError(f"checkpoint {name} is damaged: {error}") from error
        self._base = manifest["base"]
        return checkpoint

    def newest(self) -> tuple[Snapshot | None, dict[str, str]]:
        """The newest whole checkpoint, and by name a sentence for each newer one that is damaged."""
        damaged: dict[str, str] = {}
        for name in reversed(self.names()):
            try:
                return self.load(name), damaged
            except DamagedCheckpointError as error:
                damaged[name] = str(error)
        return None, damaged

    def check_schema(self) -> None:
        """Raises OtherSchemaError where another version of this program wrote a checkpoint."""
        for name, about in self.about().items():
            _check_schema(name, about)

    def remove_unfinished(self) -> None:
        """Removes what killed saves have left. Call it only while nothing else saves."""
        self.folder.remove_unfinished()
        for name in set(self._folders()) - set(self.names()):
            self.folder.remove_folder(name)

    def set_aside(self, name: str) -> None:
        """Keeps a damaged checkpoint under another name, for inspection: it no longer counts as a checkpoint."""
        self.folder.rename_folder(name, f"{name}.damaged")

    def about(self) -> dict[str, dict[str, Any]]:
        """Schema, position, phase and score of every committed checkpoint with a readable manifest, oldest first."""
        found = {}
        for name in self.names():
            if name not in self._about:
                try:
                    manifest = _read_manifest(self.folder / name)
                    place = {key: manifest[key] for key in ("schema", "epoch", "batch", "phase")}
                    self._about[name] = {**place, "score": _score(manifest)}
                except (FileNotFoundError, *_UNREADABLE):
                    continue
            found[name] = self._about[name]
        return found

    def prune(self, retention: Retention) -> None:
        """Removes what need not stay, and what was left uncommitted before the newest committed checkpoint.

        Raises OSError where it cannot read what there is, and then removes nothing.
        """
        about = self.about()
        for name in set(self.names()) - set(about):
            self.set_aside(name)
        stay = retention.kept(about)
        for name in self._folders():
            if name < max(about, default="") and name not in stay:
                self.folder.remove_folder(name)
                self._about.pop(name, None)


class DamagedCheckpointError(RuntimeError):
    """A checkpoint is not what its manifest says."""


class OtherSchemaError(UserError):
    """A checkpoint was written by another version of this program, with another layout."""


def _read_manifest(folder: Storage) -> dict[str, Any]:
    manifest: dict[str, Any] = patiently(lambda: folder.read_json("manifest.json"))
    return manifest


def _score(manifest: dict[str, Any]) -> float | None:
    """None in another schema. Raises KeyError where there is none in one that is read."""
    name = _SCORES.get(manifest["schema"])
    return None if name is None else manifest[name]


def _check_schema(name: str, manifest: dict[str, Any]) -> None:
    if (schema := manifest["schema"]) not in _SCORES:
        raise OtherSchemaError(
            f"checkpoint {name} has schema {schema}, and this version reads {' and '.join(map(str, _SCORES))}"
        )


def _on_cpu(tensors: Tensors) -> Tensors:
    """The tensors on the CPU; from a GPU through pinned memory, as a copy into any other stalls the whole device."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
    return {name: copy_in_pieces(tensor.detach(), staging) for name, tensor in tensors.items()}


def copy_in_pieces(tensor: torch.Tensor, staging: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, piece by piece through the bytes of `staging`, in the current stream."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    source, target = (t.reshape(-1).view(torch.uint8) for t in (tensor.contiguous(), copy))
    for piece, place in zip(source.split(len(staging)), target.split(len(staging)), strict=True):
        staging[: len(piece)].copy_(piece, non_blocking=True)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        place.copy_(staging[: len(piece)])
    return copy


def _safetensors(tensors: Tensors) -> bytes:
    """Through a file: `safetensors.torch.save`, and `torch.save` too, hold up every thread of the process meanwhile."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tensors")
        try:
            safetensors.torch.save_file(_on_cpu(tensors), path)
        except safetensors.SafetensorError as error:  # how it tells of a full disk
            raise OSError(str(error)) from error
        return path.read_bytes()


def _flat(state: OptimizerState) -> Tensors:
    """`blocks.0.norm1.weight` and its `exp_avg` as `blocks.0.norm1.weight.exp_avg`."""
    return {f"{parameter}.{name}": tensor for parameter, entry in state.items() for name, tensor in entry.items()}


def _by_parameter(tensors: Tensors) -> OptimizerState:
    state: OptimizerState = {}
    for key, tensor in tensors.items():
        parameter, _, name = key.rpartition(".")
        state.setdefault(parameter, {})[name] = tensor
    return state


def _describe(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _verified(folder: Storage, name: str, entry: dict[str, Any]) -> bytes:
    content = patiently(lambda: folder.read_bytes(name))
    found = _describe(content)
    if found != entry:
        raise ValueError(
            f"{name} has {counted(found['bytes'], 'byte')} and SHA-256 {found['sha256'][:12]}..., not as its manifest says"
        )
    return content
