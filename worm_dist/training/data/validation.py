"""Damage: a sample that cannot be learned from is named, and never reaches the network."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import Dataset

from ...errors import ConfigError
from .samples import Samples

__all__ = ["Checked", "DamagedSampleError"]


class DamagedSampleError(ConfigError):
    """A sample cannot be read, or holds what no sample may.

    A loader process hands errors over as one string, traceback and all; from it only the message
    is kept, so that the user reads the same with and without such processes.
    """

    KEY = "data.root: "

    def __init__(self, message: str) -> None:
        super().__init__(self.KEY + message.rpartition(self.KEY)[2].strip())


class Checked(Dataset[Any]):
    """Samples that are looked at as they are handed out; less than a hundredth of what reading and
    augmenting an image takes.

    On a GPU a class that does not exist would abort the process without a word of which sample.

    Args:
        samples: (image, class) pairs.
        split: its name, for messages.
        num_classes: classes are below.
    """

    def __init__(self, samples: Samples, split: str, num_classes: int) -> None:
        self.samples = samples
        self.split = split
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        """The sample.

        Raises:
            DamagedSampleError: it cannot be learned from.
        """
        image, target = self.samples[index]
        if not 0 <= target < self.num_classes:
            raise DamagedSampleError(
                f"{self._named(index)} is of class {int(target)}, but there are only "
                f"{self.num_classes}, from 0 on; correct its class or remove it"
            )
        if not math.isfinite(image.sum()):
            raise DamagedSampleError(
                f"{self._named(index)} has pixels that are no numbers; replace or remove it"
            )
        return image, target

    def _named(self, index: int) -> str:
        files = getattr(self.samples, "samples", None)  # as torchvision's ImageFolder lists them
        path = "" if files is None else f" ({files[index][0]})"
        return f"sample {index} of the {self.split} split{path}"
