"""DeepSpeed reduction: gradient reduction without frozen slices, ZeRO stages 0 to 2.

DeepSpeed's own functions are called with the packed elements instead of a full bucket, so scaling,
precision and process groups follow its settings.  Packing, reduction and unpacking run in order on
the stream that DeepSpeed has chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..groups.freeze_plan import FreezePlan
from .deepspeed_allgather import PackedGather, ShardsOf
from .packing import Packing
from .patching import Patch
from .reducer import Reducer

__all__ = ["DeepSpeedReducer"]

Spans = tuple["Span", ...]


@dataclass(frozen=True, eq=False)
class Span:
    """Consecutive elements of one parameter's gradient; a partition may begin within it.

    Attributes:
        parameter: the parameter.
        begin: index of the first element in the flattened gradient.
        num_elements: number of elements.
    """

    parameter: Tensor
    begin: int
    num_elements: int

    @property
    def shape(self) -> torch.Size:
        is_complete = self.num_elements == self.parameter.numel()
        return self.parameter.shape if is_complete else torch.Size((self.num_elements,))

    @property
    def key(self) -> tuple[int, int, int]:
        return id(self.parameter), self.begin, self.num_elements


class DeepSpeedReducer(Reducer):
    """Packs the gradients that DeepSpeed reduces, and in stages 1 and 2 the weights it gathers.

    Args:
        engine: the ``DeepSpeedEngine`` whose reduction points are patched until ``remove``.
        stage: the stage of ZeRO.
        shards_of: returns the shards of a rank's partition.
    """

    def __init__(self, engine: Any, stage: int, shards_of: ShardsOf) -> None:
        super().__init__()
        self._packings: dict[tuple[object, ...], Packing | None] = {}
        self._gather: PackedGather | None = None
        self._bucket: tuple[Tensor, Spans] | None = None
        self._bucket_is_probed = False
        wrapper = engine.optimizer
        self._wrapper = wrapper
        self._patches: list[Patch] = []
        if stage == 0:
            self._engine = engine
            self._patch(engine, "allreduce_and_copy", self._allreduce_and_copy)
            return
        self._patch(wrapper, "average_tensor", self._average_tensor)
        if wrapper.reduce_scatter:
            self._patch(wrapper, "allreduce_bucket", self._allreduce_bucket)
        else:
            self._patch(wrapper, "gradient_reduction_w_predivide", self._gradient_reduction)
        self._gather = PackedGather(wrapper, self, shards_of)

    def _patch(self, target: Any, name: str, function: Callable[..., Any]) -> None:
        patch = Patch(target, name, lambda *a, **k: function(patch.original, *a, **k))
        self._patches.append(patch)

    def _follow(self, plan: FreezePlan, held: FreezePlan, fading: Collection[Tensor]) -> None:
        self._packings.clear()
        # Columns whose gradients are not reduced are not held: weight decay still changes them on
        # the rank that steps them, so they must be gathered.
        if self._gather is not None:
            self._gather.set_plan(held, fading)

    def remove(self) -> None:
        super().remove()
        for patch in self._patches:
            patch.remove()
        if self._gather is not None:
            self._gather.remove()
        self._packings.clear()

    # ---- stage 0 ---------------------------------------------------------------------------------

    def _allreduce_and_copy(
        self, original: Callable[..., None], small_bucket: list[Tensor], *arguments: Any
    ) -> None:
        """Replacement of ``allreduce_and_copy``; a bucket is a list of full gradients."""
        parameters = {
            p.grad.data_ptr(): p for p in self._engine.module.parameters() if p.grad is not None
        }
        spans = tuple(
            Span(parameters[g.data_ptr()], 0, g.numel()) for g in small_bucket if g.numel()
        )
        gradients = [gradient for gradient in small_bucket if gradient.numel()]
        element_size = self._engine.communication_data_type.itemsize

        def reduce(elements: Tensor) -> None:
            original([elements], *arguments)

        self.probe_bucket(zip((span.parameter for span in spans), gradients))
        flat = torch.cat([gradient.flatten() for gradient in gradients]) if gradients else None
        if flat is not None and self._reduced(spans, flat, element_size, reduce):
            torch._foreach_copy_(gradients, _pieces(flat, spans))
        else:
            original(small_bucket, *arguments)

    # ---- stages 1 and 2 --------------------------------------------------------------------------

    def _average_tensor(
        self, original: Callable[..., None], tensor: Tensor, communication_data_type: torch.dtype
    ) -> None:
        """Note which parameters' gradients are concatenated in the tensor that is averaged."""
        indices = self._wrapper.ipg_buckets[communication_data_type].params
        parameters = [self._wrapper.bit16_groups[group][index] for group, index, _ in indices]
        self._bucket = tensor, tuple(Span(p, 0, p.numel()) for p in parameters)
        self._bucket_is_probed = False
        original(tensor, communication_data_type)
        self._bucket = None

    def _gradient_reduction(
        self, original: Callable[..., Tensor], tensor: Tensor, communication_data_type: torch.dtype
    ) -> Tensor:
        """Reduction without reduce_scatter: the full tensor at once."""
        _, spans = self._probed_bucket()
        rounded = tensor.to(communication_data_type)

        def reduce(elements: Tensor) -> None:
            _write(original(elements, communication_data_type), elements)

        if not self._reduced(spans, rounded, rounded.element_size(), reduce):
            return original(tensor, communication_data_type)
        if rounded is not tensor:
            tensor.copy_(rounded)
        return rounded

    def _allreduce_bucket(
        self,
        original: Callable[..., Tensor],
        bucket: list[Tensor],
        communication_data_type: torch.dtype,
        **keywords: Any,
    ) -> Tensor:
        """Reduction with reduce_scatter: slices of the tensor, each in one rank's partition,
        reduced on all ranks or only to that rank."""
        tensor, all_spans = self._probed_bucket()
        spans = tuple(
            span
            for part in bucket
            for span in _within(
                all_spans, int(part.storage_offset() - tensor.storage_offset()), part.numel()
            )
        )
        flat: Tensor = self._wrapper.flatten(bucket)
        rounded = flat.to(communication_data_type)

        def reduce(elements: Tensor) -> None:
            _write(original([elements], communication_data_type, **keywords), elements)

        if not self._reduced(spans, rounded, rounded.element_size(), reduce):
            return original(bucket, communication_data_type, **keywords)
        return rounded

    def _probed_bucket(self) -> tuple[Tensor, Spans]:
        """The bucket that is being reduced, probed once although its slices are reduced one by
        one."""
        assert self._bucket is not None
        tensor, spans = self._bucket
        if not self._bucket_is_probed:
            self._bucket_is_probed = True
            self.probe_bucket(zip((span.parameter for span in spans), _pieces(tensor, spans)))
        return self._bucket

    # ---- all stages ------------------------------------------------------------------------------

    def _reduced(
        self,
        spans: Spans,
        flat: Tensor,
        element_size: int,
        reduce: Callable[[Tensor], None],
    ) -> bool:
        """Reduce the live elements of the spans' gradients, which are concatenated in ``flat``, and
        write them back, with zeros for frozen slices.

        Returns:
            False if all elements are live: then nothing was done.
        """
        self.dense_bytes += element_size * sum(span.num_elements for span in spans)
        packing = self._packing(spans, flat)
        if packing is None:
            self.sent_bytes += element_size * sum(span.num_elements for span in spans)
            return False
        if packing.buffer.numel():  # else no live element on any rank: the plan is the same
            packing.pack(flat)
            reduce(packing.buffer)
            self.sent_bytes += element_size * packing.buffer.numel()
        packing.unpack(flat)
        return True

    def _packing(self, spans: Spans, flat: Tensor) -> Packing | None:
        """The packing of these spans, cached; None if all of them are live."""
        key = (flat.dtype, *(span.key for span in spans))
        if key not in self._packings:
            blocks = [self.plan.blocks.get(span.parameter) if self.plan else None for span in spans]
            self._packings[key] = None
            if any(blocks):
                parts = [
                    block.part(span.begin, span.num_elements) if block is not None else None
                    for span, block in zip(spans, blocks, strict=True)
                ]
                self._packings[key] = Packing(parts, _pieces(flat, spans), flat)
        return self._packings[key]


def _pieces(flat: Tensor, spans: Spans) -> list[Tensor]:
    parts = flat.split([span.num_elements for span in spans])
    return [part.view(span.shape) for part, span in zip(parts, spans, strict=True)]


def _write(result: Tensor, elements: Tensor) -> None:
    """DeepSpeed may have averaged the elements in place or in a copy."""
    if result.data_ptr() != elements.data_ptr():
        elements.copy_(result)


def _within(spans: Spans, begin: int, num_elements: int) -> list[Span]:
    """The parts of concatenated spans that a slice covers.

    Args:
        spans: the concatenated spans.
        begin: index of the slice's first element in the concatenation.
        num_elements: number of elements of the slice.
    """
    covered, offset, end = [], 0, begin + num_elements
    for span in spans:
        first, last = max(offset, begin), min(offset + span.num_elements, end)
        if first < last:
            covered.append(Span(span.parameter, span.begin + first - offset, last - first))
        offset += span.num_elements
    return covered
