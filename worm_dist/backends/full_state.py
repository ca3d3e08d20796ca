"""Full state: the full (unsharded) optimizer state of each parameter, gathered and scattered.

Under sharding only rank zero ever has all of it, in host memory.  It receives the state in pieces
of limited size (``distributed/byte_streams.py``); the other ranks hold nothing but their shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.sharded_tensor import AnyTensor, LocalShards, StoredTensor
from ..distributed.byte_streams import memory_of
from ..distributed.collectives import Communicator
from ..distributed.sharded import is_first_replica
from ..errors import CheckpointError
from ..groups.full_shape import full_shape
from .optimizer_view import OptimizerView, Shard

__all__ = [
    "VALUE",
    "FullParamState",
    "allocate_state",
    "bits_of",
    "gather",
    "gather_shards",
    "local_shards",
    "part_of",
    "scatter_full_state",
    "split_state",
]

VALUE = "the weights themselves"
"""Key of the stepped values; moments have the optimizer's own keys."""


@dataclass(frozen=True, eq=False)
class FullParamState:
    """The full (unsharded) state of one parameter.

    Attributes:
        value: the stepped values, of the parameter's shape: the master weights.  None if they have
            the bits of the parameter, or are the parameter.
        moments: per-element state of the same shape, by the optimizer's keys.
        per_param: state that is not per element, such as the step count.

    Tensors may be ``LocalShards`` that are to be saved, or ``StoredTensor`` that were.
    """

    value: AnyTensor | None
    moments: Mapping[str, AnyTensor]
    per_param: Mapping[str, object]


def split_state(
    view: OptimizerView, parameter: Tensor
) -> tuple[dict[str, torch.dtype], dict[str, object]]:
    """The dtypes of a parameter's per-element state, by the optimizer's keys in sorted order, and
    its other state; the same on all ranks, whatever their shards."""
    state = view.optimizer.state.get(view.owner(parameter), {})
    dtypes = {
        key: value.dtype
        for key, value in sorted(state.items())
        if _is_per_element(value, view, parameter)
    }
    return dtypes, {key: value for key, value in state.items() if key not in dtypes}


@torch.no_grad()
def gather(view: OptimizerView, comm: Communicator) -> dict[Tensor, FullParamState] | None:
    """Gather the full state of every parameter on rank zero, bit for bit.  Collective if the state
    is sharded.

    Args:
        view: the optimizer's view.
        comm: the communicator of the ranks that share the optimizer.

    Returns:
        On rank zero the state by parameter: on the CPU if it is sharded, else its tensors are those
        of the optimizer.  None on other ranks.
    """
    parameters = [p for group in view.groups for p in group]
    if view.shared:
        return _full(local_shards(view, comm), comm)
    if comm.rank != 0:
        return None
    found = {}
    for parameter in parameters:
        (shard,) = view.shards(parameter)
        dtypes, others = split_state(view, parameter)
        moments = view.moments(shard)
        value = shard.value.detach() if _differs(view, parameter, shard) else None
        found[parameter] = FullParamState(value, {key: moments[key] for key in dtypes}, others)
    return found


@torch.no_grad()
def local_shards(view: OptimizerView, comm: Communicator) -> dict[Tensor, FullParamState]:
    """The state of every parameter of a sharded optimizer, of which every rank has its shards.
    Collective; the tensors are views of the optimizer's.

    Args:
        view: the optimizer's view.
        comm: the communicator of the ranks that share the optimizer.
    """
    parameters = [p for group in view.groups for p in group]
    differ = torch.tensor(
        [any(_differs(view, p, shard) for shard in view.shards(p)) for p in parameters]
    )
    differ = comm.mean(differ.float()).cpu() > 0  # on any rank
    found = {}
    for parameter, differs in zip(parameters, differ.tolist(), strict=True):
        dtypes, others = split_state(view, parameter)
        shards = [
            (shard.begin, shard.value, view.moments(shard))
            for shard in view.shards(parameter)
            if is_first_replica(parameter)
        ]
        shape = full_shape(parameter)
        values = LocalShards(
            shape, view.owner(parameter).dtype, [(begin, value) for begin, value, _ in shards]
        )
        moments = {
            key: LocalShards(shape, dtype, [(begin, tensors[key]) for begin, _, tensors in shards])
            for key, dtype in dtypes.items()
        }
        found[parameter] = FullParamState(values if differs else None, moments, others)
    return found


def _full(
    found: Mapping[Tensor, FullParamState], comm: Communicator
) -> dict[Tensor, FullParamState] | None:
    sharded = {
        (parameter, key): tensor
        for parameter, state in found.items()
        for key, tensor in {VALUE: state.value, **state.moments}.items()
        if isinstance(tensor, LocalShards)
    }
    full = gather_shards(list(sharded.values()), comm)
    if full is None:
        return None
    tensors = dict(zip(sharded, full, strict=True))
    return {
        parameter: FullParamState(
            tensors.get((parameter, VALUE)),
            {key: tensors[parameter, key] for key in state.moments},
            state.per_param,
        )
        for parameter, state in found.items()
    }


