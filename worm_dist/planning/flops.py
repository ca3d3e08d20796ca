"""Counts the floating point operations (FLOPs) of each module of a network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..groups.attention import find_attentions
from ..groups.forward import undisturbed
from ..pruning.attention_heads import keep_heads

__all__ = ["count_operations"]


@torch.no_grad()
def count_operations(network: nn.Module, sample: Tensor) -> tuple[int, dict[str, int]]:
    """Count the FLOPs of one forward pass; a multiply and an add count as two.

    Args:
        network: the network, run in eval mode and not changed.
        sample: an input with a batch size of one.

    Returns:
        The FLOPs of the network, and those of each module by name, without its submodules' FLOPs.
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

    # The counter supports fused attention on some devices only; matrix products work on all.
    unfused = sdpa_kernel(SDPBackend.MATH)
    with undisturbed(network), unfused, FlopCounterMode(display=False) as counter:
        for module in names:
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end)
        network(sample)
    return int(counter.get_total_flops()), counts
