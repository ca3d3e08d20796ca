"""Subject: what is trained, on what, and how: the same for every rule that is compared."""

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
"""Where Debian's package dataset-fashion-mnist puts it."""
_VALIDATION = 5000


@dataclass(frozen=True)
class Samples:
    """Images ``[n, 1, side, side]`` and classes ``[n]`` to learn from, and others to choose by;
    neither is of the test split."""

    images: Tensor
    classes: Tensor
    validation_images: Tensor
    validation_classes: Tensor


@dataclass(frozen=True)
class Subject:
    """One training.

    Attributes:
        name: for rows and tables.
        samples: what to learn from.
        build: makes the network, every layer so many times as wide.
        epochs: of the whole run.
        batch_size: samples in a step.
        learning_rate: at first; it falls to zero by a cosine.
        adamw: instead of SGD with momentum.
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
    """At 14x14, where width matters and an epoch takes seconds; means of four pixels."""
    split = fashion_mnist.load(DataConfig(name="fashion-mnist", root=_FASHION, augment=False))
    images, classes = split.train.images, torch.tensor(split.train.classes)  # type: ignore[attr-defined]
    images = nn.functional.avg_pool2d(images.float() / 255, 2)
    first = images[:num_samples]
    images = (images - first.mean()) / first.std()
    held_out = slice(len(images) - _VALIDATION - 5000, len(images) - 5000)
    return Samples(images[:num_samples], classes[:num_samples], images[held_out], classes[held_out])


@cache
def _digits() -> Samples:
    """Of the 1437 images to train on every fifth is held out."""
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
"""By name.  Fashion-MNIST has 781 or 156 steps an epoch, the digits 17."""
