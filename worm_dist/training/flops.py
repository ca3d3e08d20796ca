"""Counts the floating point operations (FLOPs) of a network and of each of its modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..groups.attention import find_attentions
from ..groups.forward import undisturbed
from ..pruning.attention_heads import keep_heads

__all__ = ["count_flops", "count_flops_by_module"]


def count_flops(network: nn.Module, sample: Tensor) -> int:
    """Count the FLOPs of one forward pass; a multiply and an add count as two.

    Args:
        network: the network, run in eval mode.
        sample: an input with a batch size of one.
    """
    with _counter(network) as counter:
        network(sample)
    return int(counter.get_total_flops())


def count_flops_by_module(network: nn.Module, sample: Tensor) -> dict[str, int]:
    """Count the FLOPs of each module by its name, without those of its submodules.

    Args:
        network: the network; a copy of it is run.
        sample: an input with a batch size of one.
    """
    network = copy.deepcopy(network)
    for attention in find_attentions(network)[0]:
        # torch's attention uses its output projection's weight without calling the module; our
        # replacement calls it, so that its hooks run.
        keep_heads(network, attention.module, attention.num_heads)
    names = {module: name for name, module in network.named_modules()}
    counts = dict.fromkeys(names.values(), 0)
    running: list[str] = []
    counted = 0

    def attribute() -> None:
        """Attribute the FLOPs since the last call to the innermost running module."""
        nonlocal counted
        total = int(counter.get_total_flops())
        if running:
            counts[running[-1]] += total - counted
        counted = total

    def begin(module: nn.Module, args: object) -> None:
        attribute()
        running.append(names[module])

    def end(module: nn.Module, args: object, output: object) -> None:
        attribute()
        running.pop()

    with _counter(network) as counter:
        for module in names:
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end)
        network(sample)
    return counts


@contextmanager
def _counter(network: nn.Module) -> Iterator[FlopCounterMode]:
    # The counter sees neither torch's fast path for transformers nor, on some devices, fused
    # attention; matrix products it sees on all.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), undisturbed(network), sdpa_kernel(SDPBackend.MATH), counter:
        yield counter
