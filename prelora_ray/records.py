"""What a run records in its folder, line by line.

The docstring of a field says what it means; the tables of docs/run-folder.md are generated from them. Fields are in the
order in which they are written. A field with a default, other than `event`, is missing in records of earlier versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeVar


@dataclass(frozen=True, kw_only=True)
class NormsLine:
    """Input of the partial convergence test: a line an epoch."""

    FILE: ClassVar[str] = "norms.jsonl"

    attempt: int
    """The attempt that wrote it."""
    epoch: int
    """The epoch, from 0."""
    phase: str
    """What trained in it: `full`, `warmup` or `lora`."""
    loss: float
    """Mean training loss over the epoch's images."""
    norms: dict[str, float]
    """Frobenius norm of every target module at the epoch's end, its adapter included, by module name."""


@dataclass(frozen=True, kw_only=True)
class WindowLine:
    """Results of the test: a line a window."""

    FILE: ClassVar[str] = "windows.jsonl"

    attempt: int
    """The attempt that wrote it."""
    phase: str
    """What trained in its last epoch."""
    window: int
    """The window, from 0."""
    epoch_end: int
    """Completed epochs at its end."""
    loss: float
    """Mean training loss over its epochs."""
    change: dict[str, float | None] | None
    """Change of the norms since the window before in percent, by family; `null` for window 0."""
    signed_change: dict[str, float | None] | None = None
    """As `change`, with the sign of each module's: above 0 where norms grow."""
    loss_change: float | None
    """Change of the loss since the window before, in percent; `null` for window 0."""
    converged: bool
    """Whether the run has partially converged."""
    in_ramp: bool
    """Whether a step that the test looks at lies in the learning-rate ramp, so that it takes no verdict."""


