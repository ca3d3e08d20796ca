"""The command line's form of a budget."""

from __future__ import annotations

from .errors import ConfigError

__all__ = ["parse_budget"]


def parse_budget(text: str) -> dict[str, float]:
    """Convert ``flops=0.25`` to the setting ``search.budget``, which the settings check.

    Raises:
        ConfigError: the text has another form.
    """
    quantity, _, share = text.partition("=")
    try:
        return {quantity: float(share)}
    except ValueError:
        raise ConfigError(
            f"--budget: {text!r} is not a share of something; write flops=0.25"
        ) from None
