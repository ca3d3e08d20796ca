"""Data from a function of the user, which the settings name as ``package.module:function``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ...errors import ConfigError
from ...user_function import call_user_function
from ..run_config import DataConfig
from .dataset import Data, Samples

__all__ = ["load_user_data"]

_KEY = "data.name"


def load_user_data(config: DataConfig) -> Data:
    """Call the function ``config.name`` with the settings, and check what it returns.

    It returns a ``Data``, or a training and a test split: sequences of (image, class) pairs with a
    length, such as map-style datasets of torch.  An image is a float tensor ``[channels, height,
    width]``, or one of bytes in a ``Data`` with a normalization.  The number of classes is that of
    a split's ``classes`` or, without them, the largest of its ``targets`` or of the second tensor
    of a ``TensorDataset``, plus one; any other split needs a ``Data``.

    Raises:
        ConfigError: the function cannot be imported, raises an exception, or returns something
            else; or the first sample is no such pair.
    """
    returned = call_user_function(config.name, _KEY, config)
    data = returned if isinstance(returned, Data) else _data_of_splits(config.name, returned)
    for split, samples in (("training", data.train), ("test", data.test)):
        _require_samples(config.name, split, samples)
    _require_sample(config.name, data, _first(config.name, data.train))
    return data


def _data_of_splits(name: str, returned: Any) -> Data:
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise ConfigError(
            f"{_KEY}: {name} returned a value of type {type(returned).__name__}; let it return "
            "the training and the test split, or a worm_dist.training.data.Data"
        )
    train, test = returned
    for split, samples in (("training", train), ("test", test)):
        _require_samples(name, split, samples)
    image = _first(name, train)[0]
    shape = tuple(image.shape) if isinstance(image, Tensor) else ()
    return Data(
        train=train,
        test=test,
        num_classes=max(_num_classes(name, split) for split in (train, test)),
        sample_shape=shape,  # type: ignore[arg-type]  # checked with the sample
        description=f"{name}: {len(train)} train / {len(test)} test",
    )


def _require_samples(name: str, split: str, samples: object) -> None:
    if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        raise ConfigError(
            f"{_KEY}: the {split} split of {name} is of type {type(samples).__name__}; it "
            "needs a length and (image, class) pairs by index, as map-style datasets of torch have"
        )


def _first(name: str, samples: Samples) -> tuple[Any, Any]:
    if len(samples) == 0:
        raise ConfigError(f"{_KEY}: the training split of {name} is empty")
    with torch.random.fork_rng(devices=[]):  # an augmentation may draw from it
        try:
            pair = samples[0]
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{_KEY}: sample 0 of the training split of {name} raised "
                f"{type(error).__name__}: {str(error)[:300]}"
            ) from error
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ConfigError(
            f"{_KEY}: sample 0 of the training split of {name} is of type {type(pair).__name__}; "
            "it must be an (image, class) pair"
        )
    return pair[0], pair[1]


def _require_sample(name: str, data: Data, pair: tuple[Any, Any]) -> None:
    image, target = pair
    where = f"{_KEY}: sample 0 of the training split of {name}:"
    if not isinstance(image, Tensor) or image.dim() != 3:
        shape = f" of shape {list(image.shape)}" if isinstance(image, Tensor) else ""
        raise ConfigError(
            f"{where} the image is of type {type(image).__name__}{shape}; it must be a tensor "
            "[channels, height, width]"
        )
    if tuple(image.shape) != tuple(data.sample_shape):
        raise ConfigError(
            f"{where} the image has shape {list(image.shape)}, but sample_shape is "
            f"{list(data.sample_shape)}"
        )
    if not image.is_floating_point() and (image.dtype != torch.uint8 or data.normalization is None):
        raise ConfigError(
            f"{where} the image is of {image.dtype}; it must be floats, or bytes in a Data with a "
            "normalization"
        )
    is_whole = isinstance(target, Tensor) and target.dim() == 0 and not target.is_floating_point()
    if not is_whole and not hasattr(target, "__index__"):
        raise ConfigError(f"{where} the class is {str(target)[:50]!r}; it must be a whole number")


def _num_classes(name: str, samples: Samples) -> int:
    classes = getattr(samples, "classes", None)
    if isinstance(classes, Sequence) and len(classes):
        return len(classes)
    targets = getattr(samples, "targets", None)
    if targets is None and isinstance(samples, TensorDataset) and len(samples.tensors) == 2:
        targets = samples.tensors[1]
    try:
        return int(torch.as_tensor(targets).max()) + 1
    except (RuntimeError, TypeError, ValueError):  # such as of None
        raise ConfigError(
            f"{_KEY}: the splits of {name} have neither classes nor targets, so the number of "
            "classes is unknown; let it return worm_dist.training.data.Data(train, test, "
            "num_classes=..., sample_shape=..., description=...)"
        ) from None
