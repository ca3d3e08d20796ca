"""Normalization: from bytes to the values that a network takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Normalization"]


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, with bytes scaled to 0..1.

    Applied to whole batches on the device of the training, so that a quarter of the bytes goes
    there.  Element by element it computes what torchvision's ``ToTensor`` and ``Normalize`` do: on
    a CPU the result is equal to the bit; a GPU divides by multiplication, within the rounding of
    float32.

    Attributes:
        mean, std: one number for each channel; standard deviations are above zero.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.mean) == len(self.std) and all(std > 0 for std in self.std)

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation as float32 ``[channels, 1, 1]`` on a device."""
        mean, std = (torch.tensor(each).view(-1, 1, 1).to(device) for each in (self.mean, self.std))
        return mean, std
