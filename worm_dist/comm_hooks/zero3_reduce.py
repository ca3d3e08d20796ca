"""ZeRO-3 reduction: the reduce-scatter of gradients without frozen slices.

DeepSpeed cuts every flattened gradient into one part for each rank, and reduces all first parts to
the first rank, all second parts to the second one, and so on, by one collective for a bucket.  Here
each rank's share of the collective is the live elements of its parts.  The ranks' shares differ;
how they are sent is described in ``shares``.

DeepSpeed's own functions are called with the packed elements, so scaling, precision and process
groups follow its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..groups.freeze_plan import Block, FreezePlan
from .packing import Packing
from .patching import Patch
from .reducer import Reducer
from .shares import Shares
from .zero3_gather import Zero3Gather
from .zero3_parts import live_sections, packing_of_parts, part_of, part_size

__all__ = ["Zero3Reducer"]

_AVERAGE = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


class Zero3Reducer(Reducer):
    """Packs the gradients that DeepSpeed's stage 3 reduces, and the weights it gathers.

    Args:
        wrapper: the ``DeepSpeedZeroOptimizer_Stage3``, patched until ``remove``.
    """

    def __init__(self, wrapper: Any) -> None:
        from deepspeed.runtime.zero import stage3

        super().__init__()
        self._module = stage3
        self._layouts: dict[tuple[object, ...], _Layout | None] = {}
        # DeepSpeed calls a function of its module, the same for every engine of the process; so it
        # is patched only while this optimizer reduces.
        self._average = Patch(wrapper, _AVERAGE, self._averaged)
        self._gather = Zero3Gather(wrapper, self)

    def _follow(self, plan: FreezePlan, held: FreezePlan, fading: Collection[Tensor]) -> None:
        self._layouts.clear()
        self._gather.set_unread(self.unread)

    def remove(self) -> None:
        super().remove()
        self._average.remove()
        self._gather.remove()
        self._layouts.clear()

    def _averaged(self, parameters: Sequence[Tensor], *arguments: Any) -> Any:
        """Replacement of ``__avg_scatter_grads``; the parameters' gradients are full."""

        def reduce(gradients: Sequence[Tensor], group: Any = None) -> list[Tensor]:
            return self._reduced(parameters, gradients, group, taken.original)

        taken = Patch(self._module, "reduce_scatter_coalesced", reduce)
        try:
            return self._average.original(parameters, *arguments)
        finally:
            taken.remove()

    def _reduced(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        group: Any,
        reduce: Callable[..., list[Tensor]],
    ) -> list[Tensor]:
        """This rank's part of every gradient, averaged, with zeros for frozen slices."""
        self.probe_bucket(zip(parameters, gradients, strict=True))
        size, world_size = gradients[0].element_size(), dist.get_world_size(group)
        padded = sum(part_size(g.numel(), world_size) * world_size for g in gradients)
        self.dense_bytes += size * padded
        layout = self._layout(parameters, gradients, group)
        if layout is None:
            self.sent_bytes += size * padded
            return reduce(gradients, group)
        self.sent_bytes += size * layout.num_sent
        return layout.unpacked(layout.reduced(gradients, reduce))

    def _layout(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], group: Any
    ) -> _Layout | None:
        """The layout of this bucket, cached; None if all of it is live."""
        key = (gradients[0].dtype, group, *map(id, parameters))
        if key not in self._layouts:
            blocks = [self.plan.blocks.get(p) if self.plan else None for p in parameters]
            self._layouts[key] = _Layout(blocks, gradients, group) if any(blocks) else None
        return self._layouts[key]


class _Layout:
    """Where the live elements of a bucket's gradients are, and whose they are.

    Args:
        blocks: the live and frozen slices of each gradient; None if all of it is live.
        gradients: the gradients.
        group: the process group.

    Attributes:
        num_sent: number of elements that a rank hands over, averaged over the ranks.
    """

    def __init__(
        self, blocks: Sequence[Block | None], gradients: Sequence[Tensor], group: Any
    ) -> None:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        sizes = [gradient.numel() for gradient in gradients]
        like = gradients[0].new_empty(0)
        self._dtype, self._device = like.dtype, like.device
        pieces = like.new_empty(sum(sizes)).split(sizes)
        views = [piece.view(g.shape) for piece, g in zip(pieces, gradients, strict=True)]
        self._packing = Packing(blocks, views, like)
        # The live elements of a gradient keep their order, so each rank's are a section of them.
        self._sections = [
            live_sections(block, size, world_size)
            for block, size in zip(blocks, sizes, strict=True)
        ]
        shares = [sum(of_rank) for of_rank in zip(*self._sections, strict=True)]
        self._shares, self._group = Shares(shares, like.element_size(), rank), group
        self.num_sent = self._shares.num_reduced
        spans = [part_of(size, world_size, rank) for size in sizes]
        self._part_sizes = [num_elements for _, num_elements in spans]
        self._own = packing_of_parts(blocks, spans, like)

    def reduced(
        self, gradients: Sequence[Tensor], reduce_scatter: Callable[..., list[Tensor]]
    ) -> Tensor:
        """This rank's averaged live elements.  Collective.

        Args:
            gradients: the gradients.
            reduce_scatter: DeepSpeed's function, which also divides by the number of ranks.
        """
        packed = self._packed(gradients)
        if not packed.numel():  # no live element on any rank: the plan is the same
            return packed
        (chunk,) = reduce_scatter([packed], self._group)
        return self._shares.to_owners(chunk, self._group)

    def _packed(self, gradients: Sequence[Tensor]) -> Tensor:
        """All ranks' live elements."""
        bucket = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._packing.pack(bucket)
        packed = bucket.new_empty(self._shares.num_elements)
        del bucket
        parts = zip(self._packing.parts, self._sections, strict=True)
        by_rank = zip(*(part.reshape(-1).split(sections) for part, sections in parts))
        for share, pieces in zip(self._shares.of_ranks(packed), by_rank, strict=True):
            torch.cat(pieces, out=share)
        self._shares.clear_padding(packed)
        return packed

    def unpacked(self, own: Tensor) -> list[Tensor]:
        """This rank's part of every gradient.

        Args:
            own: this rank's averaged live elements.
        """
        flat = torch.empty(sum(self._part_sizes), dtype=self._dtype, device=self._device)
        self._own.unpack(flat, own)
        return list(flat.split(self._part_sizes))
