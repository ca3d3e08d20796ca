"""Fashion-MNIST from local files.

Two layouts are supported, each with plain or gzipped files: torchvision's (``FashionMNIST/raw``
below the root) and that of Debian's package dataset-fashion-mnist (files in the root itself).
Nothing is written there.

The files are in MNIST's format IDX.  The header is big-endian: two zero bytes, the type of the
elements, the number of dimensions, then each dimension as 32 bits.  The elements follow in
row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from ...errors import ConfigError
from ..run_config import DataConfig
from .dataset import Data, folder
from .normalization import Normalization

__all__: list[str] = []

_UNSIGNED_BYTE = 8
"""The type of elements in a header."""
NUM_CLASSES = 10
SIDE = 28
NORMALIZATION = Normalization((0.2860,), (0.3530,))
"""Pixel statistics of the training split, with bytes scaled to 0..1."""


class _Images(Dataset[tuple[Tensor, int]]):
    """Images in memory, transformed on access.

    Args:
        images: uint8 ``[samples, 28, 28]``.
        classes: integers ``[samples]``.
        transform: applied to each image ``[1, 28, 28]``.
    """

    def __init__(self, images: Tensor, classes: Tensor, transform: transforms.Compose) -> None:
        self.images = images.unsqueeze(1)
        self.classes = classes.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.classes[index]


def load(config: DataConfig) -> Data:
    """Load Fashion-MNIST: 60000 training and 10000 test images; augmented by crops and flips.

    Raises:
        ConfigError: a file is missing or damaged; names its expected path.
    """
    root = folder(config)
    augmentation: list[Any] = [
        transforms.RandomCrop(SIDE, padding=2),
        transforms.RandomHorizontalFlip(),
    ]
    train_steps = augmentation if config.augment else []
    train = _Images(*_read(root, "train"), transforms.Compose(train_steps))
    test = _Images(*_read(root, "t10k"), transforms.Compose([]))
    return Data(
        train=train,
        test=test,
        num_classes=NUM_CLASSES,
        sample_shape=(1, SIDE, SIDE),
        description=f"Fashion-MNIST: {len(train)} train / {len(test)} test, from {root}",
        normalization=NORMALIZATION,
    )


def _read(root: Path, split: str) -> tuple[Tensor, Tensor]:
    images_path = _find(root, f"{split}-images-idx3-ubyte")
    classes_path = _find(root, f"{split}-labels-idx1-ubyte")
    images, classes = _tensor(images_path, 3), _tensor(classes_path, 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise ConfigError(
            f"data.root: {images_path} holds images of {images.shape[1]}x{images.shape[2]}, "
            f"Fashion-MNIST has {SIDE}x{SIDE}"
        )
    if len(images) != len(classes) or len(images) == 0 or int(classes.max()) >= NUM_CLASSES:
        raise ConfigError(
            f"data.root: {images_path} and {classes_path} do not belong together: {len(images)} "
            f"images, {len(classes)} classes; get both files again"
        )
    return images, classes


def _find(root: Path, name: str) -> Path:
    folders = (root / "FashionMNIST" / "raw", root)
    for path in (parent / file for parent in folders for file in (name, f"{name}.gz")):
        if path.is_file():
            return path
    raise ConfigError(
        f"data.root: there is no {name} or {name}.gz in {folders[0]} nor in {root}; on Debian, "
        "`apt-get install dataset-fashion-mnist` puts them into /usr/share/datasets/fashion-mnist"
    )


def _tensor(path: Path, num_dims: int) -> Tensor:
    try:
        return _read_idx(path, num_dims)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"data.root: cannot read {path}: {error}; get the file again") from error


def _read_idx(path: Path, num_dims: int) -> Tensor:
    """Read a uint8 tensor with ``num_dims`` dimensions from an IDX file.

    Raises:
        OSError: the file cannot be read, or its archive is damaged.
        EOFError, zlib.error: its archive is damaged.
        ValueError: it is not an IDX file of bytes with that many dimensions.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 * (1 + num_dims)
    if content[:4] != bytes([0, 0, _UNSIGNED_BYTE, num_dims]) or len(content) < start:
        raise ValueError(f"it is not an IDX file of bytes in {num_dims} dimensions")
    shape = struct.unpack(f">{num_dims}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"it has {len(content) - start} bytes after the header, which declares shape {shape}"
        )
    # A bytearray, because torch warns about read-only memory.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)
