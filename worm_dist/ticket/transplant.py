"""Transplant: the optimizer goes on with the smaller network, state and all.

Every element of optimizer state that belongs to a surviving weight is carried over bit for bit.
The optimizer stays the same object, so schedulers that hold it go on too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .surgery import Cut, laid_like

__all__ = ["forget", "kept_places", "select", "transplant"]


@torch.no_grad()
def transplant(
    optimizer: Optimizer,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    cuts: Sequence[Cut],
) -> None:
    """Replace the parameters in an optimizer by what is left of them.

    Args:
        optimizer: changed in place.
        before: the parameters of the whole network, by name.
        after: those of the cut network, by the same names.
        cuts: what was cut.
    """
    survivors = {before[name]: parameter for name, parameter in after.items()}
    kept = {before[name]: places for name, places in kept_places(cuts).items()}
    for group in optimizer.param_groups:
        group["params"] = [survivors.get(p, p) for p in group["params"]]
    for old, new in survivors.items():
        assert torch.equal(select(old, kept.get(old, {})), new), "surgery and cuts disagree"
        if new is not old and old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {
                key: select(value, _along(value, old, kept.get(old, {})))
                if isinstance(value, Tensor)
                else value
                for key, value in state.items()
            }


def forget(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> None:
    """Take parameters that are no more out of an optimizer, with their state."""
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in parameters]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def kept_places(cuts: Sequence[Cut]) -> dict[str, dict[int, Tensor]]:
    """For every parameter that is cut, by name, the places that are kept along each dimension."""
    kept: dict[str, dict[int, Tensor]] = {}
    for cut in cuts:
        kept.setdefault(cut.parameter, {})[cut.dim] = cut.kept.nonzero().flatten()
    return kept


def _along(
    value: Tensor, parameter: nn.Parameter, kept: Mapping[int, Tensor]
) -> Mapping[int, Tensor]:
    """The dimensions of a piece of state that follow the parameter's.

    Moments have its shape; a factored moment, such as Adafactor's, is 1 long in some dimensions; a
    step counter has none.
    """
    if value.dim() != parameter.dim():
        return {}
    return {dim: at for dim, at in kept.items() if value.shape[dim] == parameter.shape[dim]}


def select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """What is left of a tensor that is cut along these dimensions."""
    left = tensor
    for dim, places in kept.items():
        left = left.index_select(dim, places.to(tensor.device))
    return laid_like(left, tensor)