@dataclass(frozen=True, kw_only=True)
class EpochLine:
    """Results and costs of an epoch: a line an epoch."""

    FILE: ClassVar[str] = "epochs.jsonl"

    attempt: int
    """The attempt that wrote it."""
    epoch: int
    """The epoch, from 0."""
    phase: str
    """What trained in it: `full`, `warmup` or `lora`."""
    image_size: int | None = None
    """Side of the images that it trained on, in pixels; validation is at `model.image_size`. `null` for text."""
    loss: float
    """Mean training loss over the epoch's images."""
    val_loss: float | None
    """Loss over the validation images, or per masked token; `null` where the epoch was not validated."""
    val_top1: float | None
    """Top-1 accuracy in 0..1; `null` where the epoch was not validated, or the task is another than classification."""
    val_top5: float | None
    """Top-5 accuracy in 0..1; `null` as `val_top1`."""
    val_accuracy: float | None = None
    """Share of the masked tokens that are guessed right, in 0..1; `null` where it was not validated, or `task` is not
    `mlm`."""
    val_perplexity: float | None = None
    """e to the power of `val_loss`; `null` as `val_accuracy`."""
    ema_top1: float | None = None
    """Top-1 accuracy of the averaged weights (`train.ema`); `null` without them, or as `val_top1`."""
    ema_perplexity: float | None = None
    """Perplexity of the averaged weights; `null` without them, or as `val_accuracy`."""
    images_per_second: float
    """Images, or sequences of text, that this attempt trained on in the epoch, of all workers, over `train_seconds`."""
    images: int
    """Images of the epoch, also those that an earlier attempt trained on."""
    train_seconds: float
    """Time that this attempt trained in the epoch, validation not counted."""
    seconds: float
    """Time that this attempt spent on the epoch, with validation."""
    data_wait_seconds: float
    """Part of `train_seconds` in which rank 0 waited for data."""
    worker_seconds: dict[str, list[float]] | None = None
    """`train_seconds` of every worker, by rank: `data`, waiting for a batch; `exchange`, waiting for the mean of all
    gradients behind its own backward pass; `compute`, the rest. Who holds up the others waits least in `exchange`."""
    peak_memory_bytes: int
    """Most memory of rank 0: on a GPU allocated since the phase was built, on a CPU ever held by the process."""
    trainable_parameters: int
    """Parameters that trained."""
    parameters: int
    """Parameters of the model, adapters included."""
    gradient_bytes: int = 0
    """Bytes of gradients that every worker exchanges in a step; 0 with one worker."""
    learning_rate: float
    """Of the epoch's last step."""
    world_size: int
    """Workers."""

    @property
    def trainable_fraction(self) -> float:
        return self.trainable_parameters / self.parameters


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run is right now."""

    FILE: ClassVar[str] = "progress.json"

    attempt: int
    """The attempt that trains."""
    time: float
    """When it was written, in seconds since 1970."""
    epoch: int
    """Completed epochs."""
    batch: int
    """Batches done of the epoch that trains."""
    batches: int
    """Batches of an epoch."""
    step: int = 0
    """Optimizer steps done since the run began."""
    phase: str
    """What trains: `full`, `warmup` or `lora`."""
    loss: float | None
    """Mean training loss of rank 0 in the epoch so far."""
    images_per_second: float
    """Images of all workers over the time of the epoch so far."""


@dataclass(frozen=True, kw_only=True)
class Starting:
    """What the run does before its next step; it trains again once progress.json is newer."""

    FILE: ClassVar[str] = "starting.json"

    time: float
    """When that began, in seconds since 1970."""
    doing: str
    """`start Ray`, `prepare the images` or `the text`, `place the workers`, `build the model`, `read the first images`
    or `sequences`, and `compile`, or `take a first step` where nothing is compiled; the last one also where a phase
    begins. Where images grow, `compile for 24 pixels`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run came to."""

    FILE: ClassVar[str] = "result.json"

    epochs: int
    """Completed epochs."""
    switch_epoch: int | None
    """Completed epochs when phase full ended; `null` where the run never switched."""
    freeze_epoch: int | None
    """Completed epochs when phase lora began; `null` where it never did."""
    val_top1: float | None
    """Top-1 accuracy of the last validation, in 0..1; `null` where the task is another than classification."""
    best_val_top1: float | None
    """The highest of all validations."""
    ema_top1: float | None = None
    """Top-1 accuracy of the averaged weights (`train.ema`) at the last validation; `null` without them."""
    val_loss: float | None = None
    """Loss per masked token at the last validation; as all that follow, `null` where `task` is not `mlm`."""
    val_accuracy: float | None = None
    """Share of the masked tokens that are guessed right, in 0..1."""
    val_perplexity: float | None = None
    """e to the power of `val_loss`."""
    best_val_perplexity: float | None = None
    """The lowest of all validations."""
    ema_perplexity: float | None = None
    """Perplexity of the averaged weights at the last validation; `null` without them."""
    images_per_second: dict[str, float]
    """In the steady state, by phase: in the median epoch of those that begin no phase, size of images or attempt."""
    peak_memory_bytes: dict[str, int]
    """The most in any epoch of the phase, as in epochs.jsonl, by phase; on a CPU it never falls from phase to phase."""
    trainable_fraction: dict[str, float]
    """Of the parameters, those that train, by phase."""
    ranks: dict[str, int] | None
    """Modules of each rank, by rank; `null` where the run never switched."""
    restarts: int
    """Attempts after the first."""
    seconds: float
    """Time from each attempt's first event to its last, all attempts together."""
    startup_seconds: dict[str, float | None] | None = None
    """Time of training that the other epochs took beyond that speed, by phase; `null` where a phase has no others."""
    against_full: dict[str, float | None] | None = None
    """That speed of a worker as a multiple of phase full's on images of one size, by phase; `null` if not known."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, of any kind."""

    FILE: ClassVar[str] = "events.jsonl"

    attempt: int
    """The attempt that wrote it."""
    time: float
    """When, in seconds since 1970."""
    event: str
    """What happened: see below."""
    epoch: int
    """Completed epochs."""
    step: int | None = None
    """Optimizer steps done since the run began; a `fork` has none."""
    phase: str
    """What trains: `full`, `warmup` or `lora`."""


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The first attempt begins to train."""

    event: str = "run_started"
    seed: int | None = None
    """`train.seed`."""
    world_size: int
    """Workers."""
    reservation: dict[str, str] | None = None
    """What Ray Train has reserved for the attempt: `{"requester", "placement_group"}`."""
    device: str | None = None
    """Name of the GPU, or kind of the CPU, that rank 0 trains on."""


@dataclass(frozen=True, kw_only=True)
class Restart(Event):
    """A later attempt begins to train."""

    event: str = "restart"
    cause: str | None
    """Why the previous attempt ended: `failure`, `preemption`, `stop` or `driver` (it died)."""
    seconds: float | None = None
    """Time since the previous attempt last wrote progress.json."""
    steps_again: int = 0
    """Steps that have to be done again."""
    world_size: int
    """Workers."""
    reservation: dict[str, str] | None = None
    """What Ray Train has reserved for the attempt: `{"requester", "placement_group"}`."""
    device: str | None = None
    """Name of the GPU, or kind of the CPU, that rank 0 trains on."""


@dataclass(frozen=True, kw_only=True)
class Resize(Event):
    """An attempt has another number of workers than the previous one."""

    event: str = "resize"
    world_size: int
    """Workers from here on."""
    before: int | None
    """Workers of the previous attempt; `null` where it recorded none."""


@dataclass(frozen=True, kw_only=True)
class InitFrom(Event):
    """A note on the weights that `model.init_from` names, such as that the head is begun anew."""

    event: str = "init_from"
    message: str
    """The note."""


@dataclass(frozen=True, kw_only=True)
class WindowClosed(Event):
    """A window ends, and has its line in windows.jsonl."""

    event: str = "window"
    window: int
    """The window, from 0."""
    converged: bool
    """Whether the run has partially converged."""
    in_ramp: bool
    """Whether the learning-rate ramp kept the test from a verdict."""


@dataclass(frozen=True, kw_only=True)
class Switch(Event):
    """The adapters join."""

    event: str = "switch"
    switch_epoch: int
    """Completed epochs at the switch."""
    rate_left: float | None = None
    """Share of the learning rate's sum over the run that is left."""
    trainable_parameters: int
    """Parameters that train from here on."""
    parameters: int
    """Parameters of the model, adapters included."""
    format: str | None = None
    """Number format of the products that follow."""
    logit_change: float | None = None
    """The most that a logit of two fixed images changed by it."""


