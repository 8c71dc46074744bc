"""The records of a run, each read from its folder once."""

from __future__ import annotations

from functools import cached_property

from prelora_ray.config import Settings
from prelora_ray.records import EpochLine, Event, EventT, NormsLine, WindowLine, standing
from prelora_ray.run_folder import RunFolder


class RunRecords:
    """What is recorded of a run, each kind read when it is first asked for. Lines are those that stand, in order."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    @cached_property
    def settings(self) -> Settings:
        """Raises UserError where the folder holds no run."""
        return self.folder.read_settings()

    @cached_property
    def epoch_lines(self) -> list[EpochLine]:
        """All lines, in file order: also those that a later attempt's replace."""
        return self.folder.records(EpochLine)

    @cached_property
    def epochs(self) -> list[EpochLine]:
        return standing(self.epoch_lines, lambda line: line.epoch)

    @cached_property
    def windows(self) -> list[WindowLine]:
        return self.folder.windows()

    @cached_property
    def norms(self) -> list[NormsLine]:
        return self.folder.norms()

    @cached_property
    def events(self) -> list[Event]:
        """All events, in file order: none replaces another."""
        return self.folder.events()

    @cached_property
    def ranks(self) -> dict[str, int] | None:
        """By module name; None where the run has not switched."""
        return self.folder.read_json("ranks.json") if self.folder.exists("ranks.json") else None

    @cached_property
    def num_classes(self) -> int | None:
        """None where the run has not begun."""
        return len(self.folder.read_classes()) if self.folder.exists("data.json") else None

    @cached_property
    def is_finished(self) -> bool:
        return self.folder.exists("result.json")

    @property
    def completed(self) -> int:
        """Epochs."""
        return self.epochs[-1].epoch + 1 if self.epochs else 0

    @property
    def on_gpu(self) -> bool:
        return self.settings.workers.gpu is True

    def events_of(self, kind: type[EventT]) -> list[EventT]:
        """All events of a kind, in file order."""
        return [event for event in self.events if isinstance(event, kind)]

    def last_of(self, kind: type[EventT]) -> EventT | None:
        """The newest event of a kind; of a switch or a freeze, which a restart may repeat, the one that stands."""
        return next(reversed(self.events_of(kind)), None)
