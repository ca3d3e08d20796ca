"""Settings of a whole run: engine, data, model, optimizer, schedule, backend and checkpoints."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    PlainSerializer,
    model_validator,
)
from typing_extensions import Self

from ..config import IntervalField, WormConfig, WormParts
from ..interval import Interval
from ..presets import PRESETS, merge
from ..settings import Count, Factor, Settings
from ..user_function import is_user_function

__all__ = [
    "DATA_SETS",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "DivergenceConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RetrainingConfig",
    "RunConfig",
    "ScheduleConfig",
]


def _require_path(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"a path cannot contain NUL, got {text!r}")
    return text


PathText = Annotated[str, AfterValidator(_require_path)]
Seconds = Annotated[int, Field(ge=1, le=1_000_000)]
"""Limited because sockets count milliseconds in 32 bits, which is 24 days."""


DATA_SETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "image-folder")


def _require_data(name: str) -> str:
    if name in DATA_SETS or is_user_function(name):
        return name
    near = difflib.get_close_matches(name, DATA_SETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"take one of {', '.join(DATA_SETS)}"
    raise ValueError(
        f"there is no {name[:100]!r}; {hint}; or name a function of yours as "
        "package.module:function"
    )


OnGpus = Literal["auto", "on", "off"]
"""``auto``: where it is known to pay, on GPUs."""


class DataConfig(Settings):
    """The data set."""

    name: Annotated[str, AfterValidator(_require_data)] = "digits"
    """``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100`` or ``image-folder``; or a function
    of yours, ``package.module:function``, which is called with these settings of ``data`` and
    returns ``(training split, test split)`` or a ``worm_dist.training.data.Data``."""
    root: PathText | None = None
    """Folder that holds the data; not needed for ``digits``, which ships with scikit-learn, and by
    a function of yours only if it reads it."""
    batch_size: Count = Field(default=64, ge=1)
    """Samples in one optimizer step, summed over all ranks."""
    augment: bool = True
    """Whether the training split gets the data set's standard augmentation."""
    test_split: Literal["test", "train"] = "test"
    """The split that accuracy is measured on.  ``train``: the training split, without augmentation,
    as WORM's author does; the test split is not used then."""
    mean: Annotated[Factor, Field(ge=0)] | None = None
    """Mean by which images are normalised, in all channels, with values from 0 to 1; the default
    is that of each channel of the data set.  A function of yours normalises by itself."""
    std: Annotated[Factor, Field(gt=0)] | None = None
    """Standard deviation by which images are normalised; together with ``mean``."""
    image_size: int = Field(default=224, ge=8, le=2**14)
    """Side of the square crops of ``image-folder``, in pixels."""
    num_workers: int = Field(default=0, ge=0, le=1024)
    """Loader processes on each rank."""

    @model_validator(mode="after")
    def _root_where_needed(self) -> Self:
        if self.name in DATA_SETS and self.name != "digits" and self.root is None:
            raise ValueError(f"root is needed for {self.name!r}: the folder that holds the data")
        return self

    @model_validator(mode="after")
    def _mean_and_std_together(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both or neither")
        return self


class ModelConfig(Settings):
    """The network."""

    name: str = "vgg_small"
    """``vgg_small``, ``vgg11_bn``, ``resnet18``, ``resnet20``, ``resnet56``, ``preresnet20``,
    ``preresnet101`` or ``vit_small``; any classification model of torchvision; ``timm/NAME``; or a
    function of yours, ``package.module:function``, which is called with ``num_classes``,
    ``in_channels`` and ``model.arguments`` by keyword and returns a module."""
    arguments: dict[str, JsonValue] = Field(default={})
    """Further keyword arguments of the model's constructor or function."""
    num_classes: Annotated[Count, Field(ge=2)] | None = None
    """Outputs of the head; the default is the number of classes of the data.  More of them, such as
    the 1000 of weights trained on ImageNet, are classes that no sample has."""
    weights: PathText | None = None
    """File of pretrained weights for all of the network: a state dict of ``torch.save``, such as
    torchvision's, or ``.safetensors``.  Nothing in it is executed."""
    norm_scale: Annotated[Factor, Field(gt=0)] | None = None
    """Initial scale of every BatchNorm, which torch sets to 1; Early-Bird's authors begin with
    0.5."""
    channels_last: OnGpus = "auto"
    """Whether weights of convolutions, and images, have their channels innermost in memory, as
    tensor cores take them.  ``auto``: on GPUs, but neither in ``fp32`` nor under DeepSpeed."""

    @model_validator(mode="after")
    def _weights_have_scales(self) -> Self:
        if self.weights is not None and self.norm_scale is not None:
            raise ValueError(
                f"norm_scale {self.norm_scale:g} contradicts weights {self.weights!r}, which have "
                "scales of their own"
            )
        return self


class OptimizerConfig(Settings):
    """The optimizer."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """One of torch's."""
    lr: Factor = Field(default=0.1, gt=0)
    """The learning rate, of which the schedule takes a part at each step."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD only."""
    nesterov: bool = False
    """SGD only."""
    weight_decay: Factor = Field(default=5e-4, ge=0)
    """Weight decay: for ``adamw`` decoupled from the gradients."""
    fused: OnGpus = "auto"
    """Whether a step is one operation over all parameters.  ``auto``: on GPUs."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs sgd with a momentum above 0")
        return self


class ScheduleConfig(Settings):
    """The learning rate's schedule."""

    name: Literal["constant", "cosine", "step"] = "cosine"
    """``cosine`` falls to zero at the end of the run."""
    warmup_epochs: Count = Field(default=0, ge=0)
    """Epochs at the start in which the learning rate rises linearly."""
    milestones: list[Annotated[Count, Field(ge=1)]] = Field(default=[])
    """``step`` only: epochs at which the learning rate is multiplied by ``gamma``."""
    gamma: float = Field(default=0.1, gt=0, lt=1)
    """``step`` only."""

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> Self:
        if (self.name == "step") != bool(self.milestones):
            raise ValueError(f"milestones {self.milestones} contradict schedule {self.name!r}")
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must increase")
        return self


def _rewind(value: object) -> object:
    return value if value in ("keep", "start") else Interval.parse(value)


class RetrainingConfig(Settings):
    """How the ticket is trained after the draw; by default it goes on as before."""

    epochs: Annotated[Count, Field(ge=1)] | None = None
    """Epochs of training after the draw, under the learning rate's schedule from its beginning;
    ``epochs`` is then the most that the search takes.  The default is what is left of ``epochs``,
    and the schedule goes on."""
    until_accuracy: float | None = Field(default=None, gt=0, le=1)
    """The run ends after the epoch whose accuracy on the test split reaches this."""
    optimizer: Literal["keep", "fresh"] = "keep"
    """``fresh``: the optimizer forgets its moments at the draw."""
    weights: Annotated[
        Interval | Literal["keep", "start"],
        BeforeValidator(_rewind),
        PlainSerializer(str, return_type=str),
    ] = "keep"
    """``start``: the ticket goes back to its initial weights; an interval such as ``2ep``: to those
    after so much training (rewinding).  Statistics of norms go back too."""


class DistributedConfig(Settings):
    """How the ranks work together."""

    backend: Literal["auto", "gloo", "nccl", "fsdp", "deepspeed"] = "auto"
    """``auto``: DistributedDataParallel over nccl if every rank has a GPU, otherwise over gloo.
    ``fsdp``: torch's ``fully_shard``, and ``deepspeed``: DeepSpeed's engine, over the same
    transport."""
    deepspeed: PathText | None = None
    """Path of DeepSpeed's JSON configuration; the default is ZeRO stage 1."""
    startup_timeout_seconds: Seconds = 900
    """Longest time that a rank may lag behind until the first step is done.  Loading programs,
    listing files and choosing kernels may take much longer on some hosts than on others."""
    timeout_seconds: Seconds = 300
    """The same limit from then on.  Ranks that exceed it are named, and all ranks stop."""
    bucket_cap_mb: float = Field(default=25, gt=0, le=1e6)
    """DistributedDataParallel's bucket size in MiB; under ``fsdp`` the size from which modules are
    sharded by themselves, so that their weights are gathered together."""

    @property
    def transport(self) -> Literal["auto", "gloo", "nccl"]:
        """The backend of ``torch.distributed``."""
        if self.backend == "gloo" or self.backend == "nccl":
            return self.backend
        return "auto"

    @model_validator(mode="after")
    def _settings_belong_to_deepspeed(self) -> Self:
        if self.deepspeed is not None and self.backend != "deepspeed":
            raise ValueError(
                f"deepspeed {self.deepspeed!r} contradicts backend {self.backend!r}; choose "
                "backend 'deepspeed'"
            )
        return self


class DivergenceConfig(Settings):
    """The check that all ranks hold the same weights."""

    check_every: IntervalField = Interval(1, "ep")
    """Interval between bitwise comparisons of the weights; ``1ba`` finds the step of divergence."""


class CheckpointConfig(Settings):
    """Checkpoints to resume from."""

    every: IntervalField = Interval(1, "ep")
    """Interval between them; the end of the run is always saved."""
    keep_last: Count = Field(default=3, ge=2)
    """Number of newest checkpoints that are kept: at least two, as the newest may be damaged.  The
    checkpoint with the best accuracy is kept in addition."""
    on_error: Literal["stop", "continue"] = "stop"
    """Reaction to a checkpoint that cannot be written."""


class RunConfig(WormParts):
    """All settings of a run.

    Raises:
        ConfigError: settings are wrong; lists every mistake.
    """

    name: str = Field(default="run", pattern=r"^[\w-][\w.-]*$", max_length=200)
    """Name of the run's folder in ``runs``; restricted to valid folder names."""
    preset: Literal["worm", "worm-paper", "early-bird", "dense"] = "worm"
    """The method: its settings are the defaults of the others.  ``worm``: dropped channels leave
    the all-reduce, then the network, one after another.  ``worm-paper``: the published rule.
    ``early-bird``: search only.  ``dense``: no search."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initial weights, shuffling and augmentation."""
    epochs: Count = Field(default=20, ge=1)
    """Length of the training."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """``tf32``: float32; GPUs that can round the inputs of convolutions and matrix products to ten
    mantissa bits, CPUs do not.  ``fp32``: no rounding.  ``bf16``: autocast to bfloat16."""
    cudnn_benchmark: bool = True
    """Whether cuDNN tries its kernels on each new size of input and keeps the fastest."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    retraining: RetrainingConfig = RetrainingConfig()
    distributed: DistributedConfig = DistributedConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _weights_are_here(self) -> Self:
        retraining = self.retraining
        changed = [
            f"retraining.{key} '{value}'"
            for key, value in (("optimizer", retraining.optimizer), ("weights", retraining.weights))
            if value != "keep"
        ]
        if changed and self.distributed.backend == "deepspeed":
            raise ValueError(
                f"{' and '.join(changed)} contradict distributed.backend 'deepspeed', which keeps "
                "moments and weights of its own; use DistributedDataParallel"
            )
        if retraining.weights != "keep" and self.distributed.backend == "fsdp":
            raise ValueError(
                f"retraining.weights '{retraining.weights}' contradicts distributed.backend "
                "'fsdp', which keeps shards of the weights alone; use DistributedDataParallel"
            )
        return self

    @model_validator(mode="after")
    def _weights_are_flat(self) -> Self:
        backend = self.distributed.backend
        if self.model.channels_last == "on" and backend in ("deepspeed", "fsdp"):
            raise ValueError(
                f"model.channels_last 'on' contradicts distributed.backend {backend!r}, which "
                "keeps weights in flat buffers; choose 'auto'"
            )
        return self

    def __init__(self, /, **values: Any) -> None:
        preset = values.get("preset", "worm")
        base = PRESETS[preset] if isinstance(preset, str) and preset in PRESETS else {}
        super().__init__(**merge(base, values))

    @property
    def worm(self) -> WormConfig:
        """The engine's settings."""
        return WormConfig(search=self.search, truncation=self.truncation, ticket=self.ticket)

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted name.

        A mapping that the user defines becomes a list of its items, as their order may matter.
        """
        return dict(_flat(self))


def _flat(part: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    values = part.model_dump(mode="json")
    for name in type(part).model_fields:
        below = getattr(part, name)
        value = values.get(name, below)  # a ratio that a budget replaces is not written
        if isinstance(below, Settings):
            yield from _flat(below, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            yield f"{prefix}{name}", [[key, below] for key, below in value.items()]
        else:
            yield f"{prefix}{name}", value
