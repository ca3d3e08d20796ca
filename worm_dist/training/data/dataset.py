"""Common types of all data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError
from ..run_config import DataConfig
from .normalization import Normalization

__all__ = ["Data", "Samples", "folder"]


class Samples(Protocol):
    """(image, class) pairs by index, with a length, which torch's ``Dataset`` does not declare."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Data:
    """Training and test split of a data set; samples are (image, class) pairs.

    An image is a tensor of shape ``sample_shape``: of bytes, to which ``normalization`` is applied
    in batches on the training's device, or of float32 that is normalised already.  A class is an
    integer in ``[0, num_classes)``.  Only the training split is augmented, and the augmentation
    uses torch's random state only.
    """

    train: Samples
    test: Samples
    num_classes: int
    sample_shape: tuple[int, int, int]
    """Channels, height, width."""
    description: str
    """One line that describes the data set and its split."""
    normalization: Normalization | None = None
    """That of images in bytes."""


def folder(config: DataConfig) -> Path:
    """The absolute path of ``data.root``, for data sets that need one.

    Raises:
        ConfigError: the path begins with the home directory of an unknown user.
    """
    assert config.root is not None  # DataConfig requires it of the data sets that call this
    try:
        return Path(config.root).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"data.root: {config.root}: there is no such user") from error
