"""Images in one folder per class: ``root/train/<class>/...`` and ``root/val/<class>/...``.

This is the usual layout of ImageNet; crops, flips and statistics are ImageNet's too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader

from ...errors import ConfigError
from ..run_config import DataConfig
from .dataset import Data, folder
from .normalization import Normalization
from .validation import DamagedSampleError

__all__: list[str] = []

NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RESIZE_OVER_CROP = 256 / 224


class _Images(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return super().__getitem__(index)  # type: ignore[no-any-return]
        except Exception as error:  # decoders raise many types for a file that is not an image
            path = Path(self.samples[index][0]).absolute()
            raise DamagedSampleError(
                f"cannot read the image {path}: {error} (sample {index} of {self.root}); replace "
                "or remove it"
            ) from error


def load(config: DataConfig) -> Data:
    """Load the images below ``train`` and ``val``, cropped to squares of ``config.image_size``.

    Raises:
        ConfigError: a folder is missing or has a class without images, or the two splits have
            different classes.
        DamagedSampleError: raised during iteration by a sample that cannot be decoded.
    """
    root, size = folder(config), config.image_size
    as_bytes = transforms.PILToTensor()
    centre_crop = [transforms.Resize(int(size * RESIZE_OVER_CROP)), transforms.CenterCrop(size)]
    augmentation = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    train = _split(root / "train", [*(augmentation if config.augment else centre_crop), as_bytes])
    test = _split(root / "val", [*centre_crop, as_bytes])
    _check_same_classes(train, test)
    return Data(
        train=train,
        test=test,
        num_classes=len(train.classes),
        sample_shape=(3, size, size),
        description=(
            f"images in folders: {len(train)} train / {len(test)} test, "
            f"{len(train.classes)} classes, from {root}"
        ),
        normalization=NORMALIZATION,
    )


def _split(path: Path, steps: list[object]) -> ImageFolder:
    try:
        return _Images(str(path), transform=transforms.Compose(steps), loader=pil_loader)
    except OSError as error:
        raise ConfigError(
            f"data.root: cannot use {path}: {error}; it must hold one folder for each class, "
            "each with images"
        ) from error


def _check_same_classes(train: ImageFolder, test: ImageFolder) -> None:
    for one, other in ((train, test), (test, train)):
        missing = sorted(set(one.classes) - set(other.classes))
        if missing:
            raise ConfigError(
                f"data.root: {len(missing)} classes of {one.root} are not in {other.root}, such as "
                f"{', '.join(missing[:3])}; both must have the same classes"
            )
