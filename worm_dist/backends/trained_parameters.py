"""Trained: which parameters a wrapper takes for those that train."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["only_these_train"]


@contextmanager
def only_these_train(network: nn.Module, parameters: Collection[Tensor]) -> Iterator[None]:
    """Within, these of a network's parameters require gradients, and no others.

    A wrapper averages what trains when it is made.  At that moment layers may rest that train at
    other times: in gradual unfreezing, or the one half of a GAN while the other half steps.
    """
    trains = {parameter: parameter.requires_grad for parameter in network.parameters()}
    try:
        for parameter in trains:
            parameter.requires_grad_(parameter in parameters)
        yield
    finally:
        for parameter, trained in trains.items():
            parameter.requires_grad_(trained)
