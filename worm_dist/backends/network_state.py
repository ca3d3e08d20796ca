"""Network state: weights and buffers by name, of which each rank has its rows where weights are
sharded (DTensors, ZeRO-3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoint.sharded_tensor import AnyTensor, LocalShards, StoredTensor
from ..distributed.collectives import Communicator
from ..distributed.sharded import is_first_replica
from ..errors import CheckpointError
from ..groups.full_shape import full_shape
from .fsdp_optimizer import local_part
from .full_state import gather_shards
from .zero3_weights import release, zero3_part

__all__ = ["full_network_state", "load_network_state", "network_state"]


def network_state(network: nn.Module) -> dict[str, Tensor | LocalShards]:
    """The state dict of a network, with ``LocalShards`` in place of sharded parameters.

    The tensors are the live ones, not copies.
    """
    return {name: _local(tensor) for name, tensor in network.state_dict(keep_vars=True).items()}


def full_network_state(
    state: Mapping[str, Tensor | LocalShards], comm: Communicator
) -> dict[str, Tensor]:
    """A state of ``network_state`` with full tensors in place of sharded ones.  Collective.

    Args:
        state: the state.
        comm: the communicator of the ranks that share the network.

    Returns:
        On rank zero the full state, sharded tensors on the CPU; elsewhere without these.
    """
    sharded = {name: shards for name, shards in state.items() if isinstance(shards, LocalShards)}
    full = dict(zip(sharded, gather_shards(list(sharded.values()), comm) or [])) if sharded else {}
    plain = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    return {name: {**plain, **full}[name] for name in state if name in plain or name in full}


@torch.no_grad()
def load_network_state(network: nn.Module, state: Mapping[str, Tensor | StoredTensor]) -> None:
    """Load a state; of sharded parameters each rank its rows.

    Args:
        network: the network.
        state: full tensors, or tensors in a checkpoint, by name.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has NaN or infinite elements.
    """
    plain = {}
    own = network.state_dict(keep_vars=True)
    for name, tensor in state.items():
        here = own[name]
        if hasattr(here, "ds_shape"):
            elements, begin = zero3_part(here)
            elements.copy_(_range(tensor, begin, elements.numel()))
            release(here)
        elif isinstance(here, DTensor):
            elements, begin = local_part(here)
            elements.copy_(_range(tensor, begin, elements.numel()).view(elements.shape))
        else:
            plain[name] = _range(tensor, 0, here.numel()).view(here.shape)
    missing = network.load_state_dict(plain, strict=False).missing_keys
    assert set(missing) == state.keys() - plain.keys()


def _range(tensor: AnyTensor, begin: int, length: int) -> Tensor:
    assert not isinstance(tensor, LocalShards)
    if isinstance(tensor, Tensor):
        return tensor.reshape(-1)[begin : begin + length]
    elements = tensor.read(begin, begin + length)
    if elements.dtype.is_floating_point and not bool(elements.isfinite().all()):
        raise CheckpointError(f"{tensor.name}: has NaN or infinite elements")
    return elements


def _local(tensor: Tensor) -> Tensor | LocalShards:
    if hasattr(tensor, "ds_shape"):
        part, first = zero3_part(tensor)
        return LocalShards(full_shape(tensor), tensor.dtype, [(first, part)] if len(part) else [])
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    elements, begin = local_part(tensor)
    is_saved = elements.numel() and is_first_replica(tensor)
    return LocalShards(tensor.shape, tensor.dtype, [(begin, elements)] if is_saved else [])
