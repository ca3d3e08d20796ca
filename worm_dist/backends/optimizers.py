"""Optimizers: find the torch optimizer that holds the state inside the one the user steps."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..errors import BackendError, ConfigError

__all__ = ["innermost"]

_TRANSPARENT = {"AcceleratedOptimizer": "optimizer", "LightningOptimizer": "_optimizer"}
"""Wrapper classes that change no weights themselves, with the attribute of the inner optimizer."""
_CHOOSE = "use an optimizer with per-element state, such as SGD or AdamW"
_UNSUPPORTED = {
    "LBFGS": "keeps a history of the whole network as flat vectors, from which no channel can be "
    f"removed; {_CHOOSE}",
    "ZeroRedundancyOptimizer": "keeps parameters in buffers of its own, which the draw does not "
    "know; use DeepSpeed's ZeRO stage 1, or a torch optimizer",
}


def innermost(optimizer: object) -> Optimizer:
    """The torch optimizer that step hooks are registered on and whose state a draw prunes.

    Args:
        optimizer: the optimizer given to ``attach``, possibly wrapped.

    Raises:
        ConfigError: it is None, no torch optimizer, or an unknown wrapper of one.
        BackendError: its state cannot be pruned.
    """
    if optimizer is None:
        raise ConfigError("attach: give the optimizer; only a DeepSpeed engine has its own")
    name, kinds = type(optimizer).__name__, [kind.__name__ for kind in type(optimizer).__mro__]
    for kind, attribute in _TRANSPARENT.items():
        if kind in kinds and isinstance(inner := getattr(optimizer, attribute, None), Optimizer):
            return innermost(inner)
    for kind, reason in _UNSUPPORTED.items():
        if kind in kinds:
            raise BackendError(f"attach: {kind} {reason}")
    if any(bits in name.lower() for bits in ("8bit", "4bit", "fp8")):
        raise BackendError(
            f"attach: {name} keeps quantized moments, of which blocks share a scale, so that no "
            f"channel can be held or removed by itself; {_CHOOSE}"
        )
    held = _held_optimizers(optimizer)
    if held:
        attribute, inner = held[0]
        kind = type(inner).__name__
        raise ConfigError(
            f"attach: {name} wraps the {kind} in its attribute {attribute!r}, and how else it "
            f"changes weights is not known. If {kind} is the last to change them, as with SAM, "
            f"attach that one, attach(model, optimizer.{attribute}, ...), and step as before; if "
            f"not, as with Lookahead, train with {kind} alone"
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"attach: {name} is not a torch optimizer; give what steps the weights")
    return optimizer


def _held_optimizers(optimizer: object) -> list[tuple[str, Optimizer]]:
    """Other optimizers in this one's attributes, with the attribute's name."""
    attributes: dict[str, Any] = getattr(optimizer, "__dict__", {})
    return [
        (f"{key}[0]" if isinstance(value, (list, tuple)) else key, each)
        for key, value in attributes.items()
        for each in (value[:1] if isinstance(value, (list, tuple)) else [value])
        if isinstance(each, Optimizer) and each is not optimizer
    ]