def gather_shards(sharded: Sequence[LocalShards], comm: Communicator) -> list[Tensor] | None:
    """Gather sharded tensors on rank zero, bit for bit, on the CPU; None on other ranks.
    Collective.

    Args:
        sharded: what this rank has of each tensor, the same tensors on all ranks.
        comm: the communicator of the ranks.
    """
    # A table with a row for every part tells rank zero where a stream's bytes belong.
    rows, stream = [], []
    for number, shards in enumerate(sharded):
        for begin, elements in shards.parts:
            rows.append([number, begin, elements.numel()])
            stream.append(memory_of(elements))
    tables: list[Tensor] = []

    def place_table(rank: int, num_bytes: int) -> list[Tensor]:
        tables.append(torch.empty(num_bytes, dtype=torch.uint8))
        return tables[-1:]

    comm.gather_streams([memory_of(torch.tensor(rows, dtype=torch.int64))], place_table)
    is_zero = comm.rank == 0
    full = [torch.empty(each.shape, dtype=each.dtype) for each in sharded if is_zero]

    def places(rank: int, num_bytes: int) -> list[Tensor]:
        table: list[list[int]] = tables[rank].view(torch.int64).view(-1, 3).tolist()
        return [memory_of(full[n].view(-1)[begin : begin + length]) for n, begin, length in table]

    comm.gather_streams(stream, places)
    if not is_zero:
        return None
    num_elements = sum(int(table.view(torch.int64).view(-1, 3)[:, 2].sum()) for table in tables)
    assert num_elements >= sum(tensor.numel() for tensor in full)
    return full


@torch.no_grad()
def scatter_full_state(view: OptimizerView, full_states: Mapping[Tensor, FullParamState]) -> None:
    """Write this rank's shards of a full state into its optimizer, in place where tensors exist.

    Args:
        view: the optimizer's view.
        full_states: the full state by parameter, on any device, or in a checkpoint.

    Raises:
        CheckpointError: a checkpoint cannot be read, or has NaN or infinite elements.
    """
    for parameter, full_state in full_states.items():
        dtypes = {key: moment.dtype for key, moment in full_state.moments.items()}
        allocate_state(view, parameter, dtypes, full_state.per_param)
        for shard in view.shards(parameter):
            if full_state.value is not None:
                shard.value.copy_(part_of(full_state.value, shard))
            elif view.copies:
                shard.value.copy_(view.weights(parameter, shard))
            moments = view.moments(shard)
            for key, full in full_state.moments.items():
                moments[key].copy_(part_of(full, shard))


def allocate_state(
    view: OptimizerView,
    parameter: Tensor,
    dtypes: Mapping[str, torch.dtype],
    others: Mapping[str, object],
) -> None:
    """Give a parameter the optimizer state into which ``Shard.moments`` can be written.

    Args:
        view: the optimizer's view.
        parameter: the parameter.
        dtypes: dtype of each per-element tensor, by the optimizer's keys; existing ones are kept.
        others: state that is not per element; it is copied.
    """
    if not dtypes and not others:
        return
    owner = view.owner(parameter)
    state = view.optimizer.state[owner]
    for key, value in others.items():
        state[key] = _placed(key, value, owner, view)
    for key, dtype in dtypes.items():
        if not _is_per_element(state.get(key), view, parameter):
            state[key] = torch.zeros_like(owner, dtype=dtype)


def part_of(full: AnyTensor, shard: Shard) -> Tensor:
    """The shard's part of a tensor of its parameter's shape, of the shape of its value: a view, or
    read from a checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has NaN or infinite elements.
    """
    assert not isinstance(full, LocalShards)
    if isinstance(full, StoredTensor):
        part = full.read(shard.begin, shard.begin + shard.value.numel())
        if not bool(part.isfinite().all()):
            raise CheckpointError(f"{full.name}: has NaN or infinite elements")
        return part.view(shard.value.shape)
    if shard.value.shape == full.shape:
        return full
    part = full.reshape(-1)[shard.begin :][: shard.value.numel()]
    return part.view(shard.value.shape)


def _differs(view: OptimizerView, parameter: Tensor, shard: Shard) -> bool:
    """Whether stepped values have other bits than their parameter."""
    if not view.copies:
        return False
    value, part = shard.value, view.weights(parameter, shard)
    return value.dtype != part.dtype or not torch.equal(bits_of(value), bits_of(part))


def bits_of(tensor: Tensor) -> Tensor:
    """A view as integers, in which -0 and NaN are values like any other."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers.get(tensor.element_size(), tensor.dtype))


def _placed(key: str, value: object, owner: Tensor, view: OptimizerView) -> object:
    """A copy on the device where torch keeps this state: the step count is on the CPU unless the
    optimizer is capturable or fused."""
    if not isinstance(value, Tensor):
        return value
    options = view.options(owner)
    on_device = key != "step" or options.get("capturable") or options.get("fused")
    return value.to(owner.device if on_device else "cpu", copy=True)


def _is_per_element(value: object, view: OptimizerView, parameter: Tensor) -> bool:
    """Whether an entry of the optimizer's state is per element."""
    return isinstance(value, Tensor) and value.shape == view.owner(parameter).shape
