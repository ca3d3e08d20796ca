"""Whole buckets: the alternative to packing, to compare with: zeros in frozen slices, all sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from ..comm_hooks.allreduce import BucketView
from ..comm_hooks.ddp_hook import PackedReducer
from ..comm_hooks.packing import with_parameter_strides
from ..comm_hooks.wide_rows import row_writer
from ..engine.attachment import context_of
from ..engine.engine import Engine
from ..groups.freeze_plan import FreezePlan

__all__ = ["send_whole"]

_SMALL = 2**15
"""Elements of a gradient whose frozen ones are set to zero by an index over the bucket."""


def send_whole(engine: Engine) -> None:
    """Let an engine under DDP that has frozen channels send whole buckets from now on."""
    reducer = context_of(engine).reduction.require_reducer()
    assert isinstance(reducer, PackedReducer)
    vars(reducer)["bucket_view"] = _WholeBuckets(reducer).view


class _WholeBuckets:
    """Makes the views of whole buckets.

    Args:
        reducer: the reducer.
    """

    def __init__(self, reducer: PackedReducer) -> None:
        self._reducer = reducer
        self._plan: FreezePlan | None = None
        self._writers: dict[tuple[int, ...], list[Callable[[], object]]] = {}

    def view(self, bucket: GradBucket) -> BucketView:
        """The view of a bucket, whose frozen slices become zero."""
        parameters, full, plan = bucket.parameters(), bucket.buffer(), self._reducer.plan
        assert plan is not None
        if plan is not self._plan:
            self._plan, self._writers = plan, {}
        key = (full.data_ptr(), *map(id, parameters))
        if key not in self._writers:
            gradients = list(map(with_parameter_strides, parameters, bucket.gradients()))
            self._writers[key] = _zero_writers(plan, parameters, gradients, full)
        for write in self._writers[key]:
            write()
        return BucketView(
            key, bucket.is_last(), plan, parameters, full, bucket.gradients, None, full
        )


def _zero_writers(
    plan: FreezePlan, parameters: Sequence[Tensor], gradients: Sequence[Tensor], bucket: Tensor
) -> list[Callable[[], object]]:
    """Functions that set the frozen slices of a bucket to zero."""
    writers: list[Callable[[], object]] = []
    indices: list[Tensor] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        block = plan.blocks.get(parameter)
        if block is not None and gradient.numel() < _SMALL:
            begin = gradient.storage_offset() - bucket.storage_offset()
            indices.append(block.frozen_elements(gradient.stride()) + begin)
        elif block is not None:
            for dim, frozen in block.frozen.items():
                if dim == 0:
                    writers.append(row_writer(gradient, frozen, None))
                else:
                    writers.append(partial(gradient.index_fill_, dim, frozen, 0))
    if indices:
        writers.append(partial(bucket.index_fill_, 0, torch.cat(indices), 0))
    return writers
