"""What a run is: typed settings, checked before anything starts. `config_file.py` reads them."""

from __future__ import annotations

import re
import statistics
from types import UnionType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, Field, model_validator

from prelora_ray.data.augment_settings import AugmentSettings, Policy
from prelora_ray.data.prepare_settings import NAMED_SOURCES, TRAINED_TOKENIZERS, PrepareSettings
from prelora_ray.method.convergence import NormStatistic
from prelora_ray.method.phases import FreezeScope, Phase
from prelora_ray.method.ranks import PATTERN_RANKS, Normalize, is_pattern_rank, rank_choices
from prelora_ray.section import Acts, Count, NotNegative, Positive, Section, Share, Whole
from prelora_ray.storage import NO_KEYS, absolute, without_keys
from prelora_ray.words import counted

_RESERVED_OPTIONS = {
    "img_size": "set model.image_size",
    "drop_path_rate": "set model.drop_path",
    "num_classes": "the number of classes comes with the data, and model.num_classes may say what it must be",
    "pretrained": "set model.init_from",
    "checkpoint_path": "set model.init_from",
}


def _for_each_channel(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) not in (1, 3):
        raise ValueError("must be one value for all channels, such as [0.5], or three for red, green and blue")
    return values * 3 if len(values) == 1 else values


ForEachChannel = AfterValidator(_for_each_channel)


def _check_folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ValueError("must be 1 to 128 letters, digits, dots, dashes and underscores, and begin with a letter or digit")
    return name


FolderName = Annotated[str, AfterValidator(_check_folder_name)]


def _check_address(path: str) -> str:
    if without_keys(path) != path:
        raise ValueError(f"must be {NO_KEYS}")
    return path


Address = Annotated[str, AfterValidator(_check_address)]
"""A path or a bucket's URI."""
Task = Literal["classification", "mlm"]
_FOR_IMAGES = "|".join(
    [
        r"augment\..*",
        r"train\.(resolution|layer_decay)",
        r"data\.(mean|std|crop_ratio)",
        r"model\.(image_size|drop_path|drop_path_.*|batch_norm_in_lora)",
    ]
)
"""Keys that say nothing to text."""
DropPathForm = Literal["auto", "mask", "subset"]
TEXT_MODELS = ("bert",)
"""Models of transformers, which take tokens; all others are timm's."""


class ModelSettings(Section):
    name: str = "vit_small_patch16_224"
    """Name in timm of a model, such as a Vision Transformer or a ConvNeXt; `prelora models` tells which are known. Of
    text it is `bert`, which transformers makes."""
    image_size: Count = 224
    """Side of the square image that the model takes, in pixels."""
    drop_path: Share = 0.0
    """Stochastic depth: the probability of leaving out a residual branch, in the last block."""
    drop_path_rule: Literal["linear", "uniform"] = "linear"
    """What the blocks in front of it have: less and less, down to none in the first, as timm has it; or the same."""
    drop_path_form: DropPathForm = "auto"
    """How it is left out: computed and masked, for each image by chance; or not computed, for a fixed number of each
    cell's images, drawn, which saves its time. Auto is a subset where the model's blocks are plain ones and the cell is
    large enough."""
    batch_norm_in_lora: Annotated[Literal["frozen", "training"], Acts("switch")] = "frozen"
    """Batch norm in phase lora, of models that have it: by the running statistics as they are at the freeze; or as
    before, by the statistics of each cell, which the running ones follow."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `patch_size` or `depth`; `in_chans: 1` takes images as grey
    values. Of `bert` those of `transformers.BertConfig`, such as `hidden_size`, with dropout off."""
    init_from: Address | None = None
    """What the run starts from, for fine-tuning: a timm checkpoint, an export, another run or one of its checkpoints,
    whose adapters are merged; a path or an address in a bucket. A head of another number of classes is begun anew.
    Null draws the weights."""
    num_classes: Annotated[Count | None, Acts("never")] = None
    """Classes, or tokens of the vocabulary, that the data must have, which a plan goes by until they are prepared; null
    takes those of the data."""
    allow_download: Annotated[bool, Acts("never")] = False
    """Whether a name that fetches from a hub, such as `hf-hub:...`, may be used."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if ":" in self.name and not self.allow_download:
            raise ValueError(
                f"model.name = {self.name!r} fetches from elsewhere: give a plain timm name, or set model.allow_download: true"
            )
        for key, instead in _RESERVED_OPTIONS.items():
            if key in self.options:
                raise ValueError(f"model.options.{key} is not allowed: {instead}")
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise ValueError(f"model.options.in_chans = {self.channels!r} is not allowed: it must be 3, or 1 for grey images")
        return self

    @property
    def takes_text(self) -> bool:
        return self.name in TEXT_MODELS

    @property
    def channels(self) -> int:
        """Channels of the images that the model takes: 3, or 1, which is their grey value."""
        channels: int = self.options.get("in_chans", 3)
        return channels

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image that the model takes."""
        return self.channels, self.image_size, self.image_size


