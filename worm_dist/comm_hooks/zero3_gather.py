"""ZeRO-3 gather: the all-gather of weights without slices that no output depends on.

Stage 3 gathers the weights of a layer before its passes, and small weights after a step.  Once a
channel's scale and shift are exactly zero, and no column that reads it has had a gradient, its
filters and the columns that read it have no effect, neither on outputs nor on other gradients.
So they are not sent: the weights that a layer is given have zeros there.  The stored weights and
the master weights keep their values.

The ranks' numbers of such elements differ; how they are sent is described in ``shares``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..groups.freeze_plan import FreezePlan
from ..groups.full_shape import full_numel, full_shape
from .packing import Packing
from .patching import Patch
from .reducer import Reducer
from .shares import Shares
from .zero3_parts import live_sections, packing_of_parts, part_of

__all__ = ["Zero3Gather"]


class Zero3Gather:
    """Gathers the weights of one DeepSpeed optimizer, and counts the bytes.

    Args:
        wrapper: the ``DeepSpeedZeroOptimizer_Stage3``.
        counter: the reducer whose byte counters are increased, in training mode.
    """

    def __init__(self, wrapper: Any, counter: Reducer) -> None:
        self._wrapper = wrapper
        self._counter = counter
        self._unread: FreezePlan | None = None
        self._layouts: dict[tuple[int, ...], _Layout] = {}
        # Any one of the parameters is asked to gather several.
        self._patches = [self._coalesced(parameter) for parameter in wrapper.param_names]
        self._post_step = Patch(wrapper, "_post_step", self._after_step)

    def set_unread(self, unread: FreezePlan | None) -> None:
        """Leave these slices out from the next gather on."""
        if unread is not self._unread:
            self._release()
        self._unread = unread
        self._layouts.clear()

    def remove(self) -> None:
        """Restore DeepSpeed's own gathers."""
        for patch in self._patches:
            patch.remove()
        self._post_step.remove()
        self._release()
        self._layouts.clear()

    def _release(self) -> None:
        """Release weights that were gathered with zeros, such as small ones, which DeepSpeed keeps
        gathered; the next read gathers them in full."""
        # A draw has emptied the optimizer of the engine before.
        offload = getattr(self._wrapper, "parameter_offload", None)
        if self._layouts and offload is not None:
            offload.partition_all_parameters()

    def _coalesced(self, parameter: Any) -> Patch:
        """Replace a parameter's ``all_gather_coalesced``, which starts to gather several
        parameters and returns a handle to wait for them."""

        def start(parameters: Iterable[Any], **keywords: Any) -> Any:
            parameters = list(parameters)
            handle = self._start(parameters)
            return patch.original(parameters, **keywords) if handle is None else handle

        patch = Patch(parameter, "all_gather_coalesced", start)
        return patch

    def _after_step(self, *arguments: Any) -> None:
        """Replacement of ``_post_step``, which gathers the persistent parameters."""
        persistent = self._wrapper.persistent_parameters
        if not persistent:
            self._post_step.original(*arguments)
            return

        def gather(param_list: Sequence[Any]) -> None:
            missing = [p for p in param_list if p.ds_status.name == "NOT_AVAILABLE"]
            handle = self._start(missing)
            if handle is None:
                taken.original(param_list)
            else:
                handle.wait()

        taken = Patch(persistent[0], "all_gather", gather)
        try:
            self._post_step.original(*arguments)
        finally:
            taken.remove()

    def _start(self, parameters: Sequence[Any]) -> _Handle | None:
        """Start to gather, unless these parameters are sent in full; counts in both cases."""
        group = parameters[0].ds_process_group if parameters else None
        if not parameters or dist.get_world_size(group) == 1:
            return None
        dense_bytes = sum(p.ds_tensor.ds_numel * p.ds_tensor.element_size() for p in parameters)
        blocks = {} if self._unread is None else self._unread.blocks
        if blocks.keys().isdisjoint(parameters):
            self._count(dense_bytes, dense_bytes)
            return None
        kinds: dict[torch.dtype, list[Any]] = {}
        for parameter in sorted(parameters, key=lambda p: p.ds_id):  # the same order on all ranks
            kinds.setdefault(parameter.ds_tensor.dtype, []).append(parameter)
        layouts = [self._layout(alike, group) for alike in kinds.values()]
        self._count(sum(layout.sent_bytes for layout in layouts), dense_bytes)
        return _Handle(layouts)

    def _count(self, sent_bytes: int, dense_bytes: int) -> None:
        if self._wrapper.module.training:  # an evaluation is no part of a step
            self._counter.sent_bytes += sent_bytes
            self._counter.dense_bytes += dense_bytes

    def _layout(self, parameters: Sequence[Any], group: Any) -> _Layout:
        key = tuple(map(id, parameters))
        if key not in self._layouts:
            assert self._unread is not None
            self._layouts[key] = _Layout(parameters, self._unread, group)
        return self._layouts[key]


