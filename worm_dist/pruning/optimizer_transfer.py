"""Optimizer transfer: the optimizer state follows the smaller network.

The state of every surviving weight is kept bit for bit.  Optimizer and parameters stay the same
objects, so references to them, such as in schedulers, stay valid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..backends.optimizer_view import OptimizerView
from ..errors import ConfigError
from .surgery import Cut, match_memory_format

__all__ = ["drop_parameters", "kept_indices", "require_cuttable", "select", "transfer_state"]

_Kept = Mapping[str, Mapping[int, Tensor]]


@torch.no_grad()
def transfer_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], cuts: Sequence[Cut]
) -> None:
    """Slice an optimizer's state in the way its parameters are going to be sliced.

    Args:
        optimizer: the optimizer; modified in place.
        parameters: the parameters of the network before the cuts, by name.
        cuts: the cuts that are going to be made.
    """
    for name, kept in kept_indices(cuts).items():
        parameter = parameters[name]
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = select(value, _along(value, parameter, kept))


def require_cuttable(
    view: OptimizerView, parameters: Mapping[str, Tensor], names: Iterable[str], where: str
) -> None:
    """Check that all state of parameters that lose channels is elementwise, factored or scalar.

    Args:
        view: the optimizer's view.
        parameters: the network's parameters, by name.
        names: names of the parameters that lose channels; those that are not stepped may be among
            them.
        where: prefix of error messages.

    Raises:
        ConfigError: some state is of another kind, such as a preconditioner or quantized moments.
    """
    optimizer, stepped = view.optimizer, view.parameters
    for name in names:
        owner = view.owner(parameters[name]) if parameters[name] in stepped else parameters[name]
        for key, value in optimizer.state.get(owner, {}).items():
            for problem in _problems(value, owner, view.shared):
                raise ConfigError(
                    f"{where}: the state {key!r} that {type(optimizer).__name__} keeps of {name} "
                    f"{problem}; it cannot be cut with the channels, choose another optimizer"
                )


def _problems(value: object, parameter: Tensor, is_sharded: bool) -> Iterator[str]:
    if isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        if any(isinstance(part, Tensor) and part.numel() > 1 for part in parts):
            yield f"is a {type(value).__name__} of tensors"
    if not isinstance(value, Tensor) or value.numel() == 1:
        return
    factors = value.dim() == parameter.dim() and all(
        size in (1, full) for size, full in zip(value.shape, parameter.shape, strict=True)
    )
    plain = (Tensor, nn.Parameter, type(parameter.detach()))  # a shard's state is sharded likewise
    if type(value) not in plain:  # which quantizes, or is a part of a larger one
        yield f"is a {type(value).__name__}"
    elif is_sharded and value.shape != parameter.shape:
        yield f"is {list(value.shape)}, and a shard of the parameter {list(parameter.shape)}"
    elif not factors:
        yield f"is {list(value.shape)}, and the parameter {list(parameter.shape)}"
    elif not (value.is_floating_point() or value.is_complex()):
        yield f"is quantized ({value.dtype})"


def drop_parameters(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> None:
    """Remove parameters and their state from an optimizer."""
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in parameters]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def kept_indices(cuts: Sequence[Cut]) -> dict[str, dict[int, Tensor]]:
    """Return the kept indices of every cut parameter, by name and dimension."""
    kept: dict[str, dict[int, Tensor]] = {}
    for cut in cuts:
        kept.setdefault(cut.parameter, {})[cut.dim] = cut.kept.nonzero().flatten()
    return kept


def _along(value: Tensor, parameter: Tensor, kept: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
    """Select the dimensions along which a state tensor has to be sliced.

    Moments have the parameter's shape; factored moments, such as Adafactor's, have size 1 in some
    dimensions; a step counter has no dimensions.
    """
    if value.dim() != parameter.dim():
        return {}
    return {dim: at for dim, at in kept.items() if value.shape[dim] == parameter.shape[dim]}


def select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Select the kept indices of a tensor along each dimension; keeps the memory format."""
    left = tensor
    for dim, indices in kept.items():
        left = left.index_select(dim, indices.to(tensor.device))
    return match_memory_format(left, tensor)
