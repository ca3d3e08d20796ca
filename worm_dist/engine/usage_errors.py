"""Usage errors: what a training loop can do behind the engine's back, noticed when it matters."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import BackendError, ConfigError
from .context import TrainingContext
from .recorded_inputs import RecordedInputs

__all__ = ["UsageErrors", "require_alone"]

logger = logging.getLogger(__name__)

_SMALLEST_LOSS_SCALE = 2**8


def require_alone(network: nn.Module) -> None:
    """Two engines would count every step twice and cut the network under one another.

    Raises:
        ConfigError: another engine is attached.
    """
    for hook in network._forward_pre_hooks.values():
        if isinstance(hook, RecordedInputs) and hook.belongs_to_an_engine:
            raise ConfigError(
                "attach: another engine is attached to this network; call its detach() first"
            )


class UsageErrors:
    """Looks at each check whether the training is still the one that the engine knows.

    Args:
        training: that the engine is attached to.
        wants_penalty: whether the penalty should be part of the loss.
    """

    def __init__(self, training: TrainingContext, wants_penalty: bool) -> None:
        self._training = training
        self._wants_penalty = wants_penalty
        self._num_steps = 0
        self._listens = True
        self._has_warned = False
        self._factors: list[Tensor] = []
        self._step = 0
        self._moves: int | None = None
        self.follow()

    def follow(self) -> None:
        """The network is another one now, by the engine's own doing."""
        self._parameters = dict(self._training.network.named_parameters())
        self._num_hooks = self._training.num_hooks
        self.forget_moves()

    def forget_moves(self) -> None:
        """Weights may have been written to, by whom is known."""
        self._moves = None

    def note_step(self, penalised: bool) -> None:
        """A step, with the penalty in its loss or without."""
        self._num_steps += 1
        self._wants_penalty &= not penalised
        self._listens &= not self._factors

    def follow_penalty(self, penalty: Tensor) -> None:
        """Note how many times it enters the loss, in the first step after a check."""
        if self._listens and penalty.requires_grad:
            penalty.register_hook(self._factors.append)

    def require_heard(self) -> None:
        """Between two calls weights must not move without a step that is heard.

        Raises:
            ConfigError: they have.
        """
        moves = sum(parameter._version for parameter in self._parameters.values())
        if self._moves not in (None, moves) and self._training.step == self._step:
            raise ConfigError(f"check: weights have moved, but {self._unheard()}")
        self._moves, self._step = moves, self._training.step

    def require_step(self, since_last_check: int, is_first: bool) -> None:
        """Between two masks there must be steps.

        Raises:
            ConfigError: there were none.
        """
        if not since_last_check and not is_first:
            raise ConfigError(f"check: {self._unheard()}")

    def require_unchanged(self, where: str) -> None:
        """The network must have the parameters, and its wrapper the hooks, that it had.

        Raises:
            ConfigError: a parameter has been replaced, added or taken away.
            BackendError: a communication hook has been registered.
        """
        now = dict(self._training.network.named_parameters())
        for name in {**self._parameters, **now}:
            if now.get(name) is not self._parameters.get(name):
                what = "is new" if name not in self._parameters else "has been replaced"
                raise ConfigError(
                    f"{where}: parameter {name} {what if name in now else 'is gone'} since attach; "
                    "change the network first (adapters, tied weights, parametrizations), then "
                    "wrap it, make the optimizer and attach"
                )
        if self._training.num_hooks > self._num_hooks:
            raise BackendError(
                f"{where}: a communication hook has been registered on the model since attach, "
                "and truncation needs the only place for one; use truncation.compression"
            )

    def warn_of_no_penalty(self) -> None:
        """Without it scales do not become small, and say little of what can go."""
        if self._wants_penalty and self._num_steps:
            self._wants_penalty = False
            if self._training.ranks.rank == 0:
                logger.warning(
                    "check: search.l1 is set, but none of the %d steps so far had "
                    "engine.penalty() in its loss: (loss + engine.penalty()).backward(); where no "
                    "penalty is wanted, set search.l1 to 0",
                    self._num_steps,
                )

    def warn_of_scaled_penalty(self, l1: float) -> None:
        """Multiplied by hand it is another penalty than the settings say."""
        factors = [float(factor) for factor in self._factors]
        self._factors.clear()
        self._listens = not self._has_warned
        if not factors or self._has_warned or _is_whole(factors):
            return
        self._has_warned, self._listens = True, False
        if self._training.ranks.rank == 0:
            logger.warning(
                "check: engine.penalty() enters the loss %.4g times, so that scales are penalised "
                "by %.4g instead of search.l1 = %.4g; add it to the loss as it is, and write what "
                "you want into search.l1",
                sum(factors),
                sum(factors) * l1,
                l1,
            )

    def _unheard(self) -> str:
        return (
            f"no optimizer step has been heard since step {self._step}. The engine listens to the "
            f"{type(self._training.optimizer).__name__} that it was attached with: one that is "
            "made anew needs a new attach"
        )


def _is_whole(factors: Sequence[float]) -> bool:
    """Whether the passes of a step had the penalty in their losses once each, or once all together;
    or as many times as a loss scaler multiplies the loss, which is a power of two."""

    def once(factor: float) -> bool:
        scaled = factor >= _SMALLEST_LOSS_SCALE and math.log2(factor).is_integer()
        return scaled or math.isclose(factor, 1, rel_tol=0.01)

    return once(sum(factors)) or all(map(once, factors))
