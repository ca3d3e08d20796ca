"""What every data set is loaded as."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ..run_config import DataConfig
from .samples import Samples

__all__ = ["Data"]


@dataclass(frozen=True)
class Data:
    """A training and a test split whose samples are (image, class) pairs.

    An image is a float32 tensor of ``sample_shape``, normalised; a class is an integer below
    ``num_classes``.  Only the training split is augmented, and draws for that from torch's random
    state alone.
    """

    train: Samples
    test: Samples
    num_classes: int
    sample_shape: tuple[int, int, int]
    """Channels, height, width."""
    description: str
    """One line that names the data set and its split."""


def folder(config: DataConfig) -> Path:
    """The absolute path of ``data.root``, for data sets that need one.

    Raises:
        ConfigError: it begins with the home of somebody who is not known here.
    """
    assert config.root is not None  # DataConfig lets only digits go without.
    try:
        return Path(config.root).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"data.root: {config.root}: there is no such user") from error
