"""What a sweep leaves in its folder: a note for each candidate that was tried, and sweep.json."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from prelora_ray.config import Settings
from prelora_ray.measures import last_value, measures_of
from prelora_ray.recorded.replay import Record, read_record
from prelora_ray.recorded.run import RunRecords
from prelora_ray.records import Diagnosis
from prelora_ray.run_folder import RunFolder
from prelora_ray.summaries import phase_summaries
from prelora_ray.sweep.control import Entry, name_controls, on_front
from prelora_ray.sweep.cost import Prices
from prelora_ray.sweep.outcome import outcome
from prelora_ray.sweep.settings import Candidate, Plan


def write_note(plan: Plan, candidate: Candidate, **content: Any) -> dict[str, Any]:
    """Adds to a candidate's note (`ended`: finished, stopped or failed; `message`: why it failed), and returns it."""
    kind = "controls" if "control" in candidate else "settings"
    folder, name = RunFolder(plan.folder) / kind, f"{_digest(candidate)}.json"
    before = folder.read_json(name) if folder.exists(name) else {"setting": candidate, "ended": None, "message": None}
    folder.write_json(name, before | content)
    return before | content


def read_notes(plan: Plan, kind: Literal["settings", "controls"] = "settings") -> list[dict[str, Any]]:
    folder = RunFolder(plan.folder) / kind
    return [folder.read_json(name) for name in sorted(folder.list_files()) if name.endswith(".json")]


def is_finished(plan: Plan, trial: str) -> bool:
    return (RunFolder(plan.folder) / trial).exists("result.json")


def summarize_sweep(plan: Plan) -> dict[str, Any]:
    """The contents of sweep.json: each candidate and control with its run and that one's results, the Pareto front of
    all and of full training, and the cost.

    `naive_cost` is what candidates and controls would have cost had each been trained by itself from the start.
    `smallest_warmup` is that of the finished runs whose loss did not jump at the freeze, where warmups are compared.
    """
    trunk = RunFolder.of(plan.trunk)
    record, prices = read_record(str(trunk)), Prices.of(trunk)
    listed = [note["setting"] for note in read_notes(plan)] if plan.sweep.search == "optuna" else plan.candidates()
    entries = _entries(plan, listed, record, prices)
    full = {"trial": plan.trunk.name, **_of_run(trunk, plan.trunk, prices)}
    wanted = name_controls(plan, entries, record, prices)
    begun = [note["setting"] for note in read_notes(plan, "controls")]
    controls = _distinct(_entries(plan, [*wanted, *begun], record, prices))
    finished = [entry for entry in [*entries, *controls] if entry["ended"] == "finished"]
    trials = {entry["trial"] for entry in entries} - {plan.trunk.name}
    trained = trials | {entry["trial"] for entry in controls} | {plan.trunk.name}
    return {
        "path": plan.folder,
        "unit": prices.unit,
        "full": full,
        "settings": entries,
        "controls": controls,
        "measure": plan.measure.key,
        "pareto": on_front(plan.measure, [full, *finished]),
        "smallest_warmup": _smallest_warmup([entry for entry in entries if entry["ended"] == "finished"]),
        "trials": len(trials),
        "cost": sum(prices.own(RunFolder(plan.folder) / name) for name in sorted(trained)),
        "naive_cost": sum(entry["cost"] or 0.0 for entry in [*entries, *controls]),
    }


def _entries(plan: Plan, candidates: list[Candidate], record: Record, prices: Prices) -> list[Entry]:
    """What sweep.json says of candidates; of those that are one run, the note of any that was tried counts."""
    kinds: tuple[Literal["settings", "controls"], ...] = ("settings", "controls")
    notes = {_digest(note["setting"]): note for kind in kinds for note in read_notes(plan, kind)}
    entries = []
    results: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        found = outcome(plan, candidate, record)
        if found.trial not in results:
            settings = plan.settings_of(candidate, found.trial)
            results[found.trial] = _of_run(RunFolder(plan.folder) / found.trial, settings, prices)
        left = None if found.switch_epoch is None or record.rates_left is None else record.rates_left[found.switch_epoch]
        place = {"setting": candidate, "trial": found.trial, "switch_epoch": found.switch_epoch, "rate_left": left}
        entries.append({**place, **results[found.trial]})
    tried = {entry["trial"]: note for entry in entries if (note := notes.get(_digest(entry["setting"]))) and note["ended"]}
    for entry in entries:
        note = tried.get(entry["trial"], {"ended": None, "message": None})
        if is_finished(plan, entry["trial"]):
            note = {"ended": "finished", "message": None}
        entry |= {"ended": note["ended"], "message": note["message"]}
    return entries


def _distinct(entries: list[Entry]) -> list[Entry]:
    """The first entry of each run: several candidates may share a control."""
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry["trial"], entry)
    return list(first.values())


def _of_run(folder: RunFolder, settings: Settings, prices: Prices) -> dict[str, Any]:
    """A run's results; of one that was stopped, those so far."""
    run = RunRecords(folder)
    lora = phase_summaries(run.epochs).get("lora")
    return {
        "epochs": len(run.epochs),
        (key := measures_of(settings.task)[0].key): last_value(run.epochs, key),
        "cost": prices.straight(run.epochs, settings) if run.epochs else None,
        "diagnosis": [event.signature for event in run.events_of(Diagnosis)],
        "trainable_fraction": lora.trainable_fraction if lora else None,
    }


def _smallest_warmup(finished: list[dict[str, Any]]) -> int | None:
    key = "method.warmup_epochs"
    calm = [entry for entry in finished if key in entry["setting"] and "insufficient_warmup" not in entry["diagnosis"]]
    return min((entry["setting"][key] for entry in calm), default=None)


def _digest(candidate: Candidate) -> str:
    return hashlib.blake2b(json.dumps(candidate, sort_keys=True).encode(), digest_size=8).hexdigest()
