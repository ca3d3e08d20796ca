"""Batches on the device: bytes on their way, and the values that torchvision would give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToPILImage, ToTensor

from worm_dist.training.data import Placement
from worm_dist.training.data import placement as module
from worm_dist.training.data.cifar import CIFAR10_STATISTICS
from worm_dist.training.data.fashion_mnist import NORMALIZATION as FASHION_MNIST
from worm_dist.training.data.image_folder import NORMALIZATION as IMAGENET
from worm_dist.training.data.normalization import Normalization

_CPU = torch.device("cpu")


def _bytes(num_channels: int) -> Tensor:
    """Every value in every channel."""
    values = torch.arange(256, dtype=torch.uint8).repeat(num_channels, 2)
    return torch.stack([values.view(num_channels, 16, 32), values.flip(1).view(-1, 16, 32)])


def _placement(normalization: Normalization | None, **changed: Any) -> Placement:
    usual = {"device": _CPU, "dtype": torch.float32, "layout": torch.contiguous_format}
    return Placement(**{**usual, **changed}, normalization=normalization)


@pytest.mark.parametrize("normalization", [CIFAR10_STATISTICS, FASHION_MNIST, IMAGENET])
def test_on_a_cpu_bytes_become_what_torchvision_makes_of_them(
    normalization: Normalization,
) -> None:
    """To the bit: each image was normalised in the loader, before it was put into a batch."""
    of_one = Compose([ToPILImage(), ToTensor(), Normalize(normalization.mean, normalization.std)])
    images = _bytes(len(normalization.mean))
    expected = torch.stack([of_one(image) for image in images])
    inputs = _placement(normalization).inputs(images)
    assert torch.equal(inputs, expected) and inputs.stride() == expected.stride()


def test_images_of_floats_are_taken_as_they_are() -> None:
    images = torch.randn(2, 1, 8, 8)
    assert _placement(None).inputs(images).data_ptr() == images.data_ptr()


def test_inputs_have_the_dtype_and_the_memory_format_of_the_network() -> None:
    placement = _placement(IMAGENET, dtype=torch.bfloat16, layout=torch.channels_last)
    inputs = placement.inputs(_bytes(3))
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(inputs, _placement(IMAGENET).inputs(_bytes(3)).bfloat16())


def test_batches_are_inputs_and_classes_in_order() -> None:
    images, classes = _bytes(1).repeat(3, 1, 1, 1), torch.arange(6)
    samples: Any = list(zip(images, classes, strict=True))
    placement = _placement(FASHION_MNIST)
    found = list(placement.batches(DataLoader(samples, batch_size=2)))
    assert torch.equal(torch.cat([of_batch for _, of_batch in found]), classes)
    assert torch.equal(torch.cat([inputs for inputs, _ in found]), placement.inputs(images))


def test_a_copy_is_ordered_before_the_pass_and_its_memory_is_kept_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch is told, in order; the order itself is a GPU's."""
    told: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "copies"

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        told.append(f"in {stream.name}")
        yield
        told.append(f"out of {stream.name}")

    def copied(tensor: Tensor, device: Any, non_blocking: bool) -> Tensor:
        told.append("copy" if non_blocking else "copy and wait")
        return tensor.clone()

    training = Stream("training")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
    monkeypatch.setattr(Tensor, "to", copied)
    keep = lambda tensor, stream: told.append(f"kept for {stream.name}")  # noqa: E731
    monkeypatch.setattr(Tensor, "record_stream", keep)
    module._CopyStream(_CPU).copy((torch.zeros(2), torch.zeros(2)))
    assert told == [
        *("in copies", "copy", "copy", "out of copies"),
        *("training waits for copies", "kept for training", "kept for training"),
    ]
