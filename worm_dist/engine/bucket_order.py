"""Bucket order: has DistributedDataParallel rebuild its buckets as a saved run had them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

__all__ = ["BucketOrder"]


class BucketOrder:
    """Whether the wrapper of a network has rebuilt its buckets, which it does after its first
    backward pass, now or in the run that was resumed."""

    def __init__(self) -> None:
        self._wrapped_at = 0
        self._was_rebuilt = False

    def wrapped(self, step: int) -> None:
        """Record a new wrapper."""
        self._wrapped_at, self._was_rebuilt = step, False

    def is_rebuilt(self, step: int) -> bool:
        """Whether the buckets have been rebuilt after this step, or were in the saved run."""
        return self._was_rebuilt or step > self._wrapped_at

    def load(self, step: int, is_rebuilt: bool) -> None:
        """Restore the result of ``is_rebuilt``; the wrapper is new."""
        self._wrapped_at, self._was_rebuilt = step, is_rebuilt

    def restore(
        self,
        network: nn.Module,
        one_pass: Callable[[], Tensor],
        unreduced: AbstractContextManager[None],
    ) -> None:
        """Run one pass whose only effect is that the wrapper rebuilds its buckets, if the saved
        run's were rebuilt.

        Args:
            network: the bare network.
            one_pass: runs a forward pass in training mode; returns the loss.
            unreduced: context in which a reducer neither reduces nor counts gradients.
        """
        if not self._was_rebuilt:
            return
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        device = next(network.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), unreduced:
            one_pass().backward()
        network.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
