"""Finite: gradients that are no numbers stop the run before they reach the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..distributed.collectives import Communicator
from ..errors import NonFiniteError

__all__ = ["FiniteCheck"]


@dataclass
class _Look:
    """A number that is on its way from the GPU."""

    step: int
    is_finite: Tensor
    loss: Tensor
    arrival: torch.cuda.Event


class FiniteCheck:
    """Looks at the gradients of every step before the optimizer does.

    They are averaged by then, so a NaN of one rank is in those of all, and all stop at the same
    step without a word.  Costs one pass over the gradients.  DeepSpeed keeps them to itself; there
    the ranks average their losses, one number a step.

    A GPU would stand still if its answer were waited for.  There it is copied while training goes
    on, and read one step later: the weights have moved when the run stops.  Nothing is made of
    them, as long as ``settle`` comes first.

    Args:
        device: to train on.
        ranks: that train together.
    """

    def __init__(self, device: torch.device, ranks: Communicator) -> None:
        self._device = device
        self._ranks = ranks
        self._newest: _Look | None = None

    def look(self, step: int, loss: Tensor, gradients: Sequence[Tensor]) -> None:
        """Look at a step that is about to be taken.

        Args:
            step: its number.
            loss: of this rank, detached.
            gradients: averaged over the ranks; empty if they cannot be had.

        Raises:
            NonFiniteError: on every rank.  A norm above 1e19 counts as infinite.
        """
        number = get_total_norm(gradients) if gradients else self._ranks.mean(loss)
        is_finite = number.isfinite()
        if self._device.type == "cpu":
            self._require(bool(is_finite), step, loss)
            return
        on_its_way = torch.empty((), dtype=torch.bool, pin_memory=True)
        on_its_way.copy_(is_finite, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        self.settle()
        self._newest = _Look(step, on_its_way, loss, arrival)

    def settle(self) -> None:
        """Wait for what is known of the newest step.

        Raises:
            NonFiniteError: on every rank.
        """
        newest, self._newest = self._newest, None
        if newest is not None:
            newest.arrival.synchronize()
            self._require(bool(newest.is_finite), newest.step, newest.loss)

    def _require(self, is_finite: bool, step: int, loss: Tensor) -> None:
        if is_finite:
            return
        losses = self._ranks.differences({"the loss": f"{float(loss):.4g}"})
        raise NonFiniteError(
            f"step {step}: the gradients are not finite; "
            f"{losses[0] if losses else f'the loss is {float(loss):.4g} on every rank'}; lower "
            "optimizer.lr, train in fp32, or look at the data of a rank whose loss is not finite"
        )
