"""Surgery: the physical removal of the channels that a mask drops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch_pruning
from torch import Tensor, nn

from ..errors import ConfigError
from ..search.groups import Groups
from ..search.mask import Mask

__all__ = ["Cut", "cuts_of", "laid_like", "remove_channels", "side_size"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What is left of one side of one module.

    Attributes:
        module: its name in the unwrapped network.
        side: ``out`` or ``in``; norms and depthwise convolutions are cut by their ``out``.
        kept: bool, one for every output (input) of the module.
        parameters: the parameters cut along with it, each with its dimension.
    """

    module: str
    side: Literal["out", "in"]
    kept: Tensor
    parameters: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        assert self.kept.dtype == torch.bool and bool(self.kept.any()), self.module


def cuts_of(groups: Groups, mask: Mask, network: nn.Module) -> tuple[Cut, ...]:
    """All cuts that a mask makes, from the indices of the one unpruned network.

    Raises:
        ConfigError: a group would lose all its channels.
    """
    kept: dict[tuple[str, Literal["out", "in"]], Cut] = {}
    for group in groups:
        if not bool(mask[group.name].any()):
            raise ConfigError(
                f"group {group.name}: the mask keeps none of its {group.num_channels} channels, "
                "and the network would be cut in two; raise search.floor"
            )
        for member in group.members:
            side: Literal["out", "in"] = "in" if member.role == "consumer" else "out"
            key = (member.module, side)
            if key not in kept:
                size = side_size(network.get_submodule(member.module), side)
                assert size is not None
                everything = torch.ones(size, dtype=torch.bool)
                kept[key] = Cut(member.module, side, everything, member.parameters)
            kept[key].kept[member.positions[~mask[group.name]].flatten()] = False
    return tuple(cut for cut in kept.values() if not bool(cut.kept.all()))


def remove_channels(network: nn.Module, cuts: Sequence[Cut]) -> None:
    """Cut the network in place; its modules stay, their parameters are replaced by smaller ones."""
    graph = torch_pruning.DependencyGraph()
    for cut in cuts:
        module = network.get_submodule(cut.module)
        whole = dict(module.named_parameters(recurse=False))
        pruner = graph.get_pruner_of_module(module)
        remove = pruner.prune_out_channels if cut.side == "out" else pruner.prune_in_channels
        remove(module, (~cut.kept).nonzero().flatten().tolist())
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(whole[name].requires_grad)
            parameter.data = laid_like(parameter.data, whole[name])


def laid_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """A part of a tensor in the memory format of the whole: channels_last stays channels_last."""
    if whole.is_contiguous():
        return tensor
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if whole.dim() == dims and whole.is_contiguous(memory_format=memory_format):
            return tensor.contiguous(memory_format=memory_format)
    return tensor


_SIZES: Mapping[str, Mapping[type[nn.Module], str]] = {
    "out": {
        nn.modules.conv._ConvNd: "out_channels",
        nn.modules.batchnorm._BatchNorm: "num_features",
        nn.Linear: "out_features",
    },
    "in": {nn.modules.conv._ConvNd: "in_channels", nn.Linear: "in_features"},
}


def side_size(module: nn.Module, side: Literal["out", "in"]) -> int | None:
    """Outputs or inputs of a module; None where that side cannot be cut."""
    for kind, attribute in _SIZES[side].items():
        if isinstance(module, kind):
            size = getattr(module, attribute)
            assert isinstance(size, int)
            return size
    return None
