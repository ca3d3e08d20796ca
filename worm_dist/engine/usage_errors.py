"""Usage errors: detect at a check what a training loop has changed without the engine."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import BackendError, ConfigError
from ..groups.channel_groups import ChannelGroup
from ..groups.full_shape import full_shape
from ..pruning.optimizer_transfer import require_cuttable
from ..pruning.recorded_inputs import RecordedInputs
from .context import TrainingContext

__all__ = ["UsageErrors", "require_alone"]


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
    """Checks that network, optimizer and hooks are still as the engine expects.

    Args:
        training: the engine's training context.
        groups: the channel groups that may lose channels.

    Raises:
        ConfigError: the optimizer already has state that cannot be cut with the channels.
    """

    def __init__(self, training: TrainingContext, groups: Iterable[ChannelGroup]) -> None:
        self._training = training
        members = [member for group in groups for member in group.members]
        self._cut = {name: None for member in members for name, _ in member.parameters}
        self._has_checked = False
        self._step = 0
        self._weight_versions: int | None = None
        self.follow()
        self._require_cuttable("attach")

    def follow(self) -> None:
        """Accept the network as it is now, after the engine has changed it."""
        self._parameters = dict(self._training.network.named_parameters())
        self._shapes = {name: full_shape(p) for name, p in self._parameters.items()}
        self._num_hooks = self._training.num_hooks
        self.forget_weight_versions()

    def forget_weight_versions(self) -> None:
        """Accept that weights have been written to since the last check."""
        self._weight_versions = None

    def require_steps_seen(self) -> None:
        """Require that weights have not changed since the last call without a counted step.

        Raises:
            ConfigError: they have.
        """
        versions = sum(parameter._version for parameter in self._parameters.values())
        if self._weight_versions not in (None, versions) and self._training.step == self._step:
            raise ConfigError(f"check: weights have changed, but {self._no_step_seen()}")
        self._weight_versions, self._step = versions, self._training.step

    def require_training(self, since_last_check: int, where: str) -> None:
        """Require at least one step between two masks, and what ``require_unchanged`` does.

        Raises:
            ConfigError, BackendError: a requirement is not met.
        """
        if not since_last_check and self._has_checked:
            raise ConfigError(f"check: {self._no_step_seen()}")
        self.require_unchanged(where)
        self._has_checked = True

    def require_unchanged(self, where: str) -> None:
        """Require the parameters of the network and the hooks of its wrapper to be unchanged, and
        the optimizer's state to be such that channels can be held and removed.

        Raises:
            ConfigError: a parameter has been replaced, added or removed; or state is quantized.
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
            shape = full_shape(now[name])
            if shape != self._shapes[name]:
                raise ConfigError(
                    f"{where}: parameter {name} is {list(shape)} now, and was "
                    f"{list(self._shapes[name])} at attach; only engine.draw may change its size"
                )
        if self._training.num_hooks > self._num_hooks:
            raise BackendError(
                f"{where}: a communication hook has been registered on the model since attach, "
                "but DDP allows only one, which truncation needs; use truncation.compression"
            )
        self._require_cuttable(where)

    def _require_cuttable(self, where: str) -> None:
        here = [name for name in self._cut if name in self._parameters]  # gates may be folded
        require_cuttable(self._training.optimizer_view, self._parameters, here, where)

    def _no_step_seen(self) -> str:
        return (
            f"no optimizer step has been counted since step {self._step}. The engine's hooks are "
            f"on the {type(self._training.optimizer).__name__} that it was attached with: after "
            "making a new optimizer, attach again"
        )
