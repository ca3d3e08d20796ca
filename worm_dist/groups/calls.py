"""Calls: the modules of a network that run on some inputs, in eval mode and in training mode."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from .forward import called_modules, in_training

__all__ = ["Calls"]


class Calls(NamedTuple):
    """The names of the modules that run in one pass in each mode.

    Attributes:
        composed: the modules that have children; training mode is theirs only.
        in_eval: what runs in eval mode.
        in_training: what runs in training mode; None if that fails, as without targets.
    """

    composed: tuple[str, ...]
    in_eval: frozenset[str]
    in_training: frozenset[str] | None

    @classmethod
    def of(cls, network: nn.Module, example_inputs: Any) -> Calls:
        """Run a network in both modes.

        Args:
            network: a copy of the unwrapped network, in eval mode.
            example_inputs: inputs as for ``forward.run``.

        Raises:
            Exception: the network does not run on these inputs in eval mode.
        """
        modules = list(network.modules())
        called = called_modules(network, example_inputs)
        if list(network.modules()) != modules:  # the first pass has made some
            called = called_modules(network, example_inputs)
        names = {module: name for name, module in network.named_modules()}
        composed = tuple(name for module, name in names.items() if _is_composed(module))
        in_eval = frozenset(names[module] for module in called if module in names)
        try:
            with in_training(network, composed):
                called = called_modules(network, example_inputs)
        except Exception:  # user code may raise anything
            return cls(composed, in_eval, None)
        return cls(
            composed, in_eval, frozenset(names[module] for module in called if module in names)
        )

    def deciding(self, may_lack: bool = False) -> tuple[str, ...]:
        """Return the modules whose training mode makes more of the network run; empty if it does
        not, or fails.

        Args:
            may_lack: whether to accept that other parts run in eval mode only.
        """
        if self.in_training is None:
            return ()
        runs_more = self.in_training - self.in_eval if may_lack else self.in_training > self.in_eval
        return self.composed if runs_more else ()

    @property
    def reached(self) -> frozenset[str]:
        """What runs in eval mode or with the deciding modules in training mode."""
        if self.in_training is None or not self.deciding():
            return self.in_eval
        return self.in_eval | self.in_training


def _is_composed(module: nn.Module) -> bool:
    return any(True for _ in module.children())
