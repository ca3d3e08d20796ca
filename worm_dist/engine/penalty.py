"""Penalty: the L1 penalty on the scales, and whether the training loop adds it to its loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from ..backends.optimizer_view import StepListener
from ..config import SearchConfig
from ..search.importance import l1_norm
from ..search.ranking import Ranking
from ..search.unused_parameters import ParameterUsage
from .context import TrainingContext

__all__ = ["Penalty"]

logger = logging.getLogger(__name__)

_SMALLEST_LOSS_SCALE = 2**8


class Penalty(StepListener):
    """The L1 penalty on the scales of a network, network slimming's (arXiv 1708.06519).

    Args:
        search: the settings of the search; without one the penalty is zero.
        training: the training context.
        ranking: knows the scales; None without channel groups, where no term is asked for.

    Attributes:
        weight: the weight of the penalty in the loss of the step under way; 0 without it.
        is_on: whether there is a penalty to add, now.
    """

    def __init__(
        self, search: SearchConfig, training: TrainingContext, ranking: Ranking | None
    ) -> None:
        self.weight = 0.0
        self.is_on = ranking is not None
        self._l1 = search.l1 if search.enabled else 0.0
        self._until = search.l1_until
        self._ticket_scales: list[nn.Parameter] | None = None
        self._ranking = ranking
        # Norms that a forward pass has not used are left out.
        self._tracks_usage = search.enabled and training.backend.finds_unused
        self._training = training
        self._usage: ParameterUsage | None = None
        self._is_in_loss = False
        self._num_steps = 0
        self._is_expected = self._l1 > 0 and ranking is not None and bool(ranking.scales)
        self._counts_factors = True
        self._has_warned = False
        self._factors: list[Tensor] = []

    def follow(self, network: nn.Module) -> None:
        """Penalise the scales of another network; ``ranking`` must know it already."""
        self.remove()
        if self._tracks_usage and self._ranking is not None:
            self._usage = ParameterUsage(network, self._ranking.scales)

    def follow_ticket(self, network: nn.Module, names: Collection[str]) -> None:
        """End with the draw of the ticket, or go on with its scales.

        Args:
            network: the drawn network.
            names: names of its norms' scales.
        """
        self.remove()
        scales = [p for name, p in network.named_parameters() if name in names]
        self.is_on = self._until == "end" and bool(scales)
        if self.is_on:
            self._ticket_scales = scales
            if self._tracks_usage:
                self._usage = ParameterUsage(network, scales)

    def term(self) -> Tensor:
        """The penalty, a scalar to add to the loss of the forward pass before."""
        assert self.is_on and self._ranking is not None
        used = None if self._usage is None else self._usage.take()
        self._training.make_available(self._ticket_scales or self._ranking.scales)
        if self._ticket_scales is None:
            penalty = self._l1 * self._ranking.penalty(used)
        else:
            scales = [p for p in self._ticket_scales if used is None or p in used]
            penalty = self._l1 * l1_norm(scales or [self._ticket_scales[0].detach()[:0]])
        self._is_in_loss = True
        if self._counts_factors and penalty.requires_grad:
            penalty.register_hook(self._factors.append)
        return penalty

    def forget_pass(self) -> None:
        """Forget a forward pass whose gradients have been dropped."""
        self._is_in_loss = False
        if self._usage is not None:
            self._usage.take()

    def before_step(self) -> None:
        self.weight = self._l1 if self._is_in_loss else 0.0
        self._is_expected &= not self._is_in_loss
        self._is_in_loss = False
        self._num_steps += 1
        self._counts_factors &= not self._factors  # those of one step are enough

    def warn_of_misuse(self) -> None:
        """Warn, once, if no step so far had the penalty in its loss, so that scales do not become
        small; or if it was multiplied before it was added to the loss."""
        if self._is_expected and self._num_steps:
            self._is_expected = False
            if self._training.comm.rank == 0:
                logger.warning(
                    "check: search.l1 is set, but none of the %d steps so far had "
                    "engine.penalty() in its loss: (loss + engine.penalty()).backward(); where no "
                    "penalty is wanted, set search.l1 to 0",
                    self._num_steps,
                )
        factors = [float(factor) for factor in self._factors]
        self._factors.clear()
        self._counts_factors = not self._has_warned
        if self._has_warned or not factors or _is_whole(factors):
            return
        self._has_warned, self._counts_factors = True, False
        if self._training.comm.rank == 0:
            logger.warning(
                "check: engine.penalty() enters the loss with factor %.4g, so that scales are "
                "penalised by %.4g instead of search.l1 = %.4g; add it to the loss unscaled, and "
                "set search.l1 to the weight you want",
                sum(factors),
                sum(factors) * self._l1,
                self._l1,
            )

    def remove(self) -> None:
        """Remove the hooks of usage tracking."""
        if self._usage is not None:
            self._usage.remove()
        self._usage = None


def _is_whole(factors: Sequence[float]) -> bool:
    """Whether the penalty entered the loss once per pass or once per step, up to a loss scale,
    which is a power of two."""

    def once(factor: float) -> bool:
        scaled = factor >= _SMALLEST_LOSS_SCALE and math.log2(factor).is_integer()
        return scaled or math.isclose(factor, 1, rel_tol=0.01)

    return once(sum(factors)) or all(map(once, factors))
