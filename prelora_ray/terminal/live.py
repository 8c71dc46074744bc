"""What a person sees of a run while it goes on: a live view on a terminal, plain lines in a log.

All of it is read from the run folder.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prelora_ray import records, summaries
from prelora_ray.config import Settings
from prelora_ray.measures import best_value, last_value, measures_of
from prelora_ray.method.convergence import Step
from prelora_ray.recorded.run import RunRecords
from prelora_ray.run_folder import RunFolder
from prelora_ray.schedule import convergence_test
from prelora_ray.terminal import console
from prelora_ray.words import clock, counted, number

_PHASES = {"full": ("█", "green"), "warmup": ("▓", "yellow"), "lora": ("▒", "blue")}
"""How the strip shows them: told apart without colours too."""
_STRIP = 60
"""Characters of the strip of phases."""
_BAR = 24
"""Characters of a bar of the test: a hundredfold from end to end, with the threshold in the middle."""


@contextmanager
def watch(settings: Settings) -> Iterator[None]:
    """Shows a run for the time of the block: live on a terminal, with a line for each thing that happens everywhere."""
    watcher = _Watcher(settings)
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()


class _Watcher(threading.Thread):
    """Reads what the run writes into its folder, and shows what is new."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self._settings = settings
        self._measures = measures_of(settings.task)
        self._folder = RunFolder.of(settings)
        self._done = threading.Event()
        self._num_epochs = len(self._folder.records(records.EpochLine))
        self._num_events = len(self._folder.events())
        self._steps: list[records.Starting] = []
        """Those of the start that is under way."""
        self._live = Live(console=console.err, transient=True) if console.err.is_terminal else None

    def start(self) -> None:
        if self._live is not None:
            self._live.start()  # from here on, what is written to standard error goes above it
            self._live.update(Text("starting"))
        super().start()

    def run(self) -> None:
        while not self._done.wait(0.5 if self._folder.is_local else 10):
            self._show_new()
        self._show_new()

    def stop(self) -> None:
        self._done.set()
        self.join(timeout=30)
        if self._live is not None:
            self._live.stop()

    def _show_new(self) -> None:
        try:
            run, place = RunRecords(self._folder), self._folder.read_place()
            for line in sorted(self._new(run), key=lambda line: (line.attempt, line.epoch, isinstance(line, records.Event))):
                text = self._event(line, run) if isinstance(line, records.Event) else self._epoch(line, run)
                if text:
                    console.err.print(text)
            self._take_step(place)
            if self._live is not None:
                self._live.update(view(self._settings, run, place, self._steps))
        except (OSError, ValueError):  # the next poll will show it; the run itself does not depend on it
            pass

    def _take_step(self, place: records.Starting | records.Progress | None) -> None:
        """Notes a step of the start; outside a terminal it gets a line."""
        if not isinstance(place, records.Starting):
            self._steps = []
        elif place not in self._steps:
            self._steps.append(place)
            if self._live is None:
                console.err.print(f"starting: {place.doing}")

    def _new(self, run: RunRecords) -> list[records.Event | records.EpochLine]:
        events, epochs = run.events, run.epoch_lines
        new: list[records.Event | records.EpochLine] = [*events[self._num_events :], *epochs[self._num_epochs :]]
        self._num_events, self._num_epochs = len(events), len(epochs)
        return new

    def _epoch(self, line: records.EpochLine, run: RunRecords) -> str:
        total = self._settings.train.epochs
        averaged = getattr(line, self._measures[0].averaged or "", None)
        parts = [
            f"epoch {line.epoch + 1:{len(str(total))}d}/{total}",
            f"{line.phase:6s}",
            *([f"{line.image_size} px"] if self._settings.train.resolution else []),
            f"loss {number(line.loss)}",
            *(f"{measure.title} {measure.told(getattr(line, measure.key))}" for measure in self._measures),
            *([] if averaged is None else [f"averaged {self._measures[0].told(averaged)}"]),
            f"{line.images_per_second:,.0f} {self._settings.sample}s/s",
            f"{clock(summaries.remaining_seconds(run.epochs, total - line.epoch - 1))} left",
        ]
        return "  ".join(parts)

    def _event(self, event: records.Event, run: RunRecords) -> Text | str | None:
        match event:
            case records.WindowClosed():
                return self._window(event.window, run)
            case records.Switch():
                left = "" if event.rate_left is None else f" with {event.rate_left:.1%} of the learning rate's sum left"
                told = f" after epoch {event.epoch}{left}: adapters join, {event.trainable_parameters:,} parameters train"
                return Text.assemble(("switch", "bold"), told)
            case records.Freeze():
                share = event.trainable_parameters / event.parameters
                told = f" after epoch {event.epoch}: {event.trainable_parameters:,} parameters train ({share:.1%})"
                return Text.assemble(("freeze", "bold"), told)
            case records.RunStarted() | records.Restart():
                at = f" from epoch {event.epoch}" if event.epoch else ""
                told = f"{at} with {counted(event.world_size, 'worker')}, phase {event.phase}"
                return Text.assemble((event.event.replace("_", " "), "bold"), told)
            case records.CheckpointDamaged() | records.InitFrom() | records.Diagnosis():
                return Text(event.message, "bold")
        return None

    def _window(self, window: int, run: RunRecords) -> str | None:
        line = next((line for line in run.windows if line.window == window), None)
        if line is None or line.change is None or line.phase != "full":
            return None
        method = self._settings.method
        family, change = max(line.change.items(), key=lambda item: math.inf if item[1] is None else item[1])
        verdict = "converged" if line.converged else "in the learning-rate ramp, no verdict" if line.in_ramp else "not yet"
        return (
            f"  window {window}: norms change by up to {number(change)} % ({family}; tau {method.tau:g}), "
            f"the loss by {number(line.loss_change)} % (zeta {method.zeta:g}): {verdict}"
        )


