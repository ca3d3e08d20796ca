"""Host copy: a value's copy to the host, without waiting for the device that computes it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """A value on its way to the host; a value of the CPU is there already.

    Args:
        value: a tensor on any device.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value.detach()
        self._copied: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def is_late(self) -> bool:
        """Whether to read the value now would make the host wait for the device."""
        return self._copied is not None

    def read(self) -> Tensor:
        """The value, on the CPU; waits for it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value
