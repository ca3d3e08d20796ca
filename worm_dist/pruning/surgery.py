"""Surgery: physical removal of the channels that a mask drops."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..groups.attention import find_attentions
from ..groups.channel_groups import Groups
from ..groups.full_shape import full_shape
from ..groups.mask import Mask
from ..groups.parameter_storage import replace_data
from ..groups.selective_norm import SelectiveBatchNorm2d
from .attention_heads import keep_heads

__all__ = ["Cut", "cuts_of", "match_memory_format", "remove_channels", "shapes_of", "ungated"]

_Conv = nn.modules.conv._ConvNd
_Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, eq=False)
class Cut:
    """The kept indices of one parameter along one dimension.

    Attributes:
        module: the module whose channels or heads these are, by name in the unwrapped network.
        parameter: the parameter's name in the unwrapped network.
        dim: the dimension that is cut.
        kept: bool ``[size of that dimension]``, True = kept.
    """

    module: str
    parameter: str
    dim: int
    kept: Tensor

    def __post_init__(self) -> None:
        assert self.kept.dtype == torch.bool and bool(self.kept.any()), self.parameter


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of every parameter, by name."""
    return {name: full_shape(parameter) for name, parameter in network.named_parameters()}


def cuts_of(groups: Groups, mask: Mask, shapes: Mapping[str, torch.Size]) -> tuple[Cut, ...]:
    """Compute the cuts that remove the channels dropped by a mask.

    Args:
        groups: the channel groups of the network to cut.
        mask: the mask over these groups.
        shapes: the shapes of that network's parameters, by name.

    Raises:
        ConfigError: a group would lose all its channels.
    """
    cuts: dict[tuple[str, int], Cut] = {}
    for group in groups:
        if not bool(mask[group.name].any()):
            raise ConfigError(
                f"group {group.name}: the mask keeps none of its {group.num_channels} channels, "
                "and the network would be cut in two; raise search.min_keep_ratio"
            )
        for member in group.members:
            dropped = member.positions[~mask[group.name]].flatten()
            for name, dim in member.parameters:
                if (name, dim) not in cuts:
                    keep_all = torch.ones(shapes[name][dim], dtype=torch.bool)
                    cuts[name, dim] = Cut(member.module, name, dim, keep_all)
                cuts[name, dim].kept[dropped] = False
    return tuple(cut for cut in cuts.values() if not bool(cut.kept.all()))


def ungated(cuts: Sequence[Cut]) -> tuple[Cut, ...]:
    """Translate cuts to the network whose gates have been folded into its weights."""
    plain = {
        cut: cut.parameter.replace(".parametrizations.weight.original", ".weight")
        for cut in cuts
        if not cut.parameter.endswith(".parametrizations.weight.0.scale")
    }
    return tuple(dataclasses.replace(cut, parameter=name) for cut, name in plain.items())


@torch.no_grad()
def remove_channels(network: nn.Module, cuts: Sequence[Cut]) -> None:
    """Cut the network in place; its modules and parameters stay the same objects.

    Args:
        network: the unwrapped network.
        cuts: the cuts to make.

    Raises:
        ConfigError: an attention head would be cut in two; the network is then unchanged.
    """
    heads = _heads_left(network, cuts)
    for cut in cuts:
        owner_name, _, attribute = cut.parameter.rpartition(".")
        owner = network.get_submodule(owner_name)
        indices = cut.kept.nonzero().flatten()
        full = owner.get_parameter(attribute)
        left = full.index_select(cut.dim, indices.to(full.device))
        replace_data(full, match_memory_format(left, full))
        if isinstance(owner, _Norm) and attribute == "weight":
            _cut_statistics(owner, indices)
            if isinstance(owner, SelectiveBatchNorm2d):
                owner.keep(indices)
    for cut in cuts:
        _update_sizes(network.get_submodule(cut.module))
        _update_sizes(network.get_submodule(cut.parameter.rpartition(".")[0]))
    for module, num_heads in heads.items():
        keep_heads(network, module, num_heads)


def match_memory_format(tensor: Tensor, full: Tensor) -> Tensor:
    """Return ``tensor`` in the memory format of ``full``, such as channels_last.

    The strides tell the format.  ``is_contiguous`` does not: a 1x1 convolution is contiguous in
    every format, but DistributedDataParallel compares the strides of gradients and buckets.
    """
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if full.dim() == dims and full.stride() == _strides(full, memory_format):
            if tensor.stride() == _strides(tensor, memory_format):
                return tensor
            return torch.empty_like(tensor, memory_format=memory_format).copy_(tensor)
    return tensor


def _strides(tensor: Tensor, memory_format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(tensor.shape, memory_format=memory_format, device="meta").stride()


def _update_sizes(module: nn.Module) -> None:
    """Update a module's size attributes to the shapes of its parameters."""
    if isinstance(module, _Conv):
        rows, columns = module.weight.shape[:2]
        if module.groups == module.in_channels == module.out_channels:
            module.groups = rows if module.groups > 1 else 1  # depthwise: one row per channel
        inner = columns * module.groups
        module.in_channels, module.out_channels = (
            (rows, inner) if module.transposed else (inner, rows)
        )
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _Norm):
        module.num_features = module.weight.numel()


def _cut_statistics(norm: _Norm, indices: Tensor) -> None:
    for name in ("running_mean", "running_var"):
        statistic = getattr(norm, name)
        if statistic is not None:
            setattr(norm, name, statistic.index_select(0, indices.to(statistic.device)))


def _heads_left(network: nn.Module, cuts: Sequence[Cut]) -> dict[str, int]:
    """Return the number of remaining heads of each attention that loses some.

    Raises:
        ConfigError: a head would lose a part of its rows, which an invalid ticket may ask for.
    """
    attentions = {attention.module: attention for attention in find_attentions(network)[0]}
    left: dict[str, int] = {}
    for cut in cuts:
        if cut.module in attentions:
            num_rows = attentions[cut.module].num_heads * int(cut.kept.sum())
            heads, rest = divmod(num_rows, cut.kept.numel())
            if rest or not heads or left.setdefault(cut.module, heads) != heads:
                raise ConfigError(f"the cut of {cut.parameter!r} would split an attention head")
    return left
