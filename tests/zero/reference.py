"""Reference: plain DeepSpeed, and by hand, element by element, what truncation should do to it."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles import folded, folded_name, is_gate, live_flags
from tests.zero.inside import FIRST_MOMENTS
from tests.zero.row import Row
from tests.zero.trainee import Trainee
from worm_dist import Mask
from worm_dist.groups.channel_groups import Groups

__all__ = ["FADE_STEPS", "Expected", "Reference"]

FADE_STEPS = 3


class Expected:
    """What frozen elements must be, from what they were when they froze.

    Attributes:
        flags: for every parameter a bool tensor of its shape, False where it is frozen.
        lost: bool ``[num_channels]``, channels whose fade has begun.
        over_at: the step with which the last fade ends, 0 if there was none.
        zero_at: int64 ``[num_channels]``, the step with which a channel's fade ends.
    """

    def __init__(self, trainee: Trainee, groups: Groups, scope: str, fades: bool) -> None:
        self._trainee = trainee
        self._groups = groups
        self._scope = scope
        self._does_fade = fades
        self._fades: list[tuple[str, Tensor, Tensor, int]] = []
        self._values: dict[str, Tensor] = {}
        self.lost = torch.zeros(groups.num_channels, dtype=torch.bool)
        with trainee.full():
            self.flags = live_flags(trainee.network, groups, self.lost, scope)
        self.over_at = 0
        self.zero_at = torch.full(self.lost.shape, 2**62)

    def freeze(self, mask: Mask) -> None:
        """From the next step on, what the mask drops is frozen and the rest is live."""
        with self._trainee.full():
            self._freeze(mask)

    def _freeze(self, mask: Mask) -> None:
        trainee, groups, frozen = self._trainee, self._groups, ~mask.keep
        self.flags = live_flags(trainee.network, groups, frozen, self._scope)
        self._values = trainee.inside.everything()
        begins = frozen & ~self.lost
        if self._does_fade and bool(begins.any()):
            since = trainee.num_steps
            for name, flag in live_flags(trainee.network, groups, begins, "norm").items():
                if not bool(flag.all()):
                    self._fades.append((name, ~flag, self._values[name], since))
            self.over_at = since + FADE_STEPS
            self.zero_at[begins] = self.over_at
            self.lost = self.lost | begins

    def fold_gates(self, values: dict[str, Tensor]) -> None:
        """From the next step on, every gate is one and what it scales is as in these values."""
        assert self.over_at <= self._trainee.num_steps, "a fade is under way"
        self._fades.clear()
        self._values = values
        for name, flag in self.flags.items():
            if is_gate(name):
                flag.fill_(False)

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters of which something is frozen."""
        return [name for name, flag in self.flags.items() if not bool(flag.all())]

    def now(self, key: str, like: Tensor) -> Tensor:
        """What a master or a moment, by name and key, must be where it is frozen.

        A master is as it was; of N steps of a fade, step a leaves (N - a) / N.  There is no
        momentum, and the second moment is as it was.
        """
        if key.split()[-1] in FIRST_MOMENTS or key not in self._values:
            return torch.zeros_like(like)
        value = self._values[key].clone()
        for faded, begins, start, since in self._fades:
            if faded == key:
                left = max(0, FADE_STEPS - (self._trainee.num_steps - since)) / FADE_STEPS
                value[begins] = (start * torch.tensor(left))[begins]
        return value


class Reference(Trainee):
    """Knows nothing of the engine but the groups and the masks in force."""

    def __init__(self, row: Row, groups: Groups, scope: str, fades: bool) -> None:
        super().__init__(row)
        self.expected = Expected(self, groups, scope, fades)
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(_Zeroing(self.expected, name))

    def step(self, number: int) -> None:
        num_steps = self.num_steps
        super().step(number)
        if self.num_steps > num_steps and self.expected.frozen:
            with self.full():
                self._write_back()

    def fold_gates(self) -> None:
        """Multiply every gate into the columns that it scales, and let it stay one."""
        with self.full():
            self._fold_gates()

    def _fold_gates(self) -> None:
        values = self.inside.everything()
        plain = folded({name: values[name] for name, _ in self.network.named_parameters()})
        for name in values:
            if is_gate(name):
                values[name].fill_(1)
            elif folded_name(name) in plain:
                values[name] = plain[folded_name(name)]
        self.inside.write(values)
        self.expected.fold_gates(values)

    def _write_back(self) -> None:
        inside, expected = self.inside, self.expected
        values = inside.everything()
        for key, value in values.items():
            flag = expected.flags[key.split()[0]]
            values[key] = torch.where(flag, value, expected.now(key, value))
        inside.write(values)


class _Zeroing:
    """A hook that puts zeros where a parameter is frozen now."""

    def __init__(self, expected: Expected, name: str) -> None:
        self._expected = expected
        self._name = name

    def __call__(self, gradient: Tensor) -> Tensor:
        return torch.where(self._expected.flags[self._name], gradient, 0)
