"""Operations: how many floating point operations each module of a network takes."""

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
    """Floating point operations of one forward pass; a multiply and an add are two.

    Args:
        network: counted in eval mode; stays as it is.
        sample: a batch of one.

    Returns:
        Those of the network, and those of each module, by name, without what the modules within it
        take.
    """
    network = copy.deepcopy(network)
    for attention in find_attentions(network)[0]:
        # torch's multiply by the layer that reads their heads without calling it; ours call it.
        keep_heads(network, attention.module, attention.num_heads)
    names = {module: name for name, module in network.named_modules()}
    counts = dict.fromkeys(names.values(), 0)
    running: list[str] = []
    counted = 0

    def settle() -> None:
        """What has been counted since the last change belongs to the innermost module."""
        nonlocal counted
        total = int(counter.get_total_flops())
        if running:
            counts[running[-1]] += total - counted
        counted = total

    def begin(module: nn.Module, args: object) -> None:
        settle()
        running.append(names[module])

    def end(module: nn.Module, args: object, output: object) -> None:
        settle()
        running.pop()

    # torch counts fused attention on some devices only; this way it is matrix products on all.
    plainly = sdpa_kernel(SDPBackend.MATH)
    with undisturbed(network), plainly, FlopCounterMode(display=False) as counter:
        for module in names:
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end)
        network(sample)
    return int(counter.get_total_flops()), counts
