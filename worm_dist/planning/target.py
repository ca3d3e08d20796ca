"""Target of a forecast: the network and the settings it would be trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..config import WormConfig
from ..errors import ConfigError
from ..models import BUILDERS, build_model
from ..training.config_file import read_run_config
from ..training.deepspeed_config import deepspeed_settings
from ..training.run_config import DataConfig, RunConfig
from ..user_function import is_user_function
from .wrapper import WrapperKind, WrapperSettings, ZeroSettings

__all__ = ["Shape", "Target", "target_of", "target_of_config"]

Shape = tuple[int, int, int]
"""Channels, height, width."""

# Known without the files, which may be on another machine.
_SAMPLES: Mapping[str, tuple[Shape, int]] = {
    "digits": ((1, 8, 8), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}
_SMALL_IMAGES, _LARGE_IMAGES = _SAMPLES["cifar10"], ((3, 224, 224), 1000)
_FIXED_SIZE = {"vit_small": _SAMPLES["digits"]}
"""Models of worm_dist that accept a single input size."""
_SAMPLES_PER_RANK = 32
_KINDS: Mapping[str, WrapperKind] = {"fsdp": "fsdp", "deepspeed": "deepspeed"}
"""Wrappers by backend; with the others it is DistributedDataParallel."""


@dataclass(frozen=True)
class Target:
    """Network and settings of a forecast.

    Attributes:
        model: model name for ``worm_dist.models.build_model``.
        sample_shape: shape of one input.
        num_classes: number of outputs.
        worm: the engine's settings.
        arguments: additional arguments of the model's constructor.
        batch_size: samples in an optimizer step over all ranks; None if not set.
        optimizer: name of the optimizer.
        precision: ``bf16`` for torch's autocast; the others are float32.
        wrapper: what the network is wrapped in.
    """

    model: str
    sample_shape: Shape
    num_classes: int
    worm: WormConfig
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    optimizer: str = "sgd"
    precision: str = "fp32"
    wrapper: WrapperSettings = field(default_factory=WrapperSettings)

    def build(self) -> nn.Module:
        """Build the dense network; its weights come from torch's random state.

        Raises:
            ConfigError: the model does not exist, or rejects its arguments.
        """
        return build_model(self.model, self.num_classes, self.sample_shape[0], self.arguments)

    def samples_per_rank(self, world_size: int) -> int:
        """Samples per rank and step; 32 if the batch size is not set.

        Raises:
            ConfigError: the batch cannot be divided evenly.
        """
        if self.batch_size is None:
            return _SAMPLES_PER_RANK
        share, rest = divmod(self.batch_size, world_size)
        if rest:
            raise ConfigError(
                f"data.batch_size: {self.batch_size} is not divisible by {world_size} ranks; "
                "give --batch, the samples of one rank"
            )
        return share


def target_of(
    model: str,
    sample_shape: Shape | None,
    num_classes: int | None,
    search: Mapping[str, Any] | None = None,
) -> Target:
    """Target of a model name, with the default settings.

    Args:
        model: model name for ``worm_dist.models.build_model``.
        sample_shape, num_classes: shape of one input and number of classes; the default is that of
            CIFAR-10 for models of worm_dist, of the digits for ``vit_small``, and of ImageNet for
            torchvision's and timm's models.  A function of the user's has no default.
        search: settings of the search that differ from the defaults.

    Raises:
        ConfigError: these settings are invalid.
    """
    if is_user_function(model):
        missing = {"--input": sample_shape, "--classes": num_classes}
        absent = [option for option, value in missing.items() if value is None]
        if absent:
            raise ConfigError(f"plan: {model} is a function of yours; give {' and '.join(absent)}")
    small = _FIXED_SIZE.get(model, _SMALL_IMAGES)
    shape, classes = small if model in BUILDERS else _LARGE_IMAGES
    worm = WormConfig.preset("worm", search=search or {})
    return Target(model, sample_shape or shape, num_classes or classes, worm)


def target_of_config(
    path: Path,
    sample_shape: Shape | None,
    num_classes: int | None,
    search: Mapping[str, Any] | None = None,
) -> Target:
    """Target of a run's settings; the data need not be present, unless a function of the user's
    returns them and shape and classes are not given.

    Args:
        path: the YAML file of a run.
        sample_shape, num_classes, search: overrides of the settings; None to keep them.

    Raises:
        ConfigError: the file cannot be read or is invalid, the run has no search, the number of
            classes is unknown, or the user's function fails.
    """
    overrides = [(f"search.{key}", json.dumps(value)) for key, value in (search or {}).items()]
    config = read_run_config(path, overrides)
    if not config.search.enabled:
        raise ConfigError(
            f"{path}: search.enabled is false, so this run drops nothing; plan another preset"
        )
    shape, classes = _sample(config.data, sample_shape, num_classes)
    return Target(
        model=config.model.name,
        arguments=config.model.arguments,
        sample_shape=shape,
        num_classes=config.model.num_classes or classes,
        worm=config.worm,
        batch_size=config.data.batch_size,
        optimizer=config.optimizer.name,
        precision=config.precision,
        wrapper=_wrapper(config),
    )


def _wrapper(config: RunConfig) -> WrapperSettings:
    """The wrapper of the run, with the settings that another one would have there."""
    zero = ZeroSettings.of(deepspeed_settings(config, 1))
    unit_mb, backend = config.distributed.bucket_cap_mb, config.distributed.backend
    return WrapperSettings(_KINDS.get(backend, "ddp"), unit_mb, zero)


def _sample(
    data: DataConfig, sample_shape: Shape | None, num_classes: int | None
) -> tuple[Shape, int]:
    if sample_shape is not None and num_classes is not None:
        return sample_shape, num_classes
    if data.name in _SAMPLES:
        shape, known = _SAMPLES[data.name]
        return sample_shape or shape, num_classes or known
    if is_user_function(data.name):
        from ..training.data import load_data  # takes seconds, and is not needed otherwise

        loaded = load_data(data)
        return sample_shape or loaded.sample_shape, num_classes or loaded.num_classes
    assert data.root is not None  # DataConfig requires it
    shape = sample_shape or (3, data.image_size, data.image_size)
    folder = Path(data.root).expanduser() / "train"
    num_classes = num_classes or sum(path.is_dir() for path in folder.glob("*"))
    if not num_classes:
        raise ConfigError(
            f"data.root: {folder} has no class folders on this machine, so the number of classes "
            "is unknown; give --classes"
        )
    return shape, num_classes
