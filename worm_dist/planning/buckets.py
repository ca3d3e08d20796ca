"""Buckets in which DistributedDataParallel reduces the gradients of a network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .step_time import Collective, in_backward

__all__ = ["buckets_of"]

_FIRST_BYTES, _BYTES = 2**20, 25 * 2**20
"""Sizes from which on torch closes the first bucket and the others, by default."""


def buckets_of(
    network: nn.Module, payload_bytes: Mapping[str, int], flops: Mapping[str, int]
) -> tuple[Collective, ...]:
    """The buckets in the order in which they are reduced: from the last layer to the first, as DDP
    rebuilds them after the first step.  The backward pass is assumed to take a time in proportion
    to the FLOPs.

    Args:
        network: the network that is wrapped; dropped channels that it still has take room in its
            buckets.
        payload_bytes: bytes that are sent of every parameter, by name.
        flops: FLOPs of every module, by name.
    """
    buckets = []
    limit, size, payload, computed = _FIRST_BYTES, 0, 0, 0
    total = sum(flops.values()) or 1
    pending = dict(flops)
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    for name, parameter in reversed(trained):
        computed += pending.pop(name.rpartition(".")[0], 0)
        size += parameter.nbytes
        payload += payload_bytes[name]
        if size >= limit:
            buckets.append(Collective("all-reduce", payload, in_backward(computed / total)))
            limit, size, payload = _BYTES, 0, 0
    if size:
        buckets.append(Collective("all-reduce", payload, in_backward(computed / total)))
    return tuple(buckets)
