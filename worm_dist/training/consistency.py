"""Divergence check: all ranks must hold bit-identical weights.

Averaged gradients keep the weights equal as long as nothing else changes them.  Otherwise the
divergence goes unnoticed: the losses still fall, but the ranks train different networks, and only
one of them is saved.
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

    The running statistics of norms are left out: between two steps they differ from rank to rank.
    DistributedDataParallel overwrites them with rank zero's at the next step, and ``evaluate`` does
    so too, so they cannot diverge for longer than a step.

    Args:
        network: the network without its wrapper.
        ranks: the ranks that hold a replica.
        when: the moment of the check, for the message.

    Raises:
        DivergenceError: the replicas differ; raised on every rank, naming tensors and ranks.
    """
    digests = {name: _digest(tensor) for name, tensor in _replicated(network)}
    differences = ranks.compare(digests)
    if differences:
        num_more = len(differences) - _MOST_NAMED
        more = f" (and {num_more} more)" if num_more > 0 else ""
        raise DivergenceError(
            f"{when}: the ranks no longer hold the same network: "
            f"{'; '.join(differences[:_MOST_NAMED])}{more}. Resume from the last checkpoint; look "
            "for rank-dependent code, data or seeds that reach the weights outside of the averaged "
            "gradients"
        )


def _replicated(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    per_rank = {
        id(statistic)
        for module in network.modules()
        if isinstance(module, _NormBase)
        for statistic in (module.running_mean, module.running_var)
    }
    for name, parameter in network.named_parameters():
        yield f"parameter {name}", parameter.detach()
    for name, buffer in network.named_buffers():
        if id(buffer) not in per_rank:
            yield f"buffer {name}", buffer


def _digest(tensor: Tensor) -> str:
    raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(raw).hexdigest()[:16]