class _Handle:
    """Gathers that have been started; DeepSpeed waits once for each parameter.

    Args:
        layouts: of the parameters of each dtype.
    """

    def __init__(self, layouts: Sequence[_Layout]) -> None:
        self._started = [(layout, *layout.start()) for layout in layouts]

    def wait(self, handle_dependency: bool = True) -> None:
        """Wait, and give the parameters their full weights."""
        started, self._started = self._started, []
        for layout, shares, work in started:
            if work is not None:
                work.wait()
            layout.finish(shares)


class _Layout:
    """The elements of a few parameters that are sent, and whose they are.

    Args:
        parameters: parameters of one dtype.
        unread: the slices that are not sent.
        group: the process group.

    Attributes:
        sent_bytes: bytes that a rank hands over, averaged over the ranks; comparable to the bytes
            of its parts.
    """

    def __init__(self, parameters: Sequence[Any], unread: FreezePlan, group: Any) -> None:
        self._parameters = parameters
        self._group = group
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        like = parameters[0].ds_tensor.new_empty(0)
        self._like = like
        blocks = [unread.blocks.get(parameter) for parameter in parameters]
        sizes = [full_numel(parameter) for parameter in parameters]
        self._sections = [
            live_sections(block, size, world_size)
            for block, size in zip(blocks, sizes, strict=True)
        ]
        shares = [sum(of_rank) for of_rank in zip(*self._sections, strict=True)]
        self._shares = Shares(shares, like.element_size(), rank)
        self.sent_bytes = self._shares.num_gathered * like.element_size()
        spans = [part_of(size, world_size, rank) for size in sizes]
        self._part_sizes = [num_elements for _, num_elements in spans]
        self._own = packing_of_parts(blocks, spans, like)
        self._full = [
            None if block is None else Packing([block], [like.new_empty(full_shape(p))], like)
            for p, block in zip(parameters, blocks, strict=True)
        ]

    def start(self) -> tuple[Sequence[Tensor], dist.Work | None]:
        """Send this rank's elements.  Collective.

        Returns:
            What will be each rank's elements, and what to wait for.
        """
        for parameter in self._parameters:
            assert parameter.ds_status.name == "NOT_AVAILABLE", parameter.ds_summary()
            parameter.ds_status = type(parameter.ds_status).INFLIGHT
        bucket = torch.cat(
            [
                parameter.ds_tensor.detach()[:size]
                for parameter, size in zip(self._parameters, self._part_sizes, strict=True)
            ]
        )
        own = self._like.new_empty(self._own.num_live)
        self._own.pack(bucket, own)
        received = self._like.new_empty(self._shares.num_elements)
        shares = self._shares.of_ranks(received)
        if not received.numel():
            return shares, None
        return shares, self._shares.all_gather(own, received, self._group)

    @torch.no_grad()
    def finish(self, shares: Sequence[Tensor]) -> None:
        """Give the parameters their full weights, with zeros for what has not been sent."""
        offsets = [0] * len(shares)
        for parameter, sections, packing in zip(self._parameters, self._sections, self._full):
            pieces = []
            for rank, size in enumerate(sections):
                pieces.append(shares[rank][offsets[rank] : offsets[rank] + size])
                offsets[rank] += size
            full = torch.cat(pieces)
            if packing is not None:
                live, full = full, self._like.new_empty(full_numel(parameter))
                packing.unpack(full, live)
            parameter.data = full.view(full_shape(parameter))
            parameter.ds_status = type(parameter.ds_status).AVAILABLE
