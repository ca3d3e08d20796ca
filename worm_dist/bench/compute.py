"""Benchmark of computing alone: a dense and a drawn network, and weight gradients of live filters.

Each rank works on its own; nothing is sent between them but at barriers.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.grad import conv2d_weight
from torch.optim import SGD

from ..groups.flops import count_flops
from ..groups.tracing import find_groups
from ..pruning.surgery import cuts_of, remove_channels, shapes_of
from .network import over_ranks
from .results import Panel, rows
from .step import seconds_of
from .variants import HALF, Batch, Step, Variant, dense, uniform_mask
from .workload import Workload, alternate

__all__ = ["compute"]

_CONVOLUTIONS = ((64, 32), (128, 16), (256, 8), (512, 4))
"""Channels, and height and width of the images, of ResNet-18's 3x3 convolutions."""
_IMAGES = 16
_REPEATS = 9


def compute(workload: Workload) -> Panel:
    """Measure the seconds of a step without a wrapper.  Collective."""
    batch = workload.batch()
    torch.manual_seed(0)
    network = workload.build()
    drawn = copy.deepcopy(network)
    groups = find_groups(drawn, batch[0][:1])
    remove_channels(drawn, cuts_of(groups, uniform_mask(groups, HALF), shapes_of(drawn)))
    compared = {
        "dense": network,
        "dense again": copy.deepcopy(network),
        "half of the channels drawn": drawn,
    }
    steps = {name: _step(each, batch) for name, each in compared.items()}
    variants = [Variant(name, each, lambda: None, None) for name, each in steps.items()]
    seconds = over_ranks(alternate(variants, workload.rounds, seconds_of), dist.ReduceOp.MAX)
    sample = batch[0][:1]
    return Panel(
        key="compute",
        title="Seconds a step, computing alone",
        unit="s",
        rows=rows(variants, seconds),
        setting={"rounds": len(seconds[0])},
        figures={
            "FLOPs of the drawn network, to the dense one": (
                count_flops(drawn, sample) / count_flops(network, sample)
            ),
            **{
                f"weight gradients of half of {channels} filters, to all of them": _sliced(
                    channels, side
                )
                for channels, side in _CONVOLUTIONS
            },
        },
    )


def _step(network: nn.Module, batch: Batch) -> Step:
    return dense(network, SGD(network.parameters(), lr=1e-3, momentum=0.9), batch)


def _sliced(channels: int, side: int) -> float:
    """Time of the weight gradients of half of a convolution's filters, with the selection of the
    outputs' gradients, divided by that of all of them."""
    images = torch.randn(_IMAGES, channels, side, side)
    gradients = torch.randn(_IMAGES, channels, side, side)
    live = torch.arange(0, channels, 2)

    def of_all() -> None:
        conv2d_weight(images, (channels, channels, 3, 3), gradients, padding=1)

    def of_live() -> None:
        selected = gradients.index_select(1, live)
        conv2d_weight(images, (len(live), channels, 3, 3), selected, padding=1)

    def ratio() -> float:
        return _seconds(of_live) / _seconds(of_all)

    ratio()
    ((*ratios,),) = over_ranks([[ratio() for _ in range(_REPEATS)]], dist.ReduceOp.SUM)
    return statistics.median(ratios) / dist.get_world_size()


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
