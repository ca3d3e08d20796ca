"""Whole weights: members of a ``Backend`` that are the same wherever every rank has all weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

__all__ = ["WholeWeights"]


class WholeWeights:
    """Weights that need not be gathered.

    Attributes:
        network: the bare network.
    """

    network: nn.Module
    shards_weights = False

    def full_network(self) -> AbstractContextManager[nn.Module]:
        """The network itself; see ``Backend``."""
        return nullcontext(self.network)

    def make_available(self, parameters: Sequence[Tensor]) -> None:
        """Do nothing: they are; see ``Backend``."""

    def full_values(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The parameters' own values; see ``Backend``."""
        return [parameter.detach() for parameter in parameters]
