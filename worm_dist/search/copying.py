"""Copying: a network's copy to try things on."""

from __future__ import annotations

import copy

from torch import nn

from .nested import tensors_in

__all__ = ["copied"]


def copied(network: nn.Module) -> nn.Module:
    """A copy that shares nothing with the network, and nothing with its training: what hooks it
    holds are the network's own, and the graph of tensors that it keeps is left behind.

    torch refuses to copy tensors that have a graph.  Networks keep such: a feature for a loss of
    its own, a weight that ``weight_norm`` or ``prune`` has computed.
    """
    memo = {
        id(tensor): tensor.detach().clone()
        for module in network.modules()
        for tensor in tensors_in(vars(module))
        if not tensor.is_leaf
    }
    return copy.deepcopy(network, memo)
