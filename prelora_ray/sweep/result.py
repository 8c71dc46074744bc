"""What a sweep leaves in its folder: a note for each candidate that was tried, and sweep.json."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from prelora_ray.records import Diagnosis, last_top1, phase_summaries
from prelora_ray.run_folder import RunFolder
from prelora_ray.sweep.cost import own_hours, pareto_front, straight_hours
from prelora_ray.sweep.outcome import outcome
from prelora_ray.sweep.replay import read_record
from prelora_ray.sweep.settings import Candidate, Plan


def write_note(plan: Plan, candidate: Candidate, **content: Any) -> dict[str, Any]:
    """Adds to a candidate's note (`ended`: finished, stopped or failed; `message`: why it failed), and returns it."""
    folder, name = RunFolder(plan.folder) / "settings", f"{_digest(candidate)}.json"
    before = folder.read_json(name) if folder.exists(name) else {"setting": candidate, "ended": None, "message": None}
    folder.write_json(name, before | content)
    return before | content


def read_notes(plan: Plan) -> list[dict[str, Any]]:
    folder = RunFolder(plan.folder) / "settings"
    return [folder.read_json(name) for name in sorted(folder.list_files()) if name.endswith(".json")]


def is_finished(plan: Plan, trial: str) -> bool:
    return (RunFolder(plan.folder) / trial).exists("result.json")


def summarize_sweep(plan: Plan) -> dict[str, Any]:
    """The contents of sweep.json: each candidate with its run and that one's results, the Pareto front, and the cost.

    `naive_gpu_hours` is what the candidates would have cost had each been trained by itself from the start.
    `smallest_warmup` is that of the finished runs whose loss did not jump at the freeze, where warmups are compared.
    """
    trunk, epochs = RunFolder.of(plan.trunk), plan.trunk.train.epochs
    record = read_record(str(trunk))
    notes = {_digest(note["setting"]): note for note in read_notes(plan)}
    is_listed = plan.sweep.search != "optuna"
    candidates = plan.candidates() if is_listed else [note["setting"] for note in notes.values()]
    entries = []
    for candidate in candidates:
        found = outcome(plan, candidate, record)
        run = RunFolder(plan.folder) / found.trial
        entries.append({"setting": candidate, "trial": found.trial, "switch_epoch": found.switch_epoch, **_of_run(run, epochs)})
    tried = {entry["trial"]: note for entry in entries if (note := notes.get(_digest(entry["setting"]))) and note["ended"]}
    for entry in entries:
        note = tried.get(entry["trial"], {"ended": None, "message": None})
        if is_finished(plan, entry["trial"]):
            note = {"ended": "finished", "message": None}
        entry |= {"ended": note["ended"], "message": note["message"]}
    finished = [entry for entry in entries if entry["ended"] == "finished"]
    front = pareto_front((entry["val_top1"], entry["gpu_hours"]) for entry in finished)
    trials = {entry["trial"] for entry in entries} - {plan.trunk.name}
    trained = [RunFolder(plan.folder) / name for name in sorted(trials | {plan.trunk.name})]
    return {
        "path": plan.folder,
        "full": _of_run(trunk, epochs),
        "settings": entries,
        "pareto": [entries.index(finished[i]) for i in front],
        "smallest_warmup": _smallest_warmup(finished),
        "trials": len(trials),
        "gpu_hours": sum(own_hours(run) for run in trained),
        "naive_gpu_hours": sum(entry["gpu_hours"] or 0.0 for entry in entries),
    }


def _of_run(run: RunFolder, epochs: int) -> dict[str, Any]:
    """A run's results; of one that was stopped, those so far."""
    lines = run.epochs()
    lora = phase_summaries(lines).get("lora")
    return {
        "epochs": len(lines),
        "val_top1": last_top1(lines),
        "gpu_hours": straight_hours(run, epochs) if lines else None,
        "diagnosis": [event.signature for event in run.events_of(Diagnosis)],
        "trainable_fraction": lora.trainable_fraction if lora else None,
    }


def _smallest_warmup(finished: list[dict[str, Any]]) -> int | None:
    key = "method.warmup_epochs"
    calm = [entry for entry in finished if key in entry["setting"] and "insufficient_warmup" not in entry["diagnosis"]]
    return min((entry["setting"][key] for entry in calm), default=None)


def _digest(candidate: Candidate) -> str:
    return hashlib.blake2b(json.dumps(candidate, sort_keys=True).encode(), digest_size=8).hexdigest()
