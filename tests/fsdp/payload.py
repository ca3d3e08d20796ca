"""Payload: how many bytes a step may send, counted from flags; and what was really handed over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tests.fsdp.row import Row
from tests.handed_over import BYTES_OF_A_COLLECTIVE, handed_over, num_exchanged

__all__ = ["Overheard", "expected_bytes"]


class Overheard:
    """Counts the bytes that are handed to torch's collectives of shards, and over replicas.

    Args:
        replicas: the process group of the replicas of this rank's shards, if there are any.
    """

    def __init__(self, replicas: dist.ProcessGroup | None) -> None:
        self._replicas = replicas
        self._num_bytes = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, position in {
                "reduce_scatter_single": 1,
                "all_gather_single": 1,
                "all_to_all_single": 1,
                "all_reduce": 0,
            }.items():
                patch.setattr(dist, name, self._counting(getattr(dist, name), name, position))
            yield

    def take(self) -> int:
        taken, self._num_bytes = self._num_bytes, 0
        return taken

    def _counting(self, function: Callable[..., Any], name: str, position: int) -> Any:
        @functools.wraps(function)
        def counting(*arguments: Any, **keywords: Any) -> Any:
            named = {"reduce_scatter_single": "input", "all_gather_single": "input_tensor"}
            sent = arguments[position] if len(arguments) > position else keywords.get(named[name])
            assert isinstance(sent, Tensor), (name, keywords)
            if name == "all_to_all_single":
                rank = dist.get_rank(keywords["group"])
                self._num_bytes += num_exchanged(rank, arguments[3]) * sent.element_size()
            # The engine's own all-reduces are over all ranks.
            elif name != "all_reduce" or keywords["group"] == self._replicas:
                self._num_bytes += sent.nbytes
            return function(*arguments, **keywords)

        return counting


def expected_bytes(
    row: Row,
    network: nn.Module,
    reduced: Mapping[str, Tensor] | None,
    gathered: Mapping[str, Tensor] | None,
) -> tuple[int, int]:
    """Bytes that this rank hands over in a step, and all do on average.

    Args:
        reduced: for every parameter, which of its elements' gradients are sent; None for all.
        gathered: for every parameter, which of its elements are gathered; None for all.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    total = on_average = 0
    for module in network.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            shapes = {names[id(p.sharded_param)]: p._orig_size for p in group.fsdp_params}
            num_gathers = 2 if _reshards(row, module is network) else 1
            weight = (row.param_dtype or next(network.parameters()).dtype).itemsize
            gradient = row.reduce_dtype or row.param_dtype or next(network.parameters()).dtype
            weights = _sent(row, shapes, gathered, weight, group.mesh_info, False)
            gradients = _sent(row, shapes, reduced, gradient.itemsize, group.mesh_info, True)
            num_gathers *= row.passes
            num_reductions = row.passes if row.partial else 1
            replicas = 0
            if len(row.mesh) == 2:
                replicas = _own(row, shapes, reduced) * gradient.itemsize
            total += num_gathers * weights[0] + num_reductions * gradients[0] + replicas
            on_average += num_gathers * weights[1] + num_reductions * gradients[1] + replicas
    return total, on_average


def _reshards(row: Row, is_root: bool) -> bool:
    return not is_root if row.reshard is None else row.reshard


def _own(row: Row, shapes: Mapping[str, Any], flags: Mapping[str, Tensor] | None) -> int:
    """Elements of this rank's shards that are averaged over replicas."""
    number, num_ranks = dist.get_rank() % row.mesh[-1], row.mesh[-1]
    most = {name: -(-shape[0] // num_ranks) for name, shape in shapes.items()}
    if flags is None or all(bool(flags[name].all()) for name in shapes):
        return sum(most[name] * shape[1:].numel() for name, shape in shapes.items())
    here = (flags[name][number * most[name] : (number + 1) * most[name]] for name in shapes)
    return sum(int(flag.sum()) for flag in here)


def _sent(
    row: Row,
    shapes: Mapping[str, Any],
    flags: Mapping[str, Tensor] | None,
    size: int,
    mesh: Any,
    reduces: bool,
) -> tuple[int, int]:
    num_ranks = row.mesh[-1]
    most = {name: -(-shape[0] // num_ranks) for name, shape in shapes.items()}
    if flags is None or all(bool(flags[name].all()) for name in shapes):
        padded: int = sum(most[name] * shape[1:].numel() for name, shape in shapes.items())
        dense = padded * size * (num_ranks if reduces else 1)
        return dense, dense
    live = [
        sum(int(flags[name][rank * most[name] : (rank + 1) * most[name]].sum()) for name in shapes)
        for rank in range(num_ranks)
    ]
    cost = 0 if row.surplus else BYTES_OF_A_COLLECTIVE
    handed = handed_over(live, size, mesh.shard_mesh_rank, cost)
    if reduces:
        return size * handed.reduced, size * handed.mean_reduced
    return size * handed.gathered, size * handed.mean_gathered
