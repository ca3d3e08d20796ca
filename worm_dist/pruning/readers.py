"""Readers: compares the outputs of the layers that read dropped channels.

If later activations are all zero, the network's outputs do not show an error in the removal of its
channels; the outputs of the layers that read them do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..groups.channel_groups import ChannelGroup
from ..groups.mask import Mask

__all__ = ["OutputSums", "Readers", "same_outputs"]

_Conv = nn.modules.conv._ConvNd
"""The allowed difference, relative to the largest value."""
_SMALL = 1e-3
"""The scale of values below which differences may be rounding errors."""


class _CallSums(NamedTuple):
    """A summary of the output of one call.

    Attributes:
        shape: the shape of the output without dropped channels.
        of_channels: a weighted sum for each kept channel, ``[channels]``; storing the outputs
            themselves would need as much memory as training.
    """

    shape: torch.Size
    of_channels: Tensor


OutputSums: TypeAlias = list[_CallSums]


class Readers:
    """The convolutions and linear layers that read the channels of some groups.

    Args:
        network: the network before removal.
        dropping: the groups whose readers are compared.
        groups: all channel groups of the network, some of which contain the readers' outputs.
        mask: the mask over ``groups``.
    """

    def __init__(
        self,
        network: nn.Module,
        dropping: Sequence[ChannelGroup],
        groups: Sequence[ChannelGroup],
        mask: Mask,
    ) -> None:
        # By reader name: the kept output channels, bool [channels].
        self._kept: dict[str, Tensor] = {}
        for member in (member for group in dropping for member in group.consumers):
            reader = network.get_submodule(member.module)
            if isinstance(reader, nn.Linear):
                self._kept[member.module] = torch.ones(reader.out_features, dtype=torch.bool)
            elif isinstance(reader, _Conv):
                self._kept[member.module] = torch.ones(reader.out_channels, dtype=torch.bool)
        for group in groups:
            dropped = ~mask[group.name]
            for member in group.members:
                if member.role == "producer" and member.module in self._kept:
                    self._kept[member.module][member.positions[dropped].flatten()] = False

    @contextmanager
    def recording(self, sums: OutputSums, network: nn.Module) -> Iterator[None]:
        """Record the readers' outputs within the context; in double precision only, where rounding
        is much smaller than actual differences.

        Args:
            sums: the list that the summaries are appended to.
            network: the network, a copy of it, or the smaller network after removal.
        """
        handles = [
            network.get_submodule(name).register_forward_hook(partial(_record_sums, sums, kept))
            for name, kept in self._kept.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def same_outputs(whole: OutputSums, drawn: OutputSums, *, tolerance: float) -> bool:
    """Whether the readers' outputs in the whole and in the smaller network are equal.

    Calls with different shapes are ignored, since other channels may be folded into the batch
    dimension.  So are non-finite outputs, such as those of a fully masked attention.
    """
    if len(whole) != len(drawn):
        return True
    for one, other in zip(whole, drawn):
        if one.shape == other.shape and one.shape.numel() and one.of_channels.isfinite().all():
            largest = max(float(one.of_channels.abs().max()), _SMALL)
            # Written so that NaN counts as a difference.
            if not bool((one.of_channels - other.of_channels).abs().max() <= tolerance * largest):
                return False
    return True


def _record_sums(sums: OutputSums, kept: Tensor, module: Any, args: object, output: object) -> None:
    if not isinstance(output, Tensor) or output.dtype != torch.float64:
        return
    dim = output.dim() - 1 - (len(module.kernel_size) if isinstance(module, _Conv) else 0)
    if dim < 0:  # a subclass with another output shape
        return
    if output.shape[dim] == len(kept):  # not pruned yet
        output = output.index_select(dim, kept.nonzero().flatten().to(output.device))
    rows = output.movedim(dim, 0)[:, None].flatten(1)
    weights = torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)
    sums.append(_CallSums(output.shape, rows @ weights))
