"""Finite values: which tensors of a network's state must be free of NaN and infinities."""

from __future__ import annotations

from torch import nn

__all__ = ["finite_names"]

_STATISTICS = ("running_mean", "running_var")


def finite_names(network: nn.Module) -> set[str]:
    """Names of the parameters and of the running statistics of norms.

    Other buffers may hold infinities, as masks of attention do.
    """
    statistics = {
        f"{name}.{statistic}".removeprefix(".")
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for statistic in _STATISTICS
    }
    return statistics | dict(network.named_parameters()).keys()
