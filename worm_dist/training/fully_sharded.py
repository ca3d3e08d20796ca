"""FSDP sharding: which modules of a network ``fully_shard`` shards by themselves."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..errors import ConfigError

__all__ = ["modules_to_shard", "require_several", "shard"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Modules that are never called, so that nothing would gather their weights."""


def shard(network: nn.Module, unit_mb: float, world_size: int, device: torch.device) -> nn.Module:
    """Shard a network over all ranks, in place.  Collective.

    Args:
        network: the network, on ``device``.
        unit_mb: modules of at least so many MiB are sharded by themselves.
        world_size: number of ranks.
        device: this rank's device.

    Raises:
        ConfigError: there is one rank only.
    """
    require_several(world_size)
    mesh = init_device_mesh(device.type, (world_size,))
    for module in modules_to_shard(network, int(unit_mb * 2**20)):
        fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def require_several(world_size: int) -> None:
    """Refuse to shard over one rank.

    Raises:
        ConfigError: there is one rank only.
    """
    if world_size == 1:
        raise ConfigError(
            "distributed.backend: fsdp shards the network over the ranks, and there is only one; "
            "start more, or choose 'auto'"
        )


def modules_to_shard(network: nn.Module, unit_bytes: int) -> list[nn.Module]:
    """The inner modules to shard by themselves, inner ones first.

    The weights of such a module are gathered when it is called, and freed after it.  Each one has
    parameters of at least ``unit_bytes`` besides those of the modules before it.  An inner module
    that has parameters of its own is not taken apart: attention layers use their projections
    without calling them.  Networks that use a parameter in several places are sharded as a whole.

    Args:
        network: the network.
        unit_bytes: the least size.
    """
    uses = Counter(p for _, p in network.named_parameters(remove_duplicate=False))
    if max(uses.values(), default=0) > 1:
        return []
    found: list[nn.Module] = []

    def rest_of(module: nn.Module) -> int:
        """Bytes of a module's parameters that are in none of the modules found."""
        has_own = any(True for _ in module.parameters(recurse=False))
        if has_own and module is not network:  # which may have a class token, say
            rest = sum(parameter.nbytes for parameter in module.parameters())
        else:
            rest = sum(rest_of(child) for child in module.children())
        if rest < unit_bytes or module is network or isinstance(module, _CONTAINERS):
            return rest
        found.append(module)
        return 0

    rest_of(network)
    return found
