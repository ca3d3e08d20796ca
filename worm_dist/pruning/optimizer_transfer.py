"""Transplant: the optimizer goes on with the smaller network, state and all.

Every element of optimizer state that belongs to a surviving weight is carried over bit for bit.
Optimizer and parameters stay the same objects, so schedulers and whatever else holds them go on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from .surgery import Cut, laid_like

__all__ = ["forget", "kept_places", "require_cuttable", "select", "transfer_state"]

_Kept = Mapping[str, Mapping[int, Tensor]]


@torch.no_grad()
def transfer_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], cuts: Sequence[Cut]
) -> None:
    """Cut an optimizer's state as its parameters are about to be.

    Args:
        optimizer: changed in place.
        parameters: of the network before it is cut, by name.
        cuts: that are to be made.
    """
    for name, kept in kept_places(cuts).items():
        parameter = parameters[name]
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = select(value, _along(value, parameter, kept))


def require_cuttable(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], cuts: Sequence[Cut]
) -> None:
    """All state must belong to elements one by one, or to none.

    Raises:
        ConfigError: naming what does not, such as a preconditioner or quantized moments.
    """
    for name in kept_places(cuts):
        for key, value in optimizer.state.get(parameters[name], {}).items():
            for complaint in _complaints(value, parameters[name]):
                raise ConfigError(
                    f"the state {key!r} that {type(optimizer).__name__} keeps of {name} "
                    f"{complaint}; it cannot be cut with the channels, choose another optimizer"
                )


def _complaints(value: object, parameter: Tensor) -> Iterator[str]:
    if isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        if any(isinstance(part, Tensor) and part.numel() > 1 for part in parts):
            yield f"is a {type(value).__name__} of tensors"
    if not isinstance(value, Tensor) or value.numel() == 1:
        return
    factors = value.dim() == parameter.dim() and all(
        size in (1, whole) for size, whole in zip(value.shape, parameter.shape, strict=True)
    )
    if not factors:
        yield f"is {list(value.shape)}, and the parameter {list(parameter.shape)}"
    elif not (value.is_floating_point() or value.is_complex()):
        yield f"is quantized ({value.dtype})"


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


def _along(value: Tensor, parameter: Tensor, kept: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
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
