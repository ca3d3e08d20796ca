"""Detects NaN and infinite gradients and stops the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.utils import get_total_norm

from ..distributed.collectives import Communicator
from ..errors import NonFiniteError
from ..host_copy import HostCopy

__all__ = ["FiniteCheck"]


@dataclass
class _PendingCheck:
    """A result on its way to the host."""

    step: int
    is_finite: HostCopy
    loss: Tensor


class FiniteCheck:
    """Checks the gradients of every step before the optimizer uses them.

    The gradients are averaged by then, so a NaN on one rank is seen by all, and all stop at the
    same step without further communication.  The check costs one pass over the gradients.
    Under DeepSpeed and ``fully_shard`` a rank has its part of the gradients alone; there the ranks
    average their losses, one number a step.

    Waiting for the result would stall a GPU, so there it is copied asynchronously and read one step
    later.  The weights have been updated once more by then; call ``wait`` before they are saved or
    evaluated.

    Args:
        ranks: the ranks that train together.
    """

    def __init__(self, ranks: Communicator) -> None:
        self._ranks = ranks
        self._pending: _PendingCheck | None = None

    def check(self, step: int, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        """Check the gradients of the optimizer step that comes next.

        Args:
            step: the step's number.
            loss: this rank's loss, a detached scalar.
            gradients: the averaged gradients; empty if no rank has all of them.

        Raises:
            NonFiniteError: the gradients are not finite; raised on every rank.  A norm above 1e19
                counts as infinite.
        """
        number = get_total_norm(gradients) if gradients else self._ranks.mean(loss)
        newest = _PendingCheck(step, HostCopy(number.isfinite()), loss)
        self.wait()
        self._pending = newest
        if not newest.is_finite.is_late:
            self.wait()

    def wait(self) -> None:
        """Wait for the result of the newest step's check.

        Raises:
            NonFiniteError: the gradients were not finite; raised on every rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._require_finite(bool(pending.is_finite.read()), pending.step, pending.loss)

    def _require_finite(self, is_finite: bool, step: int, loss: Tensor) -> None:
        if is_finite:
            return
        differences = self._ranks.compare({"the loss": f"{float(loss):.4g}"})
        raise NonFiniteError(
            f"step {step}: the gradients are not finite; "
            f"{differences[0] if differences else f'the loss is {float(loss):.4g} on every rank'}; "
            "lower optimizer.lr, train in fp32, or look at the data of a rank whose loss is not "
            "finite"
        )
