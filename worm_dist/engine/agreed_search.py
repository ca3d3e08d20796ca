"""Agreed search: the masks that all ranks find together, and rank zero's verdict on each."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import WormConfig
from ..distributed.collectives import bits
from ..groups.channel_groups import Groups
from ..groups.mask import Mask
from ..search.convergence import History
from ..search.ranking import Ranking
from ..search.removal_order import removal_order
from ..verdict import Phase, Verdict
from .check_schedule import CheckSchedule
from .context import TrainingContext
from .requirements import warn_of_emptied

__all__ = ["AgreedSearch", "Found"]


class Found(NamedTuple):
    """What a check has found, the same on every rank.

    Attributes:
        verdict: rank zero's decision.
        mask: the mask over the dense network's channels.
        order: int64 indices of the channels to remove, first to be removed first.
        scales: as in ``Ranking.dropped_scales``; None where nothing is truncated yet.
    """

    verdict: Verdict
    mask: Mask
    order: Tensor
    scales: Mapping[str, Tensor] | None


class AgreedSearch:
    """Scores channels, computes and agrees on masks, and decides.

    Args:
        config: the engine's settings.
        training: the training context.
        groups: the channel groups of the dense network.
        ranking: the ranking of all ranks; None if there are no groups.
        schedule: knows when truncation starts at the latest.

    Attributes:
        history: the records of all checks; empty on ranks other than zero.
        checks_dropped: int64 ``[num_channels]``, as in ``removal_order``.
    """

    def __init__(
        self,
        config: WormConfig,
        training: TrainingContext,
        groups: Groups,
        ranking: Ranking | None,
        schedule: CheckSchedule,
    ) -> None:
        self.history = History(config.search)
        self.checks_dropped = torch.zeros(groups.num_channels, dtype=torch.int64)
        self._config = config
        self._training = training
        self._comm = training.comm
        self._given_ranking = ranking
        self._schedule = schedule

    def next_mask(self, phase: Phase, in_force: Mask | None, irreversible: Tensor) -> Found:
        """Compute the mask of a check, compare it across the ranks, and let rank zero decide.
        Collective: one all-reduce of the scores, one comparison of digests, one broadcast.

        Args:
            phase: the present one.
            in_force: the newest mask; None before the first one.
            irreversible: bool ``[num_channels]``, the channels that fade or are removed.

        Raises:
            NonFiniteError: a score is NaN or infinite.
            DivergenceError: the ranks differ in scales or masks.
        """
        ranking, step = self._ranking, self._training.step
        average, scores = self._averaged_scores()
        candidates, mask, floored = ranking.select(average, irreversible)
        checks_dropped = torch.where(mask.keep, 0, self.checks_dropped + 1)
        importance = ranking.importance(average)
        order = removal_order(~mask.keep & ~irreversible, checks_dropped, importance)
        self._comm.assert_equal(
            {
                "scale": bits(ranking.replicated(scores)),
                "mask": bits(mask),
                "order of removal": {"(all)": order.numpy().tobytes()},
                **({} if in_force is None else {"mask in force": bits(in_force)}),
            },
            f"check at step {step}",
        )
        verdict = Verdict.decode(
            self._comm.broadcast_from_rank0(
                lambda: self._judge(phase, candidates, floored).encode(), Verdict.SIZE
            )
        )
        self.checks_dropped = checks_dropped
        truncates = verdict.phase is Phase.TRUNCATE
        scales = ranking.dropped_scales(candidates) if truncates else None
        return Found(verdict, mask, order, scales)

    def order_of_removal(self, mask: Mask, irreversible: Tensor, where: str) -> Tensor:
        """The order in which what a given mask drops is removed, by its importance now: int64
        indices, as in ``removal_order``.  Collective.

        Args:
            mask: the mask, agreed by the ranks.
            irreversible: bool ``[num_channels]``, the channels that fade or are removed.
            where: prefix of error messages.

        Raises:
            DivergenceError: the ranks have different orders.
        """
        average, _ = self._averaged_scores()
        importance = self._ranking.importance(average)
        order = removal_order(~mask.keep & ~irreversible, self.checks_dropped, importance)
        self._comm.assert_equal({"order of removal": {"(all)": order.numpy().tobytes()}}, where)
        return order

    @property
    def _ranking(self) -> Ranking:
        assert self._given_ranking is not None
        return self._given_ranking

    def _averaged_scores(self) -> tuple[Tensor, Tensor]:
        """Scores averaged over the ranks, by one all-reduce; and this rank's own.  Both on the CPU,
        by one copy."""
        with self._training.full_network() if self._ranking.reads_weights else nullcontext():
            scores = self._ranking.scores()
        # What has just been put together from all ranks is the same on all, and its own average.
        is_average = self._training.backend.has_one_copy and self._ranking.is_replicated
        average = scores if is_average else self._comm.mean(scores)
        averaged, own = torch.stack([average, scores.to(average.dtype)]).cpu()
        return averaged, own

    def _judge(self, phase: Phase, candidates: Mask, floored: tuple[str, ...]) -> Verdict:
        """Rank zero's decision: truncation starts at the elbow, or at the latest step for it.
        One-shot removal draws the ticket there; without removal it is drawn when the masks have
        settled."""
        step, truncation = self._training.step, self._config.truncation
        record = self.history.record(step, candidates, floored)
        is_latest = self._schedule.is_latest_start(self._config.search.elbow.latest, step)
        at_elbow = (record.elbow or is_latest) and phase is Phase.SEARCH
        one_shot = truncation.removes and truncation.removal.schedule == "one_shot"
        starts = at_elbow and truncation.mode != "off" and not one_shot
        ticket = at_elbow if one_shot else record.settled and not truncation.removes
        if ticket:
            warn_of_emptied(self._config.search, floored, step)
        return Verdict(
            phase=Phase.TRUNCATE if starts else phase,
            ticket=ticket,
            elbow=at_elbow and truncation.mode != "off",
            settled=record.settled,
            distance_mean=record.distance_mean,
            distance_max=record.distance_max,
        )
