"""CIFAR-10 and CIFAR-100, read from the unpacked Python archives of their authors.

The files are pickles, so they are loaded only if their MD5 matches the published one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchvision import datasets, transforms

from ...errors import ConfigError
from ..run_config import DataConfig
from .dataset import Data, folder
from .normalization import Normalization

__all__: list[str] = []

SIDE = 32

# Mean and standard deviation of each channel of the training splits, with bytes scaled to 0..1.
CIFAR10_STATISTICS = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATISTICS = Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def load_cifar10(config: DataConfig) -> Data:
    """Load CIFAR-10: 50000 training and 10000 test images in ten classes.

    Raises:
        ConfigError: a file is missing or damaged; names its expected path.
    """
    return _load(config, datasets.CIFAR10, "CIFAR-10", CIFAR10_STATISTICS)


def load_cifar100(config: DataConfig) -> Data:
    """Load CIFAR-100: 50000 training and 10000 test images in a hundred classes.

    Raises:
        ConfigError: a file is missing or damaged; names its expected path.
    """
    return _load(config, datasets.CIFAR100, "CIFAR-100", CIFAR100_STATISTICS)


def _load(
    config: DataConfig,
    kind: type[datasets.CIFAR10],
    title: str,
    statistics: Normalization,
) -> Data:
    root = folder(config)
    _check_files(root, kind, title)
    steps = [transforms.PILToTensor()]
    augmentation: list[Any] = [
        transforms.RandomCrop(SIDE, padding=4),
        transforms.RandomHorizontalFlip(),
    ]
    train = kind(
        root,
        train=True,
        transform=transforms.Compose([*(augmentation if config.augment else []), *steps]),
    )
    test = kind(root, train=False, transform=transforms.Compose(steps))
    return Data(
        train=train,
        test=test,
        num_classes=len(train.classes),
        sample_shape=(3, SIDE, SIDE),
        description=f"{title}: {len(train)} train / {len(test)} test, from {root}",
        normalization=statistics,
    )


def _check_files(root: Path, kind: type[datasets.CIFAR10], title: str) -> None:
    folder_path = root / kind.base_folder
    published = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    missing = [name for name, _ in published if not (folder_path / name).is_file()]
    source = f"unpack {kind.filename} ({kind.url}) in {root}"
    if missing:
        raise ConfigError(
            f"data.root: {title} not found: looked for {', '.join(missing)} in {folder_path}; "
            f"{source}"
        )
    for name, md5 in published:
        if not datasets.utils.check_integrity(str(folder_path / name), md5):
            raise ConfigError(
                f"data.root: {folder_path / name} is damaged: its MD5 is not the published one; "
                f"{source}"
            )
