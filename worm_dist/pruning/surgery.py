"""Surgery: the physical removal of the channels that a mask drops."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..groups.attention import find_attentions
from ..groups.channel_groups import Groups
from ..search.mask import Mask
from .attention_heads import keep_heads
from .parameter_storage import replace_data

__all__ = ["Cut", "cuts_of", "laid_like", "remove_channels", "shapes_of", "ungated"]

_Conv = nn.modules.conv._ConvNd
_Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, eq=False)
class Cut:
    """What is left of one parameter along one of its dimensions.

    Attributes:
        module: the module, by its name in the unwrapped network, whose channels or heads these are.
        parameter: its name there.
        dim: the dimension that is cut.
        kept: bool, one for every place along that dimension.
    """

    module: str
    parameter: str
    dim: int
    kept: Tensor

    def __post_init__(self) -> None:
        assert self.kept.dtype == torch.bool and bool(self.kept.any()), self.parameter


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """The shape of every parameter, by name."""
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def cuts_of(groups: Groups, mask: Mask, shapes: Mapping[str, torch.Size]) -> tuple[Cut, ...]:
    """All cuts that a mask makes.

    Args:
        groups: of the network that is cut.
        mask: of these groups.
        shapes: of that network's parameters, by name.

    Raises:
        ConfigError: a group would lose all its channels.
    """
    cuts: dict[tuple[str, int], Cut] = {}
    for group in groups:
        if not bool(mask[group.name].any()):
            raise ConfigError(
                f"group {group.name}: the mask keeps none of its {group.num_channels} channels, "
                "and the network would be cut in two; raise search.floor"
            )
        for member in group.members:
            dropped = member.positions[~mask[group.name]].flatten()
            for name, dim in member.parameters:
                if (name, dim) not in cuts:
                    everything = torch.ones(shapes[name][dim], dtype=torch.bool)
                    cuts[name, dim] = Cut(member.module, name, dim, everything)
                cuts[name, dim].kept[dropped] = False
    return tuple(cut for cut in cuts.values() if not bool(cut.kept.all()))


def ungated(cuts: Sequence[Cut]) -> tuple[Cut, ...]:
    """The same cuts of a network whose gates have been folded into its weights."""
    plain = {
        cut: cut.parameter.replace(".parametrizations.weight.original", ".weight")
        for cut in cuts
        if not cut.parameter.endswith(".parametrizations.weight.0.scale")
    }
    return tuple(dataclasses.replace(cut, parameter=name) for cut, name in plain.items())


@torch.no_grad()
def remove_channels(network: nn.Module, cuts: Sequence[Cut]) -> None:
    """Cut the network in place; its modules and parameters stay the same objects.

    Raises:
        ConfigError: a head of attention would be cut in two; then nothing is changed.
    """
    heads = _heads_left(network, cuts)
    for cut in cuts:
        owner_name, _, attribute = cut.parameter.rpartition(".")
        owner = network.get_submodule(owner_name)
        places = cut.kept.nonzero().flatten()
        whole = owner.get_parameter(attribute)
        left = whole.index_select(cut.dim, places.to(whole.device))
        replace_data(whole, laid_like(left, whole))
        if isinstance(owner, _Norm) and attribute == "weight":
            _cut_statistics(owner, places)
    for cut in cuts:
        _refit(network.get_submodule(cut.module))
        _refit(network.get_submodule(cut.parameter.rpartition(".")[0]))
    for module, num_heads in heads.items():
        keep_heads(network, module, num_heads)


def laid_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """A part of a tensor in the memory format of the whole: channels_last stays channels_last."""
    if whole.is_contiguous():
        return tensor
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if whole.dim() == dims and whole.is_contiguous(memory_format=memory_format):
            return tensor.contiguous(memory_format=memory_format)
    return tensor


def _refit(module: nn.Module) -> None:
    """What a module says of its own width follows its parameters."""
    if isinstance(module, _Conv):
        rows, columns = module.weight.shape[:2]
        if module.groups == module.in_channels == module.out_channels:
            module.groups = rows if module.groups > 1 else 1  # depthwise: a row for each channel
        inner = columns * module.groups
        module.in_channels, module.out_channels = (
            (rows, inner) if module.transposed else (inner, rows)
        )
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _Norm):
        module.num_features = module.weight.numel()


def _cut_statistics(norm: _Norm, places: Tensor) -> None:
    for name in ("running_mean", "running_var"):
        statistic = getattr(norm, name)
        if statistic is not None:
            setattr(norm, name, statistic.index_select(0, places.to(statistic.device)))


def _heads_left(network: nn.Module, cuts: Sequence[Cut]) -> dict[str, int]:
    """How many heads each attention will have that loses some.

    Raises:
        ConfigError: a head would lose only a part of its rows, as it can in another's ticket.
    """
    attentions = {attention.module: attention for attention in find_attentions(network)[0]}
    left: dict[str, int] = {}
    for cut in cuts:
        if cut.module in attentions:
            num_rows = attentions[cut.module].num_heads * int(cut.kept.sum())
            heads, rest = divmod(num_rows, cut.kept.numel())
            if rest or not heads or left.setdefault(cut.module, heads) != heads:
                raise ConfigError(f"the cut of {cut.parameter!r} does not leave whole heads")
    return left
