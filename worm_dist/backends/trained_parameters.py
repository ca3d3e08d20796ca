"""Trained parameters: choose which parameters a new wrapper registers for training."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["only_these_train"]


@contextmanager
def only_these_train(network: nn.Module, parameters: Collection[Tensor]) -> Iterator[None]:
    """Context in which exactly these parameters of a network require gradients.

    A wrapper averages the parameters that require gradients when it is constructed.  At that moment
    layers may be switched off that train at other times: in gradual unfreezing, or one half of a
    GAN while the other half steps.
    """
    required_grad = {parameter: parameter.requires_grad for parameter in network.parameters()}
    try:
        for parameter in required_grad:
            parameter.requires_grad_(parameter in parameters)
        yield
    finally:
        for parameter, requires_grad in required_grad.items():
            parameter.requires_grad_(requires_grad)
