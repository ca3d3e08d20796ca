"""Subjects: network, data and training recipe, the same for every rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ... import add_gates
from ...models.resnet import ResNet
from ...models.vgg import Vgg
from ...models.vit import vit_small
from ...training.data import digits, fashion_mnist
from ...training.data.dataset import Data
from ...training.run_config import DataConfig

__all__ = ["SUBJECTS", "Samples", "Subject"]

_NUM_CLASSES = 10
_FASHION = "/usr/share/datasets/fashion-mnist"
"""Folder of Debian's package dataset-fashion-mnist."""
_VALIDATION, _FIRST_VALIDATION = 5000, 50_000
"""Number of validation samples, and the first one unless it is a training sample."""


@dataclass(frozen=True)
class Samples:
    """Training and validation samples, both taken from the training split, and the test split.

    Attributes:
        images, validation_images, test_images: float32 ``[n, 1, side, side]``.
        classes, validation_classes, test_classes: int64 ``[n]``.
    """

    images: Tensor
    classes: Tensor
    validation_images: Tensor
    validation_classes: Tensor
    test_images: Tensor
    test_classes: Tensor


@dataclass(frozen=True)
class Subject:
    """Network, data and training recipe.

    Attributes:
        name: name in rows and tables.
        samples: loads the samples.
        build: builds the network; the argument scales the width of every layer.
        epochs: number of epochs.
        batch_size: samples in a step.
        learning_rate: initial learning rate; it decays to zero by a cosine schedule.
        adamw: True for AdamW, False for SGD with momentum.
    """

    name: str
    samples: Callable[[], Samples]
    build: Callable[[float], nn.Module]
    epochs: int
    batch_size: int = 64
    learning_rate: float = 0.1
    adamw: bool = False


def _vgg(width: float) -> nn.Module:
    one, two, three = (round(width * channels) for channels in (16, 32, 64))
    return Vgg(_NUM_CLASSES, 1, [one, one, "M", two, two, "M", three, three])


def _small_vgg(width: float) -> nn.Module:
    one, two, three = (round(width * channels) for channels in (32, 64, 128))
    return Vgg(_NUM_CLASSES, 1, [one, one, "M", two, two, "M", three, three])


def _resnet(width: float) -> nn.Module:
    return ResNet(_NUM_CLASSES, 1, [round(width * c) for c in (16, 32, 64)], blocks_per_stage=1)


def _vit(image_size: int, patch_size: int) -> Callable[[float], nn.Module]:
    def build(width: float) -> nn.Module:
        heads = max(1, round(6 * width))
        return add_gates(
            vit_small(
                _NUM_CLASSES,
                1,
                image_size=image_size,
                patch_size=patch_size,
                num_heads=heads,
                hidden_dim=8 * heads,
                mlp_dim=round(192 * width),
            )
        )

    return build


@cache
def _fashion(side: int, num_samples: int) -> Samples:
    """Fashion-MNIST: its first images for training, and 5000 of the others for validation.

    Averaged to 14x14, width matters and an epoch takes seconds.
    """
    split = fashion_mnist.load(DataConfig(name="fashion-mnist", root=_FASHION, augment=False))

    def images_of(samples: Any) -> Tensor:
        images: Tensor = samples.images.float() / 255
        return nn.functional.avg_pool2d(images, fashion_mnist.SIDE // side)

    images, test_images = images_of(split.train), images_of(split.test)
    classes, test_classes = (
        torch.tensor(samples.classes)  # type: ignore[attr-defined]
        for samples in (split.train, split.test)
    )
    mean, std = images[:num_samples].mean(), images[:num_samples].std()
    for each in (images, test_images):
        each.sub_(mean).div_(std)
    first = max(num_samples, _FIRST_VALIDATION)
    held_out = slice(first, first + _VALIDATION)
    return Samples(
        images[:num_samples],
        classes[:num_samples],
        images[held_out],
        classes[held_out],
        test_images,
        test_classes,
    )


@cache
def _digits() -> Samples:
    """The digits; every fifth of the 1437 training images is held out for validation."""
    split: Data = digits.load(DataConfig())
    images, classes = split.train.tensors  # type: ignore[attr-defined]
    held_out = torch.arange(len(images)) % 5 == 0
    return Samples(
        images[~held_out],
        classes[~held_out],
        images[held_out],
        classes[held_out],
        *split.test.tensors,  # type: ignore[attr-defined]
    )


def _on_fashion(
    name: str, num_samples: int, build: Callable[[float], nn.Module], side: int = 14
) -> Subject:
    adamw = name.startswith("vit")
    size = f"{num_samples // 1000}k" if side == 14 else f"{side}x{side}"
    return Subject(
        f"{name}, fashion {size}",
        lambda: _fashion(side, num_samples),
        build,
        epochs=16 if num_samples > 30_000 else 24,
        learning_rate=0.001 if adamw else 0.1,
        adamw=adamw,
    )


SUBJECTS: Mapping[str, Subject] = {
    subject.name: subject
    for subject in (
        _on_fashion("vgg", 50_000, _vgg),
        _on_fashion("resnet", 50_000, _resnet),
        _on_fashion("vit", 50_000, _vit(14, 7)),
        _on_fashion("vgg", 10_000, _vgg),
        _on_fashion("resnet", 10_000, _resnet),
        _on_fashion("vit", 10_000, _vit(14, 7)),
        _on_fashion("vgg", 55_000, _vgg, side=28),
        _on_fashion("resnet", 55_000, _resnet, side=28),
        Subject("vgg, digits", _digits, _small_vgg, 16),
        Subject("resnet, digits", _digits, _resnet, 16),
        Subject("vit, digits", _digits, _vit(8, 2), 30, learning_rate=0.002, adamw=True),
    )
}
"""Subjects by name.  An epoch has 781 or 156 steps on Fashion-MNIST at 14x14, and 17 on the digits.
At 28x28 all training images are used but the validation samples: 859 steps."""
