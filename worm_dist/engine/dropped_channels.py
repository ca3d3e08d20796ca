"""Dropped channels: what becomes of the channels that the mask drops, until they are removed.

They are frozen; under gradual removal they also fade, one after another, until their output is
exactly zero; then they are removed physically, in stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..backends.optimizer_view import StepListener
from ..config import TruncationConfig
from ..errors import ConfigError
from ..groups.channel_groups import Groups
from ..groups.mask import Mask
from ..groups.remaining_channels import RemainingChannels
from ..pruning.optimizer_transfer import kept_indices, select
from ..pruning.surgery import cuts_of, shapes_of
from ..schema import Flags, Schema
from ..truncation.loss_guard import LossGuard
from ..truncation.removal import Removal, RemovalSchema
from ..truncation.truncation import Truncation, TruncationSchema
from ..verdict import Phase, Verdict
from .capture_guard import CaptureGuard
from .check_schedule import CheckSchedule
from .context import TrainingContext
from .draw import draw
from .penalty import Penalty

__all__ = ["DroppedChannels", "DroppedChannelsSchema"]


class DroppedChannelsSchema(Schema):
    """Schema of ``DroppedChannels.state_dict``."""

    mask: Flags | None
    removed: Flags
    removal: RemovalSchema
    truncation: TruncationSchema | None


class DroppedChannels(StepListener):
    """The channels that the mask drops: frozen, fading, zero or removed.

    Args:
        config: the settings of truncation.
        training: the training context, with its hooks registered.
        groups: the channel groups of the dense network.
        schedule: converts intervals to optimizer steps.
        penalty: the L1 penalty.

    Attributes:
        mask: the newest mask over the dense network's channels; None before the first one.
        guard: the loss guard.
        channels: the channels of the dense network that have not been removed.
    """

    def __init__(
        self,
        config: TruncationConfig,
        training: TrainingContext,
        groups: Groups,
        schedule: CheckSchedule,
        penalty: Penalty,
    ) -> None:
        self.mask: Mask | None = None
        self.guard = LossGuard(config.removal.pause_above)
        self.channels = RemainingChannels(groups)
        self._config = config
        self._training = training
        self._sizes = groups.sizes
        self._penalty = penalty
        self._removal = Removal(
            config.removal, training.comm, self.guard, schedule.num_steps, schedule.total_steps
        )
        self._num_dense_elements = training.num_elements
        self._is_complete = False
        self._capture_guard = CaptureGuard(
            lambda: not self._is_complete and bool(self._truncation.frozen.any())
        )
        self._follow_network()

    @property
    def step_listeners(self) -> Sequence[StepListener]:
        """What acts around an optimizer step; others after a stage."""
        listeners = (self._penalty, *self._truncation.step_listeners, self.guard, self)
        return (self._capture_guard, *listeners)

    @property
    def irreversible(self) -> Tensor:
        """bool ``[num_channels]``: the dense network's channels that fade or are removed."""
        return self.channels.in_dense(self._truncation.irreversible)

    @property
    def frozen(self) -> Tensor:
        """bool ``[num_channels]``: the dense network's channels that are frozen or removed."""
        return self.channels.in_dense(self._truncation.frozen)

    @property
    def num_nonzero_removed(self) -> int:
        """Scales and shifts of removed channels that are not exactly zero on this rank."""
        return int(self._truncation.num_nonzero(self._training.step))

    def freeze(
        self,
        mask: Mask,
        order: Tensor,
        scales: Mapping[str, Tensor] | None = None,
        distance: float | None = None,
    ) -> None:
        """Freeze what a mask drops, and begin to remove it if the settings say so.  Collective; the
        ranks have agreed on mask and order, so that packed buffers match.

        Args:
            mask: the mask over the dense network's channels.
            order: int64 indices of its dropped channels in the order of their removal.
            scales: by name of every scale parameter, the elements that the norm's own mask drops,
                for soft truncation; None if channels are masked, not norms.
            distance: the mean distance of the mask to those in the window, 0 to 1; None if not
                known.
        """
        self.mask = mask
        # What is removed leaves all norms of a channel at once; what is only damped need not.
        self._truncation.freeze(
            self.channels.of(~mask.keep),
            scales if self._config.mode == "soft" else None,
            distance,
        )
        if self._config.removes:
            device = next(self._training.network.parameters()).device
            self._removal.start(order, self._training.step, device)
            self._begin_due_channels()

    def after_step(self, step: int) -> None:
        """Begin to fade the channels that are due."""
        if self._removal.num_waiting and not self._is_complete:
            self._begin_due_channels()

    def _freeze_dropped(self, mask: Mask) -> None:
        self._truncation.freeze(self.channels.of(~mask.keep))

    def _begin_due_channels(self) -> None:
        """Begin to fade the channels that are due; at the end the mask keeps all others."""
        step, device = self._training.step, next(self._training.network.parameters()).device
        begin = self._removal.begin(step, device)
        if begin.numel():
            self._truncation.begin(self.channels.numbers(begin), step)
        if not self._removal.num_waiting:
            self.mask = Mask.from_vector(self._sizes, ~self.irreversible)
            self._freeze_dropped(self.mask)

    def shrink(
        self,
        mask: Mask,
        copies: Sequence[nn.Module],
        is_complete: bool,
        where: str,
        is_restored: bool = False,
    ) -> None:
        """Remove channels physically, and go on with the smaller network.  Collective.

        Args:
            mask: the mask over the dense network's channels, agreed by the ranks.
            copies: copies of the network, pruned in the same way.
            is_complete: whether nothing more will be removed.
            where: prefix of error messages.
            is_restored: whether weights and statistics will be loaded.

        Raises:
            ConfigError: a copy has parameters of the network itself.
            DrawError: on every rank; everything has been rolled back.
        """
        training, groups = self._training, self.channels.groups
        remaining = self.channels.mask_of(mask)
        kept = kept_indices(cuts_of(groups, remaining, shapes_of(training.network)))
        _require_own([training.network, *copies], kept, where)
        state = {} if is_complete else self._truncation.state_dict(training.step)
        draw(
            training,
            groups,
            remaining,
            copies,
            where,
            is_complete=is_complete,
            is_restored=is_restored,
            are_zero=bool(self._truncation.zero(training.step)[~remaining.keep].all()),
        )
        self._truncation.remove()
        self.channels.remove(mask)
        if is_complete:
            self.mask, self._is_complete = mask, True
            return
        self._follow_network()
        self._truncation.load_state_dict(
            Truncation.pruned_state(
                state, remaining.keep, lambda name, full: select(full, kept.get(name, {}))
            )
        )

    def _follow_network(self) -> None:
        """Truncate the network as it is now, in which nothing is frozen yet."""
        training = self._training
        self._share_of_dense = training.num_elements / self._num_dense_elements
        self._truncation = Truncation(
            self._config,
            training.reduction,
            training.optimizer_view,
            self.channels.groups,
            training.trained,
            lambda: self._penalty.weight,
        )

    def described(self, verdict: Verdict) -> Verdict:
        """The verdict with the fields that each rank computes itself, without communication."""
        removes = verdict.phase is Phase.TRUNCATE and self._config.removes
        num_dropped = 0 if self.mask is None else self.mask.num_channels - self.mask.num_kept
        num_zero = int(self._truncation.zero(self._training.step).sum())
        num_gone = self.channels.num_removed + num_zero
        is_over = removes and num_gone == num_dropped
        smallest_stage = max(1.0, self._config.removal.stage * num_dropped)
        return dataclasses.replace(
            verdict,
            ticket=is_over if removes else verdict.ticket,
            stage=removes and not is_over and num_zero >= smallest_stage,
            generation=self._truncation.generation,
            live_fraction=self._truncation.live_fraction * self._share_of_dense,
            removed_fraction=num_gone / max(1, num_dropped) if removes else 0.0,
            paused=removes and self._removal.is_paused,
        )

    def offered(self, verdict: Verdict) -> Mask:
        """The mask of the draw that a verdict offers: all that is dropped for the ticket; for a
        stage, the channels whose output is exactly zero, and removed ones.

        Raises:
            ConfigError: it offers none.
        """
        if not (verdict.stage or verdict.ticket) or self.mask is None:
            raise ConfigError(
                "draw: no check has found the ticket yet; wait for verdict.stage or "
                "verdict.ticket, or give the mask to draw: engine.draw(mask)"
            )
        if verdict.ticket:
            return self.mask
        zero = self.channels.in_dense(self._truncation.zero(self._training.step))
        return Mask.from_vector(self._sizes, ~zero)

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values, the same on all ranks.  Collective if the optimizer is
        sharded."""
        truncation = self._truncation
        return {
            "mask": None if self.mask is None else self.mask.keep.clone(),
            "removed": self.channels.removed.clone(),
            "removal": self._removal.state_dict(),
            "truncation": (
                None if self._is_complete else truncation.state_dict(self._training.step)
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any], copies: Sequence[nn.Module]) -> None:
        """Restore a state: prune the network as it was, and freeze what was frozen.  Collective."""
        keep, removed, truncation = state["mask"], state["removed"].to("cpu"), state["truncation"]
        if truncation is None or bool(removed.any()):
            remaining = Mask.from_vector(self._sizes, ~removed)
            self.shrink(remaining, copies, truncation is None, "load_state_dict", is_restored=True)
        if truncation is not None:
            self._truncation.load_state_dict(truncation)
        self._removal.load_state_dict(state["removal"])
        self.mask = None if keep is None else Mask.from_vector(self._sizes, keep)

    def remove(self) -> None:
        """Stop truncating gradients and holding weights."""
        self._truncation.remove()
        self._penalty.remove()


def _require_own(networks: Sequence[nn.Module], cut: Iterable[str], where: str) -> None:
    """Require that no parameter would be cut twice.

    Args:
        networks: the network and its copies.
        cut: names of the parameters that are cut.
        where: prefix of error messages.

    Raises:
        ConfigError: a copy shares one with the network or with another copy.
    """
    names, seen = list(cut), set[nn.Parameter]()
    for number, network in enumerate(networks, start=-1):
        parameters = dict(network.named_parameters(remove_duplicate=False))
        own = {parameters[name] for name in names}
        if not seen.isdisjoint(own):
            raise ConfigError(
                f"{where}: copies[{number}] has parameters of the network itself or of another "
                "copy; give each copy once, and not engine.model, which is cut anyway"
            )
        seen |= own
