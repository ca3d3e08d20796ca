"""The data sets that can be trained on, and each rank's share of them.

One module for each family of data sets; all are read from files that are already there, none is
downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from ...errors import ConfigError
from ..run_config import DataConfig
from .dataset import Data
from .loaders import test_loader, train_loader

__all__ = ["Data", "load_data", "test_loader", "train_loader"]

# Imported when asked for: torchvision and scikit-learn each take a second.
LOADERS: Mapping[str, tuple[str, str]] = {
    "digits": (".digits", "load"),
    "fashion-mnist": (".fashion_mnist", "load"),
    "cifar10": (".cifar", "load_cifar10"),
    "cifar100": (".cifar", "load_cifar100"),
    "image-folder": (".image_folder", "load"),
}


def load_data(config: DataConfig) -> Data:
    """Both splits of the data set called ``config.name``.

    Raises:
        ConfigError: its files are missing or damaged; it says where they were looked for.
    """
    try:
        module, function = LOADERS[config.name]
        data = getattr(import_module(module, __name__), function)(config)
    except OSError as error:  # Such as a folder that this user may not enter.
        raise ConfigError(f"data.root: cannot read {config.root}: {error}") from error
    assert isinstance(data, Data)
    return data