@dataclass(frozen=True, kw_only=True)
class Freeze(Event):
    """The adapted weights freeze."""

    event: str = "freeze"
    freeze_epoch: int
    """Completed epochs at the freeze."""
    trainable_parameters: int
    """Parameters that train from here on."""
    parameters: int
    """Parameters of the model, adapters included."""
    format: str | None = None
    """Number format of the products that follow."""
    logit_change: float | None = None
    """The most that a logit of two fixed images changed by it."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch(Event):
    """`train.micro_batch: auto` has searched for the phase and the size of the images."""

    event: str = "micro_batch"
    micro_batch: int
    """Images that a worker takes through the model at once."""
    image_size: int | None = None
    """Their side, in pixels."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is committed."""

    event: str = "checkpoint"
    checkpoint: str
    """Its name."""
    seconds: float
    """From the snapshot to the commit."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written."""

    event: str = "checkpoint_failed"
    checkpoint: str
    """Its name."""
    seconds: float
    """From the snapshot to the failure."""
    message: str
    """Why."""


@dataclass(frozen=True, kw_only=True)
class CheckpointDamaged(Event):
    """A checkpoint turned out damaged, and an older one was taken."""

    event: str = "checkpoint_damaged"
    message: str
    """Which one, and what is damaged."""


@dataclass(frozen=True, kw_only=True)
class Preemption(Event):
    """Nodes are about to go: the attempt ends here, and all is saved."""

    event: str = "preemption"


@dataclass(frozen=True, kw_only=True)
class Stop(Event):
    """The run was asked to stop: the attempt ends here, and all is saved."""

    event: str = "stop"


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event):
    """The run ends for good, by something that a further attempt would meet again at the same step."""

    event: str = "run_failed"
    message: str
    """Why, and what was saved last."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Event):
    """A failure signature ([sweeps.md](sweeps.md#diagnosis)), told once."""

    event: str = "diagnosis"
    signature: str
    """`early_switch`, `insufficient_warmup` or `uniform_ranks`."""
    value: float
    """The number that shows it, in percent."""
    limit: float
    """What it should not have exceeded, in percent."""
    message: str
    """The finding in words, with what to try."""


@dataclass(frozen=True, kw_only=True)
class Fork(Event):
    """The run begins with lines of its trunk. Two events, with the times of the trunk's first and last ones."""

    event: str = "fork"
    trunk: str
    """The trunk's run folder."""


EVENTS: dict[str, type[Event]] = {vars(kind)["event"]: kind for kind in Event.__subclasses__()}
"""The class of each kind of event, by what its `event` says."""
BEGINNINGS = RunStarted, Restart
"""The events with which an attempt begins."""

Line = NormsLine | WindowLine | EpochLine | Event
EventT = TypeVar("EventT", bound=Event)
LineT = TypeVar("LineT", NormsLine, WindowLine, EpochLine)
RecordT = TypeVar("RecordT", NormsLine, WindowLine, EpochLine, Event, Progress, Starting, Result)


def from_json(kind: type[RecordT], content: Mapping[str, Any], file: str) -> RecordT:
    """The record that a JSON object of `file` holds; keys that a later version added are ignored.

    An event becomes one of its own class, or a plain `Event` without one. Raises ValueError where a key is missing.
    """
    own = EVENTS.get(str(content.get("event")), Event) if kind is Event else kind
    missing = [f.name for f in fields(own) if f.default is MISSING and f.name not in content]
    if missing:
        raise ValueError(f"{file} holds an object without {missing[0]!r}, which it must have: {_start(content)}")
    return own(**{f.name: content[f.name] for f in fields(own) if f.name in content})  # type: ignore[return-value]


def to_json(record: Line | Progress | Starting | Result) -> dict[str, Any]:
    """The object to write."""
    return {f.name: getattr(record, f.name) for f in fields(record)}


def standing(lines: Iterable[LineT], key: Callable[[LineT], int]) -> list[LineT]:
    """The lines that stand: of those that agree in `key`, the one of the latest attempt, in the order of `key`."""
    found: dict[int, LineT] = {}
    for line in lines:
        place = key(line)
        if place not in found or line.attempt >= found[place].attempt:
            found[place] = line
    return [found[place] for place in sorted(found)]


def _start(content: Mapping[str, Any]) -> str:
    text = str(dict(content))
    return text if len(text) <= 80 else text[:77] + "..."