def view(
    settings: Settings,
    run: RunRecords,
    place: records.Starting | records.Progress | None,
    steps: Sequence[records.Starting] = (),
) -> RenderableType:
    """A run as it stands: where it is, its phases, and, in phase full, how near it is to its switch."""
    epochs, windows = run.epochs, run.windows
    phases = [line.phase for line in epochs]
    parts: list[RenderableType] = []
    if isinstance(place, records.Progress):
        epochs = [line for line in epochs if line.epoch < place.epoch]  # a restart may have gone back
        phases = [*(line.phase for line in epochs), place.phase]
        parts.append(_headline(settings, place, epochs))
    else:
        parts.append(_start(steps))
    if phases:
        parts.append(_strip(phases, settings.train.epochs))
    if windows and windows[-1].phase == "full" and windows[-1].change is not None:
        parts.append(_test(settings, windows))
    return Group(*parts)


def _start(steps: Sequence[records.Starting]) -> Text:
    """`starting: start Ray 6 s, place the workers 9 s, build the model ...`, with what each has taken so far."""
    ends = [*(step.time for step in steps[1:]), time.time()]
    told = [f"{step.doing} {max(0.0, end - step.time):.0f} s" for step, end in zip(steps, ends, strict=False)]
    return Text.assemble(("starting", "bold"), ": " if told else "", ", ".join(told), " ...")


def _headline(settings: Settings, progress: records.Progress, epochs: Sequence[records.EpochLine]) -> Text:
    total = settings.train.epochs
    still = total - progress.epoch - progress.batch / progress.batches
    measure = measures_of(settings.task)[0]
    parts = [
        f"epoch {progress.epoch + 1} of {total}",
        f"loss {number(progress.loss)}",
        measure.told_with_best(last_value(epochs, measure.key), best_value(epochs, measure)),
        f"{progress.images_per_second:,.0f} {settings.sample}s/s",
        f"{clock(summaries.remaining_seconds(epochs, still)) if epochs else '-'} left",
    ]
    return Text.assemble((progress.phase, f"bold {_PHASES[progress.phase][1]}"), "  ", "  ".join(parts))


def _strip(phases: Sequence[str], total: int) -> Text:
    """The run from end to end. `phases`: of each epoch so far, the one that trains included."""
    strip = Text()
    for at in range(_STRIP):
        epoch = at * total // _STRIP
        mark, style = _PHASES[phases[epoch]] if epoch < len(phases) else ("·", "dim")
        strip.append(mark, style)
    told = ", ".join(f"{mark} {phase} {phases.count(phase)}" for phase, (mark, _) in _PHASES.items() if phase in phases)
    return strip.append(f"  {told} of {counted(total, 'epoch')}")


def _test(settings: Settings, windows: Sequence[records.WindowLine]) -> Table:
    """A bar for each family's last change against tau, and for the loss's against zeta. `windows`: of phase full."""
    method = settings.method
    steps = [_step(line) for line in windows if line.change is not None]
    under = convergence_test(method, settings.train.ramp_epochs).steps_under(steps)
    rows = [(family, change, method.tau, "tau") for family, change in steps[-1].family_change.items()]
    rows.append(("loss", steps[-1].loss_change, method.zeta, "zeta"))
    table = Table.grid(padding=(0, 2))
    for name, change, limit, threshold in rows:
        told = f"{number(change)} % ({threshold} {limit:g})"
        in_a_row = f"{under[name]} of {counted(method.windows - 1, 'step')}"
        table.add_row(name, Text(_bar(change, limit), "green" if under[name] else "red"), told, in_a_row)
    return table


def _step(window: records.WindowLine) -> Step:
    """An infinite change is None in records."""
    families = {family: math.inf if change is None else change for family, change in (window.change or {}).items()}
    return Step(window.epoch_end, families, math.inf if window.loss_change is None else window.loss_change)


def _bar(change: float, limit: float) -> str:
    """A change against its threshold, which is in the middle; the bar reaches it where the two are equal."""
    middle = _BAR // 2
    ratio = math.inf if limit == 0 else max(change / limit, 1e-9)
    bar = ("━" * round(min(max(middle * (1 + math.log10(ratio)), 0), _BAR))).ljust(_BAR)
    return bar[:middle] + "|" + bar[middle:]
