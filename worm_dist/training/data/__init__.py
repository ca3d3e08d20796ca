"""Data sets, and the data loaders of each rank.

Each family of data sets has its own module.  All of them read local files; nothing is downloaded.
A function of the user's takes their place where the settings name one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module

from ...errors import ConfigError
from ...user_function import is_user_function
from ..run_config import DataConfig
from .dataset import Data
from .loaders import test_loader, train_loader
from .normalization import Normalization
from .placement import Placement
from .user_data import load_user_data

__all__ = ["Data", "Placement", "load_data", "test_loader", "train_loader"]

# Imported on demand: torchvision and scikit-learn each take a second.
LOADERS: Mapping[str, tuple[str, str]] = {
    "digits": (".digits", "load"),
    "fashion-mnist": (".fashion_mnist", "load"),
    "cifar10": (".cifar", "load_cifar10"),
    "cifar100": (".cifar", "load_cifar100"),
    "image-folder": (".image_folder", "load"),
}


def load_data(config: DataConfig) -> Data:
    """Load both splits of the data set ``config.name``; the test split is the training split,
    without augmentation, if the settings say so.

    Raises:
        ConfigError: files are missing or damaged; names their expected paths.  Or the user's
            function raises an exception, or returns something else than data.
    """
    data = _loaded(config)
    if config.test_split == "test":
        return data
    plain = _loaded(config.model_copy(update={"augment": False})) if config.augment else data
    description = f"{data.description}; accuracy is measured on the training split"
    return dataclasses.replace(data, test=plain.train, description=description)


def _loaded(config: DataConfig) -> Data:
    if is_user_function(config.name):
        return load_user_data(config)
    try:
        module, function = LOADERS[config.name]
        data = getattr(import_module(module, __name__), function)(config)
    except OSError as error:  # such as a folder without read permission
        raise ConfigError(f"data.root: cannot read {config.root}: {error}") from error
    assert isinstance(data, Data)
    if data.normalization is None or config.mean is None or config.std is None:
        return data
    channels = data.sample_shape[0]
    normalization = Normalization((config.mean,) * channels, (config.std,) * channels)
    return dataclasses.replace(data, normalization=normalization)
