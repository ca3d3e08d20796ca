"""Usage errors: detect at a check what a training loop has changed without the engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import BackendError, ConfigError
from ..pruning.recorded_inputs import RecordedInputs
from .context import TrainingContext

__all__ = ["UsageErrors", "require_alone"]

logger = logging.getLogger(__name__)

_SMALLEST_LOSS_SCALE = 2**8


def require_alone(network: nn.Module) -> None:
    """Refuse a second engine on one network.

    Raises:
        ConfigError: another engine is attached.
    """
    for hook in network._forward_pre_hooks.values():
        if isinstance(hook, RecordedInputs) and hook.belongs_to_an_engine:
            raise ConfigError(
                "attach: another engine is attached to this network; call its detach() first"
            )


class UsageErrors:
    """Checks that network, optimizer, hooks and loss are still as the engine expects.

    Args:
        training: the engine's training context.
        wants_penalty: whether the penalty should be part of the loss.
    """

    def __init__(self, training: TrainingContext, wants_penalty: bool) -> None:
        self._training = training
        self._wants_penalty = wants_penalty
        self._num_steps = 0
        self._counts_penalty = True
        self._has_warned = False
        self._factors: list[Tensor] = []
        self._step = 0
        self._weight_versions: int | None = None
        self.follow()

    def follow(self) -> None:
        """Accept the network as it is now, after the engine has changed it."""
        self._parameters = dict(self._training.network.named_parameters())
        self._num_hooks = self._training.num_hooks
        self.forget_weight_versions()

    def forget_weight_versions(self) -> None:
        """Accept that weights have been written to since the last check."""
        self._weight_versions = None

    def note_step(self, penalised: bool) -> None:
        """Record a step, with the penalty in its loss or without."""
        self._num_steps += 1
        self._wants_penalty &= not penalised
        self._counts_penalty &= not self._factors

    def follow_penalty(self, penalty: Tensor) -> None:
        """Record by which factors the penalty enters the loss, in the first step after a check."""
        if self._counts_penalty and penalty.requires_grad:
            penalty.register_hook(self._factors.append)

    def require_steps_seen(self) -> None:
        """Require that weights have not changed since the last call without a counted step.

        Raises:
            ConfigError: they have.
        """
        versions = sum(parameter._version for parameter in self._parameters.values())
        if self._weight_versions not in (None, versions) and self._training.step == self._step:
            raise ConfigError(f"check: weights have changed, but {self._no_step_seen()}")
        self._weight_versions, self._step = versions, self._training.step

    def require_step(self, since_last_check: int, is_first: bool) -> None:
        """Require at least one step between two masks.

        Raises:
            ConfigError: there was none.
        """
        if not since_last_check and not is_first:
            raise ConfigError(f"check: {self._no_step_seen()}")

    def require_unchanged(self, where: str) -> None:
        """Require the parameters of the network and the hooks of its wrapper to be unchanged.

        Raises:
            ConfigError: a parameter has been replaced, added or removed.
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
                "but DDP allows only one, which truncation needs; use truncation.compression"
            )

    def warn_of_no_penalty(self) -> None:
        """Warn if no step so far had the penalty in its loss: scales do not become small then."""
        if self._wants_penalty and self._num_steps:
            self._wants_penalty = False
            if self._training.comm.rank == 0:
                logger.warning(
                    "check: search.l1 is set, but none of the %d steps so far had "
                    "engine.penalty() in its loss: (loss + engine.penalty()).backward(); where no "
                    "penalty is wanted, set search.l1 to 0",
                    self._num_steps,
                )

    def warn_of_scaled_penalty(self, l1: float) -> None:
        """Warn if the penalty was multiplied before it was added to the loss."""
        factors = [float(factor) for factor in self._factors]
        self._factors.clear()
        self._counts_penalty = not self._has_warned
        if not factors or self._has_warned or _is_whole(factors):
            return
        self._has_warned, self._counts_penalty = True, False
        if self._training.comm.rank == 0:
            logger.warning(
                "check: engine.penalty() enters the loss with factor %.4g, so that scales are "
                "penalised by %.4g instead of search.l1 = %.4g; add it to the loss unscaled, and "
                "set search.l1 to the weight you want",
                sum(factors),
                sum(factors) * l1,
                l1,
            )

    def _no_step_seen(self) -> str:
        return (
            f"no optimizer step has been counted since step {self._step}. The engine's hooks are "
            f"on the {type(self._training.optimizer).__name__} that it was attached with: after "
            "making a new optimizer, attach again"
        )


def _is_whole(factors: Sequence[float]) -> bool:
    """Whether the penalty entered the loss once per pass or once per step, up to a loss scale,
    which is a power of two."""

    def once(factor: float) -> bool:
        scaled = factor >= _SMALLEST_LOSS_SCALE and math.log2(factor).is_integer()
        return scaled or math.isclose(factor, 1, rel_tol=0.01)

    return once(sum(factors)) or all(map(once, factors))