class DataSettings(Section):
    path: Annotated[Address, Acts("never")]
    """The prepared folder."""
    source: Annotated[Address | None, Acts("never")] = None
    """What to prepare into `path` on first use: `digits`, `pydoc`, or whatever `prelora prepare` takes."""
    prepare: Annotated[PrepareSettings, Acts("never")] = PrepareSettings()
    """How `source` is prepared: the options of `prelora prepare`, with an underscore for a dash."""
    batch_size: Count = 1024
    """Images, or sequences of text, in a global batch, over all workers."""
    cell: Count = 16
    """Images or sequences in a cell, a group that is never split between workers or micro-batches; images are mixed
    inside it."""
    shuffle_row_groups: Count = 16
    """Row groups whose rows are shuffled together."""
    decoders: Annotated[Count | Literal["auto"], Acts("never")] = "auto"
    """Decoding processes of each worker; auto is its share of the node's CPUs, which the GPUs of the node share."""
    mean: Annotated[tuple[Share, ...], ForEachChannel] = (0.485, 0.456, 0.406)
    """Mean of each channel, in 0..1; one value, such as [0.5], stands for all three. With in_chans 1 it is averaged."""
    std: Annotated[tuple[Positive, ...], ForEachChannel] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel; one value stands for all three. With in_chans 1 their average counts."""
    crop_ratio: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of the shorter side in evaluation's centre crop."""
    max_batches: Count | None = None
    """Most batches of an epoch, and of a validation, of the first images as they were prepared; null is all."""

    @property
    def num_cells(self) -> int:
        return self.batch_size // self.cell


class ResolutionStep(Section):
    until: Count | Annotated[float, Field(gt=0, lt=1)]
    """Where the step ends: completed epochs, or a share of the run below 1, which comes to the nearest epoch; behind
    `train.bend.after`, of the schedule as it was."""
    image_size: Count
    """Side of the training images until then, in pixels: whole patches, and at most `model.image_size`."""
    policy: Policy | None = None
    """Stands in for `augment.policy` until then, so that RandAugment's strength may rise with the size; null
    does not."""


class BendSettings(Section):
    after: Count
    """Completed epochs up to which the run keeps to the schedule as it was."""
    of: Count
    """Epochs of that schedule: `train.epochs` of the trunk."""


