"""Adds gates to attention heads and feed-forward neurons where the importance needs them."""

from __future__ import annotations

from torch import nn

from ..config import SearchConfig
from ..groups.attention import find_attentions
from ..groups.feed_forward import find_feed_forwards
from ..groups.gates import add_gates

__all__ = ["gated"]


def gated(network: nn.Module, search: SearchConfig) -> nn.Module:
    """Add gates to the heads and neurons of a network if ``search.importance`` uses gates.

    A network without heads and neurons stays unchanged.  Gates are added even if the search is
    disabled, so that the dense control run trains the same network as the others.

    Args:
        network: the network, changed in place.
        search: the search settings.

    Raises:
        ConfigError: ``add_gates`` does not support the network.
    """
    can_be_gated = bool(find_attentions(network)[0] or find_feed_forwards(network))
    wants_gates = search.importance in ("auto", "gate")
    return add_gates(network) if can_be_gated and wants_gates else network
