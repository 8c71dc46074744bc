"""Checkpoints in the run folder: written file by file, committed by a manifest that comes last.

    checkpoints/<epoch>-<batch>/
      model.safetensors     the timm model's tensors; in phase lora those that are not in base.safetensors
      adapter/              PEFT's adapter_model.safetensors and adapter_config.json, once switched
      optimizer.pt          AdamW's state by parameter name
      state.json            position, phases, the test's windows
      manifest.json         size and SHA-256 of every file above, and of the base that it refers to
    checkpoints/base.safetensors    what phase lora has frozen, stored once

The name is the position: epochs done, and batches done in the epoch after.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch

from prelora_ray.storage import Storage
from prelora_ray.train.optim import OptimizerState

Tensors = dict[str, torch.Tensor]
BASE = "base.safetensors"
_SCHEMA_VERSION = 1


@dataclass
class Checkpoint:
    """All that a run needs to go on."""

    state: dict[str, Any]
    """JSON: "epoch" and "batch" (the position), and what the training state adds."""
    model: Tensors
    """The model's own tensors, by timm's names, less those in `base`."""
    optimizer: OptimizerState
    base: Tensors = field(default_factory=dict)
    """Frozen tensors."""
    adapter: Tensors = field(default_factory=dict)
    """Adapters in PEFT's names."""
    adapter_config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return checkpoint_name(self.state["epoch"], self.state["batch"])


def checkpoint_name(epoch: int, batch: int) -> str:
    return f"{epoch:05d}-{batch:06d}"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Storage) -> None:
        self.folder = run / "checkpoints"

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes and commits a checkpoint; on return it is whole."""
        files = {
            "model.safetensors": safetensors.torch.save(_on_cpu(checkpoint.model)),
            "optimizer.pt": _pickle_free_save(checkpoint.optimizer),
            "state.json": json.dumps(checkpoint.state, allow_nan=False).encode(),
        }
        if checkpoint.adapter:
            files["adapter/adapter_model.safetensors"] = safetensors.torch.save(_on_cpu(checkpoint.adapter))
            files["adapter/adapter_config.json"] = json.dumps(checkpoint.adapter_config, indent=1).encode()
        folder = self.folder / checkpoint.name
        for name, content in files.items():
            folder.write_bytes(name, content)
        folder.write_json(
            "manifest.json",
            {
                "schema": _SCHEMA_VERSION,
                "files": {name: _describe(content) for name, content in files.items()},
                "base": self._save_base(checkpoint.base) if checkpoint.base else None,
            },
        )

    def _save_base(self, base: Tensors) -> dict[str, Any]:
        content = safetensors.torch.save(_on_cpu(base))
        description = _describe(content)
        if self.folder.list_files().get(BASE) != len(content) or _describe(self.folder.read_bytes(BASE)) != description:
            self.folder.write_bytes(BASE, content)
        return description

    def names(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        return [name for name in self.folder.list_folders() if (self.folder / name).exists("manifest.json")]

    def load(self, name: str) -> Checkpoint:
        """Reads a checkpoint. Raises DamagedCheckpointError where a file is missing or is not what its manifest says."""
        folder = self.folder / name
        try:
            manifest = folder.read_json("manifest.json")
            files = {file: _verified(folder, file, entry) for file, entry in manifest["files"].items()}
            base = _verified(self.folder, BASE, manifest["base"]) if manifest["base"] else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"checkpoint {name} is damaged: {error}") from error
        adapter = files.get("adapter/adapter_model.safetensors")
        return Checkpoint(
            state=json.loads(files["state.json"]),
            model=safetensors.torch.load(files["model.safetensors"]),
            optimizer=torch.load(io.BytesIO(files["optimizer.pt"]), weights_only=True),
            base=safetensors.torch.load(base) if base else {},
            adapter=safetensors.torch.load(adapter) if adapter else {},
            adapter_config=json.loads(files["adapter/adapter_config.json"]) if adapter else None,
        )

    def newest(self) -> tuple[str | None, list[str]]:
        """Name of the newest whole checkpoint, and a sentence for each newer one that is damaged."""
        damaged = []
        for name in reversed(self.names()):
            try:
                self.load(name)
            except DamagedCheckpointError as error:
                damaged.append(str(error))
            else:
                return name, damaged
        return None, damaged

    def prune(self, keep: int, also: set[str]) -> None:
        """Removes all but the newest `keep` committed checkpoints and those named in `also`."""
        for name in self.names()[:-keep]:
            if name not in also:
                self.folder.remove_folder(name)


class DamagedCheckpointError(RuntimeError):
    """A checkpoint is not what its manifest says."""


def _on_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _pickle_free_save(state: OptimizerState) -> bytes:
    """Tensors in dictionaries alone, so that `torch.load(weights_only=True)` reads it."""
    buffer = io.BytesIO()
    torch.save({name: _on_cpu(entry) for name, entry in state.items()}, buffer)
    return buffer.getvalue()


def _describe(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _verified(folder: Storage, name: str, entry: dict[str, Any]) -> bytes:
    content = folder.read_bytes(name)
    found = _describe(content)
    if found != entry:
        raise ValueError(f"{name} has {found['bytes']} bytes and SHA-256 {found['sha256'][:12]}..., not as its manifest says")
    return content
