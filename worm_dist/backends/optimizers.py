"""Optimizers: the one that steps and holds the state, behind what the user steps."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..errors import BackendError, ConfigError

__all__ = ["innermost"]

_TRANSPARENT = {"AcceleratedOptimizer": "optimizer", "LightningOptimizer": "_optimizer"}
"""Wrappers that leave all that is done to weights to another optimizer, and where they keep it."""
_REFUSED = {
    "LBFGS": "keeps a history of the whole network as flat vectors, of which no channel can be "
    "cut; use one that keeps its state element by element, such as SGD or AdamW",
    "ZeroRedundancyOptimizer": "keeps parameters in places of its own, where the draw does not "
    "find them; use DeepSpeed's ZeRO stage 1, or a torch optimizer",
}


def innermost(optimizer: object) -> Optimizer:
    """The torch optimizer that step hooks are registered on and whose state is cut.

    Args:
        optimizer: what is given to ``attach``.

    Raises:
        ConfigError: there is none, or it is not known what else is done around its steps.
        BackendError: it cannot be cut.
    """
    if optimizer is None:
        raise ConfigError("attach: give the optimizer; only a DeepSpeed engine has its own")
    name, kinds = type(optimizer).__name__, [kind.__name__ for kind in type(optimizer).__mro__]
    for kind, attribute in _TRANSPARENT.items():
        if kind in kinds and isinstance(inner := getattr(optimizer, attribute, None), Optimizer):
            return innermost(inner)
    for kind, reason in _REFUSED.items():
        if kind in kinds:
            raise BackendError(f"attach: {kind} {reason}")
    within = _within(optimizer)
    if within:
        attribute, inner = within[0]
        kind = type(inner).__name__
        raise ConfigError(
            f"attach: {name} steps by way of the {kind} in its attribute {attribute!r}, and what "
            f"else it does to weights is not known. If {kind} is the last to move them, as with "
            f"SAM, give that one, attach(model, optimizer.{attribute}, ...), and step as before; "
            f"if not, as with Lookahead, train with {kind} alone"
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"attach: {name} is not a torch optimizer; give what steps the weights")
    return optimizer


def _within(optimizer: object) -> list[tuple[str, Optimizer]]:
    """Optimizers that this one holds, by attribute."""
    attributes: dict[str, Any] = getattr(optimizer, "__dict__", {})
    return [
        (f"{key}[0]" if isinstance(value, (list, tuple)) else key, each)
        for key, value in attributes.items()
        for each in (value[:1] if isinstance(value, (list, tuple)) else [value])
        if isinstance(each, Optimizer) and each is not optimizer
    ]
