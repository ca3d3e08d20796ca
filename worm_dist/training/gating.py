"""Gating: gates for a network that has heads or neurons, where scales rank its channels."""

from __future__ import annotations

from torch import nn

from ..config import SearchConfig
from ..groups.attention import find_attentions
from ..groups.feed_forward import find_feed_forwards
from ..groups.gates import add_gates

__all__ = ["gated"]


def gated(network: nn.Module, search: SearchConfig) -> nn.Module:
    """The same network, with gates on its heads and neurons if the score counts those.

    Networks that have neither stay as they are.  Without a search there are gates all the same: the
    control experiment trains the network that the others start from.

    Raises:
        ConfigError: as ``add_gates``.
    """
    has_parts = bool(find_attentions(network)[0] or find_feed_forwards(network))
    return add_gates(network) if has_parts and search.importance in ("auto", "gate") else network