class TrainSettings(Section):
    epochs: Count = 300
    """Passes over the training images, all phases together."""
    bend: BendSettings | None = None
    """Ends a schedule of `of` epochs sooner: after `after` of them, what is left of it, learning rate and `resolution`
    alike, passes evenly faster, to be over with `train.epochs`. So a fork may end before its trunk."""
    seed: Whole = 0
    """Seed of everything that is drawn."""
    optimizer: Literal["adamw", "lamb"] = "adamw"
    """AdamW; or LAMB, which scales each matrix's step by its norm and suits large batches, as DeiT III has it. Tensors
    without weight decay take Adam's step in both. A step of LAMB is never a CUDA graph."""
    learning_rate: Positive = 1e-3
    """The peak learning rate, for the global batch as it is."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each layer to the one in front of it, such as 0.75 for fine-tuning: the head has
    the run's own, adapters have their block's."""
    ramp_epochs: Whole = 5
    """Epochs over which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "constant-then-decay"] = "cosine"
    """How the learning rate falls behind its ramp: by half a cosine over the rest of the run; or not at all until the
    last `decay_share` of the run, and there as 1 - sqrt, so that until then no step depends on where the run ends."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the epochs, at the run's end, over which `constant-then-decay` falls."""
    final_learning_rate_scale: Share = 0.01
    """What the learning rate ends at, as a share of the peak."""
    weight_decay: NotNegative = 0.05
    """The weight decay; norms, biases, tokens and position embeddings have none."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """The optimizer's decay rates of the moments."""
    clip_norm: Positive | None = 1.0
    """Largest norm of the gradient; null does not clip."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, such as 0.9999, which takes in each step's merged weights, is validated
    beside them, and goes into checkpoints: `prelora export --ema`. Null keeps none."""
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp8"] = "auto"
    """Number format of the products; auto is bf16 on GPUs and fp32 on CPUs. fp8 is e4m3 from phase `train.fp8_from` on,
    for what the blocks' linear layers put out and the gradients of what they take, and bf16 for all else, convolutions
    among it. What trains is float32 (fp64: float64)."""
    fp8_from: Phase = Phase.LORA
    """First phase whose products are e4m3 where `train.precision` is fp8. A fork may differ from its trunk in it, as in
    fp8 or bf16, unless one of them is e4m3 in phase full."""
    adapters: Annotated[Literal["plain", "merged"], Acts("switch")] = "merged"
    """How an adapted layer is computed: base and adapters apart, or as one product of the merged weights, as e4m3
    always is."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Number format of the residual stream between the blocks, where the products are bf16 or fp8."""
    gradient_exchange: Literal["fp32", "bf16"] = "fp32"
    """Number format in which workers exchange their gradients; fp32 is that of what trains. bf16 is half the bytes, and
    rounds to 8 significant bits on each worker and in each sum."""
    compile: bool | Literal["auto"] = "auto"
    """Whether the model's blocks go through torch.compile; auto does on GPUs."""
    cuda_graph: bool = True
    """Whether a single GPU worker replays its step as one CUDA graph, which frees small models from launch costs; of
    AdamW."""
    micro_batch: Annotated[Count | Literal["auto"] | None, Acts("never")] = None
    """Most images that a worker takes through the model at once, a multiple of `data.cell`; null takes its whole share,
    and so does auto on a CPU. On a GPU auto finds the most that fits, once for each phase and size of images, and notes
    it in the run folder."""
    validate_every: Count = 1
    """Epochs between validations; the last epoch is always validated."""
    resolution: tuple[ResolutionStep, ...] = ()
    """Smaller training images first: steps, one behind the other, with `model.image_size` behind the last one, such as
    [{until: 0.6, image_size: 160}]. Validation is at `model.image_size` throughout."""

    @property
    def length_key(self) -> str:
        """The key that says how long the schedule is."""
        return "train.epochs" if self.bend is None else "train.bend.of"

    @property
    def schedule_epochs(self) -> int:
        """Epochs of the schedule as it is without a bend."""
        return self.epochs if self.bend is None else self.bend.of

    @property
    def decay_epochs(self) -> float:
        """Epochs over which `constant-then-decay` falls, in the schedule as it is without a bend."""
        return self.decay_share * self.schedule_epochs

    def scheduled(self, done: int, steps: int = 1) -> float:
        """How much of the schedule has passed after so many epochs of the run, or after so many steps, `steps` to an
        epoch."""
        if self.bend is None:
            return done
        after = self.bend.after
        pace = (self.bend.of - after) / (self.epochs - after)
        return done + max(0, done - after * steps) * (pace - 1)

    @property
    def scheduled_step_ends(self) -> list[int]:
        """Epochs of the schedule that have passed at the end of each step of `resolution`."""
        shares = (step.until for step in self.resolution)
        return [until if isinstance(until, int) else round(until * self.schedule_epochs) for until in shares]

    @property
    def step_ends(self) -> list[int]:
        """Completed epochs at the end of each step of `resolution`; behind a bend a step has the epochs that lie in it
        as a whole."""
        ends = self.scheduled_step_ends
        if self.bend is None:
            return ends
        after, left, of = self.bend.after, self.epochs - self.bend.after, self.bend.of - self.bend.after
        return [end if end <= after else after + (end - after) * left // of for end in ends]


class MethodSettings(Section):
    enabled: bool = True
    """Whether the run switches at all; false is plain full training, whose norms are recorded all the same."""
    tau: NotNegative = 0.5
    """Largest norm change of a family between windows that still counts as converged, in percent (not included)."""
    zeta: NotNegative = 2.5
    """Largest loss change between windows that still counts as converged, in percent."""
    windows: Annotated[int, Field(ge=2, strict=True)] = 3
    """Windows that the test looks at (the paper's k)."""
    window_epochs: Count = 3
    """Epochs in a window (the paper's m)."""
    norm_statistic: NormStatistic = "last"
    """A window's norm: that of its last epoch, or the mean over its epochs."""
    switch_epoch: Count | None = None
    """Switches after this many epochs instead of by the test."""
    warmup_epochs: Whole = 10
    """Epochs in which base and adapters train together."""
    r_min: Count = 8
    """Smallest rank, a power of two."""
    r_max: Count = 64
    """Largest rank, a power of two."""
    rank_floor_percent: NotNegative = 0.0
    """Change over the last step, in percent, below which a module gets no adapter and freezes as it is; the one that
    changes most always has an adapter."""
    normalize: Normalize = "family"
    """Whether changes are min-max normalised within each family or over all modules."""
    rank_pattern: dict[str, Whole] | None = None
    """Ranks given by hand instead of by the rule: {regular expression on module names: rank}; rank 0 is no adapter."""
    scaling: Positive = 2.0
    """s in W + s B A, which is lora_alpha / rank."""
    targets: Annotated[tuple[str, ...] | None, Acts("always")] = None
    """Which matrices of a block get adapters, by their families, such as `[query, value, fc1]`; null is all that the
    model has, which `prelora models` tells."""
    freeze: FreezeScope = "adapted"
    """What phase lora freezes: the adapted weights, all but the head, or the adapted weights and all before them."""
    adapter_learning_rate_scale: Positive = 1.0
    """The adapters' learning rate in phase lora, as a multiple of the run's; in warmup, where the base moves along with
    them, it is the run's."""
    adapter_ramp_steps: Whole = 50
    """Steps over which the adapters' learning rate rises from 0 after the switch."""
    adapter_weight_decay: NotNegative = 0.0
    """The weight decay on A and B."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            rank_choices(self.r_min, self.r_max)
        except ValueError as error:
            raise ValueError(f"method.{error}") from None
        for key, rank in (self.rank_pattern or {}).items():
            if not is_pattern_rank(rank):
                raise ValueError(f"method.rank_pattern.{key} = {rank} is not allowed: {PATTERN_RANKS}")
        if self.targets is not None and not self.targets:
            raise ValueError("method.targets is empty: name at least one family of matrices, or null for all")
        if self.switch_epoch is not None and self.rank_pattern is None and self.switch_epoch < 2 * self.window_epochs:
            raise ValueError(
                f"method.switch_epoch = {self.switch_epoch} is not allowed: ranks need two windows of "
                f"{counted(self.window_epochs, 'epoch')} before it, or set method.rank_pattern"
            )
        return self


class WorkerSettings(Section):
    min: Count = 1
    """Fewest workers that the run starts and goes on with."""
    max: Count = 1
    """Most workers; the run grows to it where there is room."""
    cpus: Positive = 1.0
    """CPUs that each worker asks Ray for."""
    gpu: bool | Literal["auto"] = "auto"
    """Whether each worker takes a GPU; auto does where the cluster has enough of them as the run begins, and a resumed
    run keeps to that."""
    max_failures: Annotated[int, Field(ge=-1, strict=True)] = 10
    """Failures of workers that a run survives, preemptions not counted; -1 is any number."""
    hang_seconds: Positive = 120.0
    """A worker without progress for so long is ended, and the group restarts; starts and compilations may take 10
    times as long."""

    def take_gpus(self, there: float) -> bool:
        """What `gpu` comes to where a cluster has so many GPUs."""
        return there >= self.min if self.gpu == "auto" else self.gpu


class CheckpointSettings(Section):
    every_epochs: Count = 1
    """Epochs between checkpoints; the end of a phase and of the run always make one."""
    every_steps: Count | None = None
    """Steps between checkpoints inside an epoch; null makes none for steps."""
    every_seconds: Positive | None = 60.0
    """Seconds between checkpoints inside an epoch: about what a crash costs; null makes none for time."""
    keep: Count = 2
    """Newest checkpoints that are kept, besides the best and those on both sides of a change of phase."""
    keep_trunk: bool = False
    """Whether every checkpoint of phase full at the end of a window is kept, for runs that fork from it."""


class MonitorSettings(Section):
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """What rank 0 logs each epoch to, besides the run's records: TensorBoard in the run folder; MLflow and Weights &
    Biases, each an extra, where their own environment variables say."""
    enabled: bool = True
    """Whether the run's metrics go to the cluster's exporter, which serves them to Prometheus."""
    host: str = "127.0.0.1"
    """Address that the exporter listens on, on the cluster's head: this machine alone; `0.0.0.0` is every network."""
    port: Annotated[int, Field(ge=1024, le=65000, strict=True)] = 9464
    """Port that it takes; the next free one where it is taken. An exporter that runs already keeps its own."""


class Settings(Section):
    """A run, as one YAML file describes it."""

    name: Annotated[FolderName, Acts("never")]
    """Name of the run and of its folder; the same name again resumes it. Default: the file's own."""
    storage: Annotated[Address, Acts("never")] = "runs"
    """Folder, file share or bucket that holds the run folders."""
    task: Task = "classification"
    """What is trained: image classification; or masked language modelling (docs: text.md), of `model.name: bert`."""
    audit_samples: Annotated[bool, Acts("never")] = False
    """Whether every worker records the samples of every batch."""
    model: ModelSettings = ModelSettings()
    data: DataSettings
    augment: AugmentSettings = AugmentSettings()
    train: TrainSettings = TrainSettings()
    method: Annotated[MethodSettings, Acts("switch")] = MethodSettings()
    workers: Annotated[WorkerSettings, Acts("never")] = WorkerSettings()
    checkpoint: Annotated[CheckpointSettings, Acts("never")] = CheckpointSettings()
    monitor: Annotated[MonitorSettings, Acts("never")] = MonitorSettings()

    @property
    def sample(self) -> str:
        """What a sample of the task is called."""
        return "sequence" if self.model.takes_text else "image"

    def resolution_step(self, epoch: int) -> ResolutionStep | None:
        """The step of `train.resolution` that an epoch (from 0) is in; None behind the last."""
        steps = zip(self.train.step_ends, self.train.resolution, strict=True)
        return next((step for end, step in steps if epoch < end), None)

    def image_size(self, epoch: int) -> int:
        """Side of the images that an epoch (from 0) trains on, in pixels."""
        step = self.resolution_step(epoch)
        return self.model.image_size if step is None else step.image_size

    def augment_at(self, step: ResolutionStep) -> AugmentSettings:
        """The augmentation of a step of `train.resolution`: a padded crop's border shrinks with the images."""
        padding = round(self.augment.padding * step.image_size / self.model.image_size)
        return self.augment.model_copy(update={"padding": padding, "policy": step.policy or self.augment.policy})

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel that the model takes; of grey, the averages over the colours."""
        mean, std = self.data.mean, self.data.std
        if self.model.channels == 1:
            return (statistics.mean(mean),), (statistics.mean(std),)
        return mean, std

    @model_validator(mode="after")
    def _check(self) -> Self:
        data, train, method, workers = self.data, self.train, self.method, self.workers
        if data.batch_size % data.cell:
            raise ValueError(
                f"data.batch_size = {data.batch_size} is not allowed: it must be a multiple of data.cell = {data.cell}"
            )
        if workers.min > workers.max:
            raise ValueError(f"workers.min = {workers.min} is not allowed: it must not exceed workers.max = {workers.max}")
        if workers.max > data.num_cells:
            raise ValueError(
                f"workers.max = {workers.max} is not allowed: a batch of {data.batch_size} has "
                f"{counted(data.num_cells, 'cell')} of {data.cell}, and a worker needs at least one"
            )
        if isinstance(train.micro_batch, int) and train.micro_batch % data.cell:
            raise ValueError(
                f"train.micro_batch = {train.micro_batch} is not allowed: it must be a multiple of data.cell = {data.cell}"
            )
        if method.enabled and method.switch_epoch is None and train.epochs < method.windows * method.window_epochs:
            raise ValueError(
                f"train.epochs = {train.epochs} is not allowed: the test needs {counted(method.windows, 'window')} "
                f"of {counted(method.window_epochs, 'epoch')}, so at least {method.windows * method.window_epochs}; or set "
                "a smaller method.window_epochs or method.windows, method.switch_epoch to switch without the test, or "
                "method.enabled: false for full training alone"
            )
        if method.enabled and method.switch_epoch is not None and method.switch_epoch >= train.epochs:
            raise ValueError(
                f"method.switch_epoch = {method.switch_epoch} is not allowed: it must be below train.epochs = {train.epochs}"
            )
        if self.checkpoint.keep_trunk and method.window_epochs % self.checkpoint.every_epochs:
            raise ValueError(
                f"checkpoint.every_epochs = {self.checkpoint.every_epochs} is not allowed with checkpoint.keep_trunk: it must "
                f"divide method.window_epochs = {method.window_epochs}"
            )
        if train.gradient_exchange == "bf16" and train.precision == "fp64":
            raise ValueError(
                "train.gradient_exchange = 'bf16' is not allowed with train.precision = 'fp64', of which it would leave 8 "
                "bits: use fp32, which then is float64"
            )
        if train.bend is not None and not train.bend.after < train.epochs < train.bend.of:
            raise ValueError(
                f"train.epochs = {train.epochs} is not allowed: it must be above train.bend.after = {train.bend.after} and "
                f"below train.bend.of = {train.bend.of}"
            )
        if train.ramp_epochs >= train.schedule_epochs:
            raise ValueError(
                f"train.ramp_epochs = {train.ramp_epochs} is not allowed: it must be below {train.length_key} = "
                f"{train.schedule_epochs}"
            )
        if train.schedule == "constant-then-decay" and train.ramp_epochs + train.decay_epochs > train.schedule_epochs:
            raise ValueError(
                f"train.decay_share = {train.decay_share:g} is not allowed: it comes to {train.decay_epochs:g} epochs, and "
                f"{train.schedule_epochs - train.ramp_epochs} are left behind the ramp"
            )
        self._check_resolution()
        self._check_task()
        return self

    def _check_task(self) -> None:
        """Refuses what says nothing to the task, but as it is by default: a run's own config.yaml holds every key."""
        if self.model.takes_text != (self.task == "mlm"):
            takes = f"it trains {' or '.join(TEXT_MODELS)}" if self.task == "mlm" else "set task: mlm"
            raise ValueError(f"model.name = {self.model.name!r} is not allowed with task = {self.task!r}: {takes}")
        told = f"is not allowed with task = {self.task!r}: it is for {'images' if self.task == 'mlm' else 'text'} alone"
        for key in self.data.prepare.of_other_tasks(self.task):
            raise ValueError(f"data.prepare.{key} = {getattr(self.data.prepare, key)!r} {told}")
        if self.task == "mlm":
            values, defaults = comparable(self), comparable(Settings(name="default", data=DataSettings(path="none")))
            for key in values:
                if re.fullmatch(_FOR_IMAGES, key) and values[key] != defaults[key]:
                    raise ValueError(f"{key} = {values[key]!r} {told}")
            if self.train.precision == "fp8":
                raise ValueError("train.precision = 'fp8' is not allowed with task = 'mlm': use bf16")

    def _check_resolution(self) -> None:
        train, before = self.train, 0
        for step, end in zip(train.resolution, train.scheduled_step_ends, strict=True):
            if not before < end < train.schedule_epochs:
                raise ValueError(
                    f"train.resolution.until = {step.until:g} is not allowed: it comes to {counted(end, 'epoch')}, which must "
                    f"be more than {before}, where its step begins, and fewer than {train.length_key} = {train.schedule_epochs}"
                )
            if step.image_size > self.model.image_size:
                raise ValueError(
                    f"train.resolution.image_size = {step.image_size} is not allowed: it must be at most model.image_size = "
                    f"{self.model.image_size}, which the run ends at"
                )
            before = end
        if train.resolution and self.model.options.get("dynamic_img_size") is False:
            raise ValueError("model.options.dynamic_img_size = False is not allowed with train.resolution, which needs it")


def with_absolute_paths(settings: Settings) -> Settings:
    """The same settings with local paths from the root on, as workers run in other folders."""
    data, model = settings.data, settings.model
    data = data.model_copy(update={"path": absolute(data.path)})
    if data.source is not None:
        data = data.model_copy(update={"source": absolute_source(data.source)})
    if data.prepare.tokenizer not in TRAINED_TOKENIZERS:
        prepare = data.prepare.model_copy(update={"tokenizer": absolute(data.prepare.tokenizer)})
        data = data.model_copy(update={"prepare": prepare})
    if model.init_from is not None:
        model = model.model_copy(update={"init_from": absolute(model.init_from)})
    return settings.model_copy(update={"storage": absolute(settings.storage), "data": data, "model": model})


def absolute_source(source: str) -> str:
    """As `absolute`, for what `prelora prepare` takes; `digits` and `pydoc` are words and no paths."""
    return source if source in NAMED_SOURCES else absolute(source)


def acts(key: str) -> Literal["always", "switch", "never"]:
    """When a key, such as `method.tau`, acts: as it is marked, or else as the section around it is."""
    when: Literal["always", "switch", "never"] = "always"
    section: Any = Settings
    for name in key.split("."):
        field = section.model_fields[name]
        when = next((mark.when for mark in field.metadata if isinstance(mark, Acts)), when)
        section = inner_section(field.annotation)
        if section is None:
            break  # what follows is inside the value, as `depth` is in `model.options.depth`
    return when


def inner_section(annotation: Any) -> type[Section] | None:
    """The section that a field is, may be, or that the entries of its list are; None where it is a value."""
    parts = get_args(annotation) if get_origin(annotation) in (tuple, UnionType) else (annotation,)
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)


OF_DROP_PATH = {"model.drop_path_rule": "linear", "model.drop_path_form": "mask"}
"""Keys that say nothing where `model.drop_path` is 0, with what they are taken for there."""
_PLAIN = ["query", "key", "value", "proj", "fc1", "fc2"]
"""All families of a plain Vision Transformer, as runs of an earlier version have them in their config.yaml."""


def flat(settings: Section) -> dict[str, Any]:
    """The settings as {key.path: value}, all of them."""
    return _flat(settings.model_dump(mode="json"))


def comparable(settings: Section) -> dict[str, Any]:
    """`flat`, in which what comes to the same is the same."""
    found = flat(settings)
    if found.get("method.targets") == _PLAIN:
        found["method.targets"] = None
    if found.get("model.drop_path") == 0:
        found |= OF_DROP_PATH
    return found


def settled_alike(settings: Settings, other: Settings) -> Settings:
    """Settings whose `model.drop_path_form: auto` is what it came to in a run of other settings."""
    if settings.model.drop_path_form != "auto":
        return settings
    model = settings.model.model_copy(update={"drop_path_form": other.model.drop_path_form})
    return settings.model_copy(update={"model": model})


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
