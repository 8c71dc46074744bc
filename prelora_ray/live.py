"""What a person sees of a run while it goes on: a live view on a terminal, plain lines in a log.

All of it is read from the run folder.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prelora_ray import console, records
from prelora_ray.config import Settings
from prelora_ray.run_folder import RunFolder
from prelora_ray.words import clock, counted, number, percent

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
            for line in sorted(self._new(), key=lambda line: (line.attempt, line.epoch, isinstance(line, records.Event))):
                text = self._event(line) if isinstance(line, records.Event) else self._epoch(line)
                if text:
                    console.err.print(text)
            place = self._folder.read_place()
            self._take_step(place)
            if self._live is not None:
                self._live.update(view(self._settings, self._folder, place, self._steps))
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

    def _new(self) -> list[records.Event | records.EpochLine]:
        events, epochs = self._folder.events(), self._folder.records(records.EpochLine)
        new: list[records.Event | records.EpochLine] = [*events[self._num_events :], *epochs[self._num_epochs :]]
        self._num_events, self._num_epochs = len(events), len(epochs)
        return new

    def _epoch(self, line: records.EpochLine) -> str:
        total = self._settings.train.epochs
        parts = [
            f"epoch {line.epoch + 1:{len(str(total))}d}/{total}",
            f"{line.phase:6s}",
            *([f"{line.image_size} px"] if self._settings.train.resolution else []),
            f"loss {number(line.loss)}",
            f"top-1 {percent(line.val_top1)}",
            *([] if line.ema_top1 is None else [f"averaged {percent(line.ema_top1)}"]),
            f"{line.images_per_second:,.0f} images/s",
            f"{clock(records.remaining_seconds(self._folder.epochs(), total - line.epoch - 1))} left",
        ]
        return "  ".join(parts)

    def _event(self, event: records.Event) -> Text | str | None:
        match event:
            case records.WindowClosed():
                return self._window(event.window)
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

    def _window(self, window: int) -> str | None:
        line = next((w for w in reversed(self._folder.records(records.WindowLine)) if w.window == window), None)
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
    folder: RunFolder,
    place: records.Starting | records.Progress | None,
    steps: Sequence[records.Starting] = (),
) -> RenderableType:
    """A run as it stands: where it is, its phases, and, in phase full, how near it is to its switch."""
    epochs, windows = folder.epochs(), folder.windows()
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
    top1s = records.top1s(epochs)
    parts = [
        f"epoch {progress.epoch + 1} of {total}",
        f"loss {number(progress.loss)}",
        f"top-1 {percent(top1s[-1])} (best {percent(max(top1s))})" if top1s else "top-1 -",
        f"{progress.images_per_second:,.0f} images/s",
        f"{clock(records.remaining_seconds(epochs, still)) if epochs else '-'} left",
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
    """A bar for each family's last change against tau, and for the loss's against zeta."""
    method = settings.method
    last, under = windows[-1], steps_under(settings, windows)
    rows = [(family, change, method.tau, "tau") for family, change in (last.change or {}).items()]
    rows.append(("loss", last.loss_change, method.zeta, "zeta"))
    table = Table.grid(padding=(0, 2))
    for name, change, limit, threshold in rows:
        is_under = under[name] > 0
        told = f"{number(math.inf if change is None else change)} % ({threshold} {limit:g})"
        steps = f"{under[name]} of {counted(method.windows - 1, 'step')}"
        table.add_row(name, Text(_bar(change, limit), "green" if is_under else "red"), told, steps)
    return table


def _bar(change: float | None, limit: float) -> str:
    """A change against its threshold, which is in the middle; the bar reaches it where the two are equal."""
    middle = _BAR // 2
    ratio = math.inf if change is None or limit == 0 else max(change / limit, 1e-9)
    bar = ("━" * round(min(max(middle * (1 + math.log10(ratio)), 0), _BAR))).ljust(_BAR)
    return bar[:middle] + "|" + bar[middle:]


def steps_under(settings: Settings, windows: Sequence[records.WindowLine]) -> dict[str, int]:
    """For each family and for `loss`: how many of the newest steps in a row are under the test's threshold.

    At most the `method.windows - 1` steps that the test looks at: once all have so many, the run has partially
    converged. A step in the learning-rate ramp does not count. `windows`: the lines that stand, of phase full.
    """
    method = settings.method
    changes = [w for w in windows if w.change is not None]
    counted_steps = [w for w in changes if w.epoch_end - method.window_epochs >= settings.train.ramp_epochs]
    newest = counted_steps[::-1][: method.windows - 1]
    families = list(changes[-1].change or {}) if changes else []

    def in_a_row(are_under: Iterator[bool]) -> int:
        return sum(1 for _ in itertools.takewhile(bool, are_under))

    under = {family: in_a_row(_below((w.change or {}).get(family), method.tau) for w in newest) for family in families}
    return under | {"loss": in_a_row(w.loss_change is not None and w.loss_change <= method.zeta for w in newest)}


def _below(change: float | None, limit: float) -> bool:
    """An infinite change is None in records."""
    return change is not None and change < limit
