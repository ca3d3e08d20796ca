"""The settings of a whole run: the engine's, and those of data, model, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ..config import PRESETS, IntervalField, Settings, WormConfig, WormParts, merge
from ..interval import Interval

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "DivergenceConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
]


class DataConfig(Settings):
    """What is learned from."""

    name: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "image-folder"] = "digits"
    root: str | None = None
    """Folder that holds the data; ``digits`` needs none, it ships with scikit-learn."""
    batch_size: int = Field(default=64, ge=1)
    """Samples in one optimizer step, over all ranks together."""
    augment: bool = True
    """The data set's standard augmentation of its training split."""
    image_size: int = Field(default=224, ge=8)
    """Side of the square crops of ``image-folder``."""
    num_workers: int = Field(default=0, ge=0)
    """Loader processes on each rank."""

    @model_validator(mode="after")
    def _root_where_needed(self) -> Self:
        if self.name != "digits" and self.root is None:
            raise ValueError(f"root is needed for {self.name!r}: the folder that holds the data")
        return self


class ModelConfig(Settings):
    """What learns."""

    name: str = "vgg_small"
    """One of worm_dist.models, or any classification model of torchvision."""
    arguments: dict[str, Any] = Field(default={})
    """Further keyword arguments of its constructor."""


class OptimizerConfig(Settings):
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD only."""
    nesterov: bool = False
    """SGD only."""
    weight_decay: float = Field(default=5e-4, ge=0)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs sgd with a momentum above 0")
        return self


class ScheduleConfig(Settings):
    name: Literal["constant", "cosine", "step"] = "cosine"
    warmup_epochs: int = Field(default=0, ge=0)
    milestones: list[int] = Field(default=[])
    """``step`` only: epochs at which the learning rate is multiplied by ``gamma``."""
    gamma: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> Self:
        if (self.name == "step") != bool(self.milestones):
            raise ValueError(f"milestones {self.milestones} contradict schedule {self.name!r}")
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must rise")
        return self


class DistributedConfig(Settings):
    backend: Literal["auto", "gloo", "nccl", "deepspeed"] = "auto"
    """``auto``: DistributedDataParallel over nccl where every rank has a GPU, else over gloo.
    ``deepspeed``: DeepSpeed's engine, over the same."""
    deepspeed: str | None = None
    """DeepSpeed's own settings, a JSON file; without one ZeRO stage 1."""
    startup_timeout_seconds: int = Field(default=900, ge=1)
    """How long ranks wait for one another until the first step is done: programs are loaded, files
    are listed and kernels are chosen for the first time, on some hosts slower than on others."""
    timeout_seconds: int = Field(default=300, ge=1)
    """The same from then on.  Whoever does not come in time is named, and all ranks stop."""
    bucket_cap_mb: float = Field(default=25, gt=0)
    """Of DistributedDataParallel."""

    @model_validator(mode="after")
    def _settings_belong_to_deepspeed(self) -> Self:
        if self.deepspeed is not None and self.backend != "deepspeed":
            raise ValueError(
                f"deepspeed {self.deepspeed!r} contradicts backend {self.backend!r}; choose "
                "backend 'deepspeed'"
            )
        return self


class DivergenceConfig(Settings):
    """When the ranks prove that they hold the same network."""

    check_every: IntervalField = Interval(1, "ep")
    """How often the ranks compare their weights, bit by bit; ``1ba`` finds the step."""


class CheckpointConfig(Settings):
    """From where a run can go on."""

    every: IntervalField = Interval(1, "ep")
    keep_last: int = Field(default=3, ge=2)
    """How many of the newest are kept: at least two, as the newest may turn out damaged.  That of
    the best accuracy is kept besides."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a run does that cannot write one."""


class RunConfig(WormParts):
    """All settings of a run.

    Raises:
        ConfigError: listing every mistake at once.
    """

    name: str = Field(default="run", pattern=r"^[\w.-]+$")
    preset: Literal["worm", "worm-paper", "early-bird", "dense"] = "worm"
    seed: int = Field(default=0, ge=0)
    epochs: int = Field(default=20, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    distributed: DistributedConfig = DistributedConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __init__(self, **values: Any) -> None:
        preset = values.get("preset", "worm")
        base = PRESETS[preset] if isinstance(preset, str) and preset in PRESETS else {}
        super().__init__(**merge(base, values))

    @property
    def worm(self) -> WormConfig:
        """The engine's part of the run."""
        return WormConfig(search=self.search, truncation=self.truncation, ticket=self.ticket)

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        return dict(_flat(self.model_dump(mode="json")))


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings, with its dotted key."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
