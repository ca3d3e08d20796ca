"""Drift: ranks that hold the same network must hold the same bits.

Averaged gradients keep it so, as long as nothing else reaches the weights.  What does is silent:
the losses still fall, and the ranks train different networks of which one is saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..distributed.collectives import Communicator
from ..errors import DivergenceError

__all__ = ["require_same_network"]

_MOST_NAMED = 3


def require_same_network(network: nn.Module, ranks: Communicator, when: str) -> None:
    """Compare parameters and buffers across the ranks, bit by bit.  Collective.

    One all-reduce of a digest; each rank reads its network once, a second for 300 million floats.

    Left out are the running statistics of norms: between two steps they are each rank's own.
    DistributedDataParallel replaces them by rank zero's at the next step, and a test does before it
    begins, so that they cannot drift for longer than a step.

    Args:
        network: not wrapped.
        ranks: that hold it.
        when: for the message.

    Raises:
        DivergenceError: on every rank, naming tensors and ranks.
    """
    digests = {name: _digest(tensor) for name, tensor in _shared(network)}
    found = ranks.differences(digests)
    if found:
        more = f" (and {len(found) - _MOST_NAMED} more)" if len(found) > _MOST_NAMED else ""
        raise DivergenceError(
            f"{when}: the ranks no longer hold the same network: "
            f"{'; '.join(found[:_MOST_NAMED])}{more}. Start again from the last checkpoint; look "
            "for rank-dependent code, data or seeds that reach the weights outside of the averaged "
            "gradients"
        )


def _shared(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    own = {
        id(statistic)
        for module in network.modules()
        if isinstance(module, _NormBase)
        for statistic in (module.running_mean, module.running_var)
    }
    for name, parameter in network.named_parameters():
        yield f"parameter {name}", parameter.detach()
    for name, buffer in network.named_buffers():
        if id(buffer) not in own:
            yield f"buffer {name}", buffer


def _digest(tensor: Tensor) -> str:
    raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(raw).hexdigest()[:16]
