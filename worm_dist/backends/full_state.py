"""Full state: the full (unsharded) optimizer state of each parameter, gathered and scattered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.collectives import Communicator
from ..groups.full_shape import full_numel, full_shape
from .optimizer_view import OptimizerView, Shard

__all__ = ["FullParamState", "gather", "part_of", "scatter_full_state"]

_VALUE = "the weights themselves"
"""Key of the stepped values; moments have the optimizer's own keys."""


@dataclass(frozen=True, eq=False)
class FullParamState:
    """The full (unsharded) state of one parameter.

    Attributes:
        value: the stepped values, of the parameter's shape: the parameter or its master weights.
        moments: per-element state of the same shape, by the optimizer's keys.
        per_param: state that is not per element, such as the step count.
    """

    value: Tensor
    moments: Mapping[str, Tensor]
    per_param: Mapping[str, object]


def gather(
    view: OptimizerView, comm: Communicator, take: Callable[[Tensor, Tensor], Tensor]
) -> dict[Tensor, FullParamState]:
    """Gather the full state of every parameter, bit for bit.  Collective if the state is sharded.

    Args:
        view: the optimizer's view.
        comm: the communicator of the ranks that share the optimizer.
        take: called with a parameter and one full tensor of its shape; returns what is to be kept
            of it, since there may be no memory for all full tensors at once.

    Returns:
        The state by parameter, with the tensors that ``take`` returned.
    """
    parameters = [p for group in view.groups for p in group]
    states = {p: view.optimizer.state.get(view.owner(p), {}) for p in parameters}
    keys = {p: [k for k, v in states[p].items() if _is_per_element(v, view, p)] for p in parameters}
    found: dict[Tensor, dict[str, Tensor]] = {p: {} for p in parameters}
    # Parameter groups may have different keys: without momentum there is no buffer.
    for key in (_VALUE, *sorted({key for p in parameters for key in keys[p]})):
        having = [p for p in parameters if key in (_VALUE, *keys[p])]
        for p, full in zip(having, _full_tensors(view, having, key, comm), strict=True):
            found[p][key] = take(p, full)
    return {
        p: FullParamState(
            tensors.pop(_VALUE),
            tensors,
            {key: value for key, value in states[p].items() if key not in keys[p]},
        )
        for p, tensors in found.items()
    }


@torch.no_grad()
def scatter_full_state(view: OptimizerView, full_states: Mapping[Tensor, FullParamState]) -> None:
    """Write this rank's shards of a full state into its optimizer, in place where tensors exist.

    Args:
        view: the optimizer's view.
        full_states: the full state by parameter, on any device.
    """
    for parameter, full_state in full_states.items():
        owner = view.owner(parameter)
        if full_state.moments or full_state.per_param:
            state = view.optimizer.state[owner]
            for key, value in full_state.per_param.items():
                state[key] = _placed(key, value, owner, view)
            for key, moment in full_state.moments.items():
                if not _is_per_element(state.get(key), view, parameter):
                    state[key] = torch.zeros_like(owner, dtype=moment.dtype)
        for shard in view.shards(parameter):
            local = {_VALUE: shard.value, **view.moments(shard)}
            for key, full in {_VALUE: full_state.value, **full_state.moments}.items():
                local[key].copy_(part_of(full, shard))


def part_of(full: Tensor, shard: Shard) -> Tensor:
    """The shard's part of a tensor of its parameter's shape: a view of the shape of its value."""
    if shard.value.shape == full.shape:
        return full
    return full.reshape(-1)[shard.begin :][: shard.value.numel()]


def _full_tensors(
    view: OptimizerView, parameters: Sequence[Tensor], key: str, comm: Communicator
) -> list[Tensor]:
    """One full tensor per parameter, of its shape, put together from every rank's shards."""

    def local(shard: Shard) -> Tensor:
        return shard.value if key == _VALUE else view.moments(shard)[key]

    if not view.shared:
        return [local(shard).detach() for p in parameters for shard in view.shards(p)]
    sizes = [full_numel(p) for p in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    tensors = [t.view(full_shape(p)) for p, t in zip(parameters, flat.split(sizes), strict=True)]
    for parameter, full in zip(parameters, tensors, strict=True):
        for shard in view.shards(parameter):
            assert local(shard).dtype == torch.float32
            part_of(full, shard).copy_(local(shard))
    flat = comm.all_reduce_disjoint(flat)
    return [t.view(full_shape(p)) for p, t in zip(parameters, flat.split(sizes), strict=True)]


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
