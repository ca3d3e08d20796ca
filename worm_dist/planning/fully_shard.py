"""FSDP plan: the collectives of a step under torch's ``fully_shard`` over a number of ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..backends.optimizer_view import Shard
from ..comm_hooks.fsdp_rows import PackedRows, is_any_frozen, pieces_of
from ..groups.freeze_plan import Block
from ..training.fully_sharded import modules_to_shard
from ..truncation.memory import TruncationMemory
from .module_order import Event, innermost
from .step_time import Collective, in_backward, in_forward
from .wrapped import LeftOut, ShardsOf, meta_shard

__all__ = ["FullyShard"]

_ROOT = ""
_FP32, _INT64 = 4, 8


class FullyShard:
    """A network as ``train`` shards it: modules of at least a size, and the network itself.

    Weights of such a module are gathered for both passes, one module ahead; those that are left
    over are gathered once, because torch keeps them from the forward to the backward pass.

    Args:
        network: the dense network, with its gates.
        unit_bytes: the size from which on modules are sharded by themselves.
        world_size: number of ranks, two or more.

    Attributes:
        units: names of the modules that are sharded, the network itself last.
    """

    def __init__(self, network: nn.Module, unit_bytes: int, world_size: int) -> None:
        names = {module: name for name, module in network.named_modules()}
        self.units = [*(names[m] for m in modules_to_shard(network, unit_bytes)), _ROOT]
        self._world_size = world_size

    def parameters_of(self, network: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        """The parameters that each unit of a network has, dense or drawn; empty ones are left
        out."""
        found: dict[str, list[nn.Parameter]] = {unit: [] for unit in self.units}
        for name, parameter in network.named_parameters():
            found[innermost(name, self.units)].append(parameter)
        return {unit: parameters for unit, parameters in found.items() if parameters}

    def collectives(self, left_out: LeftOut, order: Sequence[Event]) -> list[Collective]:
        """See ``Wrapped``."""
        parameters = self.parameters_of(left_out.network)
        spans = _spans(order, parameters)
        inner = [unit for unit in spans if unit != _ROOT]
        weights = {unit: self._gathered(here, left_out) for unit, here in parameters.items()}
        found = []
        if _ROOT in parameters:
            found.append(Collective("all-gather", weights[_ROOT], 0.0, 0.0))
        ready = 0.0
        for unit in inner:
            begin = in_forward(spans[unit][0])
            found.append(Collective("all-gather", weights[unit], ready, begin))
            ready = begin
        ready = in_forward(1.0)
        for unit in reversed(inner):
            begin, end = (in_backward(1 - share) for share in reversed(spans[unit]))
            found.append(Collective("all-gather", weights[unit], ready, begin))
            ready = begin
            found.append(self._reduction(parameters[unit], left_out, end))
        if _ROOT in parameters:
            found.append(self._reduction(parameters[_ROOT], left_out, 1.0))
        return found

    def shards_of(self, network: nn.Module) -> ShardsOf:
        """See ``Wrapped``."""

        def rows_of(parameter: Tensor) -> tuple[Shard, ...]:
            num_rows = min(-(-len(parameter) // self._world_size), len(parameter))
            return (meta_shard(parameter, torch.Size((num_rows, *parameter.shape[1:]))),)

        return rows_of

    def packing(self, left_out: LeftOut) -> TruncationMemory | None:
        """See ``Wrapped``: units lend memory to one another, indices are each one's own."""
        buffers = indices = 0
        for blocks in (left_out.gradients, left_out.unread):
            units = self.parameters_of(left_out.network).values()
            rows = [here for unit in units if (here := self._rows(unit, blocks)) is not None]
            buffers += max((each.lent_size for each in rows), default=0) * _FP32
            indices += sum(each.num_indices for each in rows) * _INT64
        return TruncationMemory(buffers=buffers, indices=indices)

    def gathered_bytes(self, network: nn.Module, order: Sequence[Event]) -> int:
        """See ``Wrapped``: the root's, and those of a unit and of the one ahead."""
        parameters = self.parameters_of(network)
        sizes = {unit: sum(p.nbytes for p in here) for unit, here in parameters.items()}
        root = sizes.pop(_ROOT, 0)
        inner = [sizes[unit] for unit in _spans(order, sizes)]
        return root + max(map(sum, zip(inner, [*inner[1:], 0])), default=0)

    def _reduction(
        self, parameters: Sequence[nn.Parameter], left_out: LeftOut, ready: float
    ) -> Collective:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        num_bytes = 0
        if trained:
            rows = self._rows(trained, left_out.gradients)
            row_size = pieces_of([p.shape for p in trained], self._world_size)[1]
            reduced = self._world_size * row_size if rows is None else rows.shares.num_reduced
            num_bytes = reduced * trained[0].element_size()
        return Collective("reduce-scatter", num_bytes, ready)

    def _gathered(self, parameters: Sequence[nn.Parameter], left_out: LeftOut) -> int:
        """Bytes that a rank hands over to gather a unit's weights."""
        rows = self._rows(parameters, left_out.unread)
        row_size = pieces_of([p.shape for p in parameters], self._world_size)[1]
        num_elements = row_size if rows is None else rows.shares.num_gathered
        return num_elements * parameters[0].element_size()

    def _rows(
        self, parameters: Sequence[nn.Parameter], blocks: Mapping[Tensor, Block]
    ) -> PackedRows | None:
        """The ranks' rows of parameters of one dtype; None if all of these is sent."""
        if not is_any_frozen(blocks, parameters):
            return None
        shapes, num_ranks = [p.shape for p in parameters], self._world_size
        row_size = pieces_of(shapes, num_ranks)[1]
        row = torch.empty(row_size, dtype=parameters[0].dtype, device="meta")
        here = [blocks.get(parameter) for parameter in parameters]
        return PackedRows(shapes, here, row, 0, num_ranks)


def _spans(order: Sequence[Event], parameters: Collection[str]) -> dict[str, tuple[float, float]]:
    """When the forward pass is in each unit, in the order in which it comes to them."""
    spans: dict[str, tuple[float, float]] = {}
    for event in order:
        if event.module in parameters:
            begin, _ = spans.get(event.module, (event.done, event.done))
            spans[event.module] = begin, event.done
    # Those that only training mode calls, such as auxiliary heads, come last.
    return spans | {unit: (1.0, 1.0) for unit in parameters if unit not in spans}
