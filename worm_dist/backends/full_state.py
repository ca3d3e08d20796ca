"""Holdings: what an optimizer keeps of every parameter, whole, whichever rank steps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.collectives import Communicator
from .optimizer_view import OptimizerView, Shard

__all__ = ["FullParamState", "gather", "part_of", "scatter_full_state"]

_VALUE = "the weights themselves"
"""Key of what is stepped; moments have the keys that the optimizer gave them."""


@dataclass(frozen=True, eq=False)
class FullParamState:
    """Of one parameter.

    Attributes:
        value: what is stepped: the parameter itself, or its master weights.
        moments: state that belongs to its elements one by one, of the same shape.
        loose: state that belongs to no element, such as a count of steps.
    """

    value: Tensor
    moments: Mapping[str, Tensor]
    loose: Mapping[str, object]


def gather(
    stepping: OptimizerView, ranks: Communicator, take: Callable[[Tensor, Tensor], Tensor]
) -> dict[Tensor, FullParamState]:
    """Everything, put together bit for bit.  Collective if the ranks share the stepping.

    Args:
        stepping: of the optimizer.
        ranks: that step together.
        take: is given a parameter and a whole tensor of its shape, of which there may be no room
            for all at once, and returns what is wanted of it.
    """
    parameters = [p for group in stepping.groups for p in group]
    states = {p: stepping.optimizer.state.get(stepping.owner(p), {}) for p in parameters}
    keys = {p: [k for k, v in states[p].items() if _is_of(v, stepping, p)] for p in parameters}
    found: dict[Tensor, dict[str, Tensor]] = {p: {} for p in parameters}
    # Groups may differ in what they keep: without momentum there is none.
    for key in (_VALUE, *sorted({key for p in parameters for key in keys[p]})):
        having = [p for p in parameters if key in (_VALUE, *keys[p])]
        for p, whole in zip(having, _whole(stepping, having, key, ranks), strict=True):
            found[p][key] = take(p, whole)
    return {
        p: FullParamState(
            tensors.pop(_VALUE),
            tensors,
            {key: value for key, value in states[p].items() if key not in keys[p]},
        )
        for p, tensors in found.items()
    }


@torch.no_grad()
def scatter_full_state(stepping: OptimizerView, holdings: Mapping[Tensor, FullParamState]) -> None:
    """Give every rank's optimizer its part.  Tensors that it has already are written to.

    Args:
        stepping: of the optimizer.
        holdings: by parameter, on any device.
    """
    for parameter, holding in holdings.items():
        owner = stepping.owner(parameter)
        if holding.moments or holding.loose:
            state = stepping.optimizer.state[owner]
            for key, value in holding.loose.items():
                state[key] = _placed(key, value, owner, stepping.optimizer)
            for key, moment in holding.moments.items():
                if not _is_of(state.get(key), stepping, parameter):
                    state[key] = torch.zeros_like(owner, dtype=moment.dtype)
        for shard in stepping.shards(parameter):
            mine = {_VALUE: shard.value, **stepping.moments(shard)}
            for key, whole in {_VALUE: holding.value, **holding.moments}.items():
                mine[key].copy_(part_of(whole, shard))


def part_of(whole: Tensor, shard: Shard) -> Tensor:
    """What a shard has of a tensor of its parameter's shape: a view of the shape of its value."""
    if shard.value.shape == whole.shape:
        return whole
    return whole.reshape(-1)[shard.begin :][: shard.value.numel()]


def _whole(
    stepping: OptimizerView, parameters: Sequence[Tensor], key: str, ranks: Communicator
) -> list[Tensor]:
    """Tensors of the parameters' shapes, from every rank's shards."""

    def mine(shard: Shard) -> Tensor:
        return shard.value if key == _VALUE else stepping.moments(shard)[key]

    if not stepping.shared:
        return [mine(shard).detach() for p in parameters for shard in stepping.shards(p)]
    sizes = [p.numel() for p in parameters]
    row = torch.zeros(sum(sizes), device=parameters[0].device)
    places = [place.view(p.shape) for p, place in zip(parameters, row.split(sizes), strict=True)]
    for parameter, place in zip(parameters, places, strict=True):
        for shard in stepping.shards(parameter):
            assert mine(shard).dtype == torch.float32
            part_of(place, shard).copy_(mine(shard))
    row = ranks.joined(row)
    return [place.view(p.shape) for p, place in zip(parameters, row.split(sizes), strict=True)]


def _placed(key: str, value: object, owner: Tensor, optimizer: Optimizer) -> object:
    """A copy where torch would have it: steps are counted on the CPU if no kernel has to know."""
    if not isinstance(value, Tensor):
        return value
    options = next(
        group for group in optimizer.param_groups if any(p is owner for p in group["params"])
    )
    on_device = key != "step" or options.get("capturable") or options.get("fused")
    return value.to(owner.device if on_device else "cpu", copy=True)


def _is_of(value: object, stepping: OptimizerView, parameter: Tensor) -> bool:
    """Whether a piece of state belongs to elements one by one."""
    return isinstance(value, Tensor) and value.shape == stepping.owner(parameter).shape
