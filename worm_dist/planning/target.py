"""Subject: the network that is planned for, and the settings it would be trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..config import WormConfig
from ..errors import ConfigError
from ..models import OWN, build_model
from ..training.config_file import read_run_config
from ..training.run_config import DataConfig

__all__ = ["Shape", "Target", "target_of", "target_of_config"]

Shape = tuple[int, int, int]
"""Channels, height, width."""

# Known without the files, which may lie on another machine.
_SAMPLES: Mapping[str, tuple[Shape, int]] = {
    "digits": ((1, 8, 8), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}
_SMALL_IMAGES, _LARGE_IMAGES = _SAMPLES["cifar10"], ((3, 224, 224), 1000)
_OF_ONE_SIZE = {"vit_small": _SAMPLES["digits"]}
"""Our own networks that take no other size than they are built for."""
_SAMPLES_PER_RANK = 32


@dataclass(frozen=True)
class Target:
    """What is planned for.

    Attributes:
        model: of ``worm_dist.models.build_model``.
        arguments: of its constructor.
        sample_shape: of one input.
        num_classes: outputs.
        worm: the engine's settings.
        batch_size: samples in an optimizer step over all ranks; None if nothing says so.
        precision: ``fp32`` or ``bf16``, which is torch's autocast.
        remarks: what the figures leave out with these settings.
    """

    model: str
    sample_shape: Shape
    num_classes: int
    worm: WormConfig
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    precision: str = "fp32"
    remarks: Sequence[str] = ()

    def build(self) -> nn.Module:
        """The dense network, with weights from torch's random state.

        Raises:
            ConfigError: there is no such network, or it does not take this.
        """
        return build_model(self.model, self.num_classes, self.sample_shape[0], self.arguments)

    def samples_per_rank(self, world_size: int) -> int:
        """Samples in one rank's share of a step; 32 where no settings say.

        Raises:
            ConfigError: the batch cannot be shared out evenly.
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
    model: str, sample_shape: Shape | None, num_classes: int | None, prune_ratio: float | None
) -> Target:
    """A network by its name, with the default settings.

    Args:
        model: of ``worm_dist.models.build_model``.
        sample_shape, num_classes: default those of CIFAR-10 for our own networks, the digits' for
            ``vit_small``, ImageNet's for torchvision's.
        prune_ratio: default that of ``WormConfig``.

    Raises:
        ConfigError: the ratio is none.
    """
    small = _OF_ONE_SIZE.get(model, _SMALL_IMAGES)
    shape, classes = small if model in OWN else _LARGE_IMAGES
    changes = {} if prune_ratio is None else {"search": {"prune_ratio": prune_ratio}}
    worm = WormConfig.preset("worm", **changes)
    return Target(model, sample_shape or shape, num_classes or classes, worm)


def target_of_config(
    path: Path, sample_shape: Shape | None, num_classes: int | None, prune_ratio: float | None
) -> Target:
    """The network of a run's settings; its data need not be there.

    Args:
        path: a YAML file.
        sample_shape, num_classes, prune_ratio: in place of what the settings say.

    Raises:
        ConfigError: the file cannot be read, is wrong, or is of a run without a search; the number
            of classes is not known.
    """
    replaced = [] if prune_ratio is None else [("search.prune_ratio", repr(prune_ratio))]
    config = read_run_config(path, replaced)
    if not config.search.enabled:
        raise ConfigError(
            f"{path}: search.enabled is false, so this run drops nothing; plan another preset"
        )
    shape, classes = _sample(config.data, num_classes)
    remarks = []
    if config.distributed.backend == "deepspeed":
        remarks.append("bytes are DistributedDataParallel's; ranks under ZeRO also send weights")
    return Target(
        model=config.model.name,
        arguments=config.model.arguments,
        sample_shape=sample_shape or shape,
        num_classes=classes,
        worm=config.worm,
        batch_size=config.data.batch_size,
        precision=config.precision,
        remarks=remarks,
    )


def _sample(data: DataConfig, num_classes: int | None) -> tuple[Shape, int]:
    if data.name in _SAMPLES:
        shape, known = _SAMPLES[data.name]
        return shape, num_classes or known
    assert data.root is not None  # DataConfig asks for it
    shape = (3, data.image_size, data.image_size)
    folder = Path(data.root).expanduser() / "train"
    num_classes = num_classes or sum(place.is_dir() for place in folder.glob("*"))
    if not num_classes:
        raise ConfigError(
            f"data.root: {folder} with its folders is not here, so the number of classes is not "
            "known; give --classes"
        )
    return shape, num_classes
