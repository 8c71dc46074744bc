"""Looks for damage in a prepared folder or a run folder: in all that has a checksum, and in all that is read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from prelora_ray.data.check import check_prepared
from prelora_ray.errors import UserError, one_line
from prelora_ray.fault_tolerance.checkpoint import Checkpoints, DamagedCheckpointError, OtherSchemaError
from prelora_ray.fault_tolerance.notices import STOP_FILE
from prelora_ray.records import EpochLine, Event, NormsLine, WindowLine, from_json
from prelora_ray.run_folder import RunFolder, name_without_segment


def examine(path: str, on_progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """What is wrong with a prepared folder or a run folder, a sentence each; none where all is whole.

    `on_progress` is called with the shards or checkpoints done and their total. Raises UserError if `path` is neither.
    """
    folder = RunFolder(path)
    if folder.exists("manifest.json") and not folder.exists("state.json"):  # with that it is a checkpoint
        return check_prepared(folder, on_progress)
    if folder.exists("config.yaml"):
        return _check_records(folder) + _check_checkpoints(folder, on_progress)
    raise UserError(f"{path!r} is neither a prepared folder (it has no manifest.json) nor a run folder (no config.yaml)")


def _check_records(folder: RunFolder) -> list[str]:
    findings = []
    try:
        folder.read_settings()
    except Exception as error:  # of YAML, or of a key
        findings.append(f"{folder}/config.yaml cannot be read: {one_line(error)}")
    for name in sorted(folder.list_files()):
        if name == STOP_FILE:
            continue  # an empty file
        try:
            if name.endswith(".json"):
                json.loads(folder.read_bytes(name))
            elif (of := name_without_segment(name)).endswith(".jsonl"):
                _parse_each_line(folder.read_bytes(name), of)
        except (OSError, ValueError) as error:
            findings.append(f"{folder}/{name} cannot be read: {one_line(error)}")
    return findings


_KINDS: dict[str, Any] = {kind.FILE: kind for kind in (Event, NormsLine, WindowLine, EpochLine)}


def _parse_each_line(content: bytes, name: str) -> None:
    """Raises ValueError where a line is no object of its file's kind, but for one that a killed writer left
    unfinished."""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if line.endswith(b"}"):
                raise ValueError(f"line {number} is no JSON: {error}") from None
            continue
        if not isinstance(entry, dict):
            raise ValueError(f"line {number} is no object")
        if name in _KINDS:
            from_json(_KINDS[name], entry, f"line {number}")


def _check_checkpoints(folder: RunFolder, on_progress: Callable[[int, int], None]) -> list[str]:
    checkpoints = Checkpoints(folder)
    findings = []
    names = checkpoints.names()
    for done, name in enumerate(names, 1):
        try:
            checkpoints.load(name)
        except (DamagedCheckpointError, OtherSchemaError, OSError) as error:
            findings.append(f"{folder}: {one_line(error)}")
        on_progress(done, len(names))
    return findings
