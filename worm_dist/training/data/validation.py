"""Validates samples, so that an invalid one is named and never reaches the network."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import Dataset

from ...errors import ConfigError
from .dataset import Samples

__all__ = ["DamagedSampleError", "ValidatedSamples"]


class DamagedSampleError(ConfigError):
    """A sample cannot be read or has an invalid value.

    A loader process passes an error on as one string that includes the traceback.  Only the message
    is kept from it, so that the error reads the same with and without loader processes.
    """

    KEY = "data.root: "

    def __init__(self, message: str) -> None:
        super().__init__(self.KEY + message.rpartition(self.KEY)[2].strip())


class ValidatedSamples(Dataset[Any]):
    """Samples that are validated on access, in under 1 % of the time to read and augment an image.

    On a GPU, an invalid class would abort the process without naming the sample.

    Args:
        samples: (image, class) pairs.
        split: the split's name, for messages.
        num_classes: number of classes.
    """

    def __init__(self, samples: Samples, split: str, num_classes: int) -> None:
        self.samples = samples
        self.split = split
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        """Return a sample.

        Raises:
            DamagedSampleError: its class or its pixels are invalid.
        """
        image, target = self.samples[index]
        if not 0 <= target < self.num_classes:
            raise DamagedSampleError(
                f"{self._name_of(index)} has class {int(target)}, but the valid classes are "
                f"0 to {self.num_classes - 1}; correct its class or remove it"
            )
        if image.is_floating_point() and not math.isfinite(image.sum()):
            raise DamagedSampleError(
                f"{self._name_of(index)} has pixels that are not finite; replace or remove it"
            )
        return image, target

    def _name_of(self, index: int) -> str:
        files = getattr(self.samples, "samples", None)  # as torchvision's ImageFolder lists them
        path = "" if files is None else f" ({files[index][0]})"
        return f"sample {index} of the {self.split} split{path}"
