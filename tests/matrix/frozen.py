"""Frozen: what the slices of frozen channels must be after every step, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.matrix.trainee import Trainee
from tests.oracles import live_flags
from worm_dist import Mask
from worm_dist.config import TruncationConfig
from worm_dist.groups.channel_groups import Groups

__all__ = ["FADE_STEPS", "FIRST_MOMENTS", "Frozen"]

FADE_STEPS = 3
FIRST_MOMENTS = ("momentum_buffer", "exp_avg", "grad_avg")


class Frozen:
    """Starts from the trainee's own values at the moment of a freeze.

    Attributes:
        flags: for every parameter a bool tensor of its shape, False where it is frozen.
        lost: bool ``[num_channels]``, channels whose fade has begun.
        sent_until: int64 ``[num_channels]``, the step after which what reads a channel is not sent
            any more.
    """

    def __init__(self, trainee: Trainee, groups: Groups, config: TruncationConfig) -> None:
        self._trainee = trainee
        self._groups = groups
        self._config = config
        self._fades: list[tuple[str, Tensor, Tensor, int]] = []
        self.lost = torch.zeros(groups.num_channels, dtype=torch.bool)
        self.flags = live_flags(trainee.network, groups, self.lost, config.scope)
        self.sent_until = torch.full(self.lost.shape, 2**62)
        self._take_values()

    def freeze(self, mask: Mask) -> None:
        """From the next step on, what the mask drops is frozen and the rest is live."""
        network, groups, frozen = self._trainee.network, self._groups, ~mask.keep
        self.flags = live_flags(network, groups, frozen, self._config.scope)
        self._take_values()
        begins = frozen & ~self.lost
        if self._config.frozen_weights == "remove" and bool(begins.any()):
            since = self._trainee.num_steps
            for name, flag in live_flags(network, groups, begins, "norm").items():
                if not bool(flag.all()):
                    self._fades.append((name, ~flag, self._values[name], since))
            again = self._trainee.recipe.probes_again
            self.sent_until[begins] = since + FADE_STEPS + 1 + again
            self.lost = self.lost | begins

    @property
    def values(self) -> dict[str, Tensor]:
        """What frozen slices are now, for every parameter that has some; NaN where it is live.

        Held slices are what they were; of N steps of a fade, step a leaves (N - a) / N.
        """
        now = {
            name: torch.where(self.flags[name], torch.nan, value)
            for name, value in self._values.items()
            if not bool(self.flags[name].all())
        }
        for name, begins, start, since in self._fades:
            steps_left = max(0, FADE_STEPS - (self._trainee.num_steps - since))
            precise = torch.promote_types(start.dtype, torch.float32)
            left = torch.tensor(steps_left / FADE_STEPS, dtype=precise)
            now[name][begins] = (start.to(precise) * left).to(start.dtype)[begins]
        return now

    def moment(self, name: str, key: str) -> Tensor:
        """What the optimizer state of frozen slices is: no momentum, the old second moment."""
        old = self._moments[name].get(key)
        if old is None or key in FIRST_MOMENTS:
            return torch.zeros_like(self._values[name])
        return old

    def _take_values(self) -> None:
        named = self._trainee.network.named_parameters()
        self._values = {name: p.detach().clone() for name, p in named}
        self._moments = {name: self._trainee.state_of(name) for name in self._values}
