"""Full state: the full (unsharded) optimizer state of each parameter, gathered and scattered.

Under sharding only rank zero ever has all of it, in host memory.  It receives the state in pieces
of limited size (``distributed/byte_streams.py``); the other ranks hold nothing but their shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.byte_streams import memory_of
from ..distributed.collectives import Communicator
from ..groups.full_shape import full_shape
from .optimizer_view import OptimizerView, Shard, part_of

__all__ = [
    "FullParamState",
    "allocate_state",
    "bits_of",
    "gather",
    "part_of",
    "scatter_full_state",
    "split_state",
]


@dataclass(frozen=True, eq=False)
class FullParamState:
    """The full (unsharded) state of one parameter.

    Attributes:
        value: the stepped values, of the parameter's shape: the master weights.  None if they have
            the bits of the parameter, or are the parameter.
        moments: per-element state of the same shape, by the optimizer's keys.
        per_param: state that is not per element, such as the step count.
    """

    value: Tensor | None
    moments: Mapping[str, Tensor]
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
        return _gather_shards(view, parameters, comm)
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


def _gather_shards(
    view: OptimizerView, parameters: Sequence[Tensor], comm: Communicator
) -> dict[Tensor, FullParamState] | None:
    """Each rank's stream has, for every shard, its values if they differ from the parameter's, and
    then its moments; a table with a row for every shard tells rank zero where they belong."""
    states = [split_state(view, parameter) for parameter in parameters]
    rows, stream = [], []
    for number, (parameter, (dtypes, _)) in enumerate(zip(parameters, states, strict=True)):
        for shard in view.shards(parameter):
            differs = _differs(view, parameter, shard)
            rows.append([number, shard.begin, shard.value.numel(), differs])
            moments = view.moments(shard)
            sent = [*([shard.value] if differs else []), *(moments[key] for key in dtypes)]
            stream += [memory_of(tensor) for tensor in sent]
    tables: list[Tensor] = []

    def place_table(rank: int, num_bytes: int) -> list[Tensor]:
        tables.append(torch.empty(num_bytes, dtype=torch.uint8))
        return tables[-1:]

    comm.gather_streams([memory_of(torch.tensor(rows, dtype=torch.int64))], place_table)
    values: dict[int, Tensor] = {}
    full = [
        {key: torch.empty(full_shape(p), dtype=dtype) for key, dtype in dtypes.items()}
        for p, (dtypes, _) in zip(parameters, states, strict=True)
        if comm.rank == 0
    ]

    def places(rank: int, num_bytes: int) -> list[Tensor]:
        found = []
        for number, begin, length, differs in tables[rank].view(torch.int64).view(-1, 4).tolist():
            if differs and number not in values:
                # Shards that do not differ have the parameter's bits.
                parameter = parameters[number]
                shape, dtype = full_shape(parameter), view.owner(parameter).dtype
                values[number] = torch.empty(shape, dtype=dtype)
                if not view.cuts_weights:
                    values[number].copy_(parameter)
            tensors = [*([values[number]] if differs else []), *full[number].values()]
            found += [memory_of(t.view(-1)[begin : begin + length]) for t in tensors]
        return found

    comm.gather_streams(stream, places)
    if comm.rank != 0:
        return None
    return {
        parameter: FullParamState(values.get(number), full[number], others)
        for number, (parameter, (_, others)) in enumerate(zip(parameters, states, strict=True))
    }


@torch.no_grad()
def scatter_full_state(view: OptimizerView, full_states: Mapping[Tensor, FullParamState]) -> None:
    """Write this rank's shards of a full state into its optimizer, in place where tensors exist.

    Args:
        view: the optimizer's view.
        full_states: the full state by parameter, on any device.
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


def _differs(view: OptimizerView, parameter: Tensor, shard: Shard) -> bool:
    """Whether stepped values have other bits than their parameter."""
    if not view.copies or view.cuts_weights:  # then the full values are nowhere else
        return view.cuts_weights
    value, part = shard.value, part_of(parameter.detach(), shard)
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
