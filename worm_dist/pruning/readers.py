"""Readers: what the layers put out that read channels which are dropped.

Where nothing passes a threshold further on, a network's outputs say nothing of what has become of
its channels; the layers that read them do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..groups.channel_groups import ChannelGroup
from ..search.mask import Mask

__all__ = ["Heard", "Readers", "alike"]

_Conv = nn.modules.conv._ConvNd
_TOLERANCE = 1e-9
"""Of the largest number."""
_SMALL = 1e-3
"""What is far smaller than this may be nothing but rounding."""


class _Sums(NamedTuple):
    """Of one call, of what was put out.

    Attributes:
        shape: its shape, without channels that are dropped.
        of_channels: for each of these a weighted sum; the tensors themselves would be as large as
            what training keeps.
    """

    shape: torch.Size
    of_channels: Tensor


Heard: TypeAlias = list[_Sums]


class Readers:
    """Convolutions and linear layers that read the channels of some groups.

    Args:
        network: whole.
        dropping: these groups.
        groups: all of the network; some make the channels that readers put out.
        mask: of these groups.
    """

    def __init__(
        self,
        network: nn.Module,
        dropping: Sequence[ChannelGroup],
        groups: Sequence[ChannelGroup],
        mask: Mask,
    ) -> None:
        # By name, which of the channels that it puts out are kept.
        self._kept: dict[str, Tensor] = {}
        for member in (member for group in dropping for member in group.consumers):
            reader = network.get_submodule(member.module)
            if isinstance(reader, nn.Linear):
                self._kept[member.module] = torch.ones(reader.out_features, dtype=torch.bool)
            elif isinstance(reader, _Conv):
                self._kept[member.module] = torch.ones(reader.out_channels, dtype=torch.bool)
        for group in groups:
            for member in group.members:
                if member.role == "producer" and member.module in self._kept:
                    places = member.positions[~mask[group.name]].flatten()
                    self._kept[member.module][places] = False

    @contextmanager
    def heard(self, sums: Heard, network: nn.Module) -> Iterator[None]:
        """Within, what the readers put out is added to the list; in double precision only, as no
        other tells rounding from everything else.

        Args:
            sums: the list.
            network: this one, a copy of it, or what the mask leaves of it.
        """
        handles = [
            network.get_submodule(name).register_forward_hook(partial(_listen, sums, kept))
            for name, kept in self._kept.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def alike(whole: Heard, drawn: Heard) -> bool:
    """Whether the readers of the whole network and of what is left of it have put out the same.

    Calls of which the shapes differ say nothing: other channels may lie where a layer has its
    batch.  Nor does what is not finite, as where all is masked that an attention could look at.
    """
    if len(whole) != len(drawn):
        return True
    for one, other in zip(whole, drawn):
        if one.shape == other.shape and one.shape.numel() and one.of_channels.isfinite().all():
            largest = max(float(one.of_channels.abs().max()), _SMALL)
            # Written so that a NaN counts as a difference.
            if not bool((one.of_channels - other.of_channels).abs().max() <= _TOLERANCE * largest):
                return False
    return True


def _listen(sums: Heard, kept: Tensor, module: Any, args: object, output: object) -> None:
    if not isinstance(output, Tensor) or output.dtype != torch.float64:
        return
    dim = output.dim() - 1 - (len(module.kernel_size) if isinstance(module, _Conv) else 0)
    if dim < 0:  # a layer of its own kind
        return
    if output.shape[dim] == len(kept):  # nothing has been cut yet
        output = output.index_select(dim, kept.nonzero().flatten().to(output.device))
    rows = output.movedim(dim, 0)[:, None].flatten(1)
    weights = torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)
    sums.append(_Sums(output.shape, rows @ weights))
