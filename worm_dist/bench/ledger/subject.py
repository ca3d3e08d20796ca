"""Subjects: network, data and training recipe, the same for every rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

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
_VALIDATION = 5000


@dataclass(frozen=True)
class Samples:
    """Training and validation samples, both taken from the training split.

    Attributes:
        images, validation_images: float32 ``[n, 1, side, side]``.
        classes, validation_classes: int64 ``[n]``.
    """

    images: Tensor
    classes: Tensor
    validation_images: Tensor
    validation_classes: Tensor


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
def _fashion(num_samples: int) -> Samples:
    """Fashion-MNIST averaged to 14x14, where width matters and an epoch takes seconds."""
    split = fashion_mnist.load(DataConfig(name="fashion-mnist", root=_FASHION, augment=False))
    images, classes = split.train.images, torch.tensor(split.train.classes)  # type: ignore[attr-defined]
    images = nn.functional.avg_pool2d(images.float() / 255, 2)
    first = images[:num_samples]
    images = (images - first.mean()) / first.std()
    held_out = slice(len(images) - _VALIDATION - 5000, len(images) - 5000)
    return Samples(images[:num_samples], classes[:num_samples], images[held_out], classes[held_out])


@cache
def _digits() -> Samples:
    """The digits; every fifth of the 1437 training images is held out for validation."""
    split: Data = digits.load(DataConfig())
    images, classes = split.train.tensors  # type: ignore[attr-defined]
    held_out = torch.arange(len(images)) % 5 == 0
    return Samples(images[~held_out], classes[~held_out], images[held_out], classes[held_out])


def _on_fashion(name: str, num_samples: int, build: Callable[[float], nn.Module]) -> Subject:
    epochs = 16 if num_samples > 30_000 else 24
    adamw = name.startswith("vit")
    return Subject(
        f"{name}, fashion {num_samples // 1000}k",
        lambda: _fashion(num_samples),
        build,
        epochs,
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
        Subject("vgg, digits", _digits, _small_vgg, 16),
        Subject("resnet, digits", _digits, _resnet, 16),
        Subject("vit, digits", _digits, _vit(8, 2), 30, learning_rate=0.002, adamw=True),
    )
}
"""Subjects by name.  An epoch has 781 or 156 steps on Fashion-MNIST, and 17 on the digits."""
