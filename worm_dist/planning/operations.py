"""Operations: how many floating point operations each module of a network takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..search.forward import undisturbed

__all__ = ["count_operations"]


@torch.no_grad()
def count_operations(network: nn.Module, sample: Tensor) -> tuple[int, dict[str, int]]:
    """Floating point operations of one forward pass; a multiply and an add are two.

    Args:
        network: counted in eval mode; stays as it is.
        sample: a batch of one.

    Returns:
        Those of the network, and those of each module that has parameters of its own, without what
        such modules within it take.
    """
    names = {
        module: name
        for name, module in network.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
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

    handles = []
    with undisturbed(network), FlopCounterMode(display=False) as counter:
        for module in names:
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end))
        try:
            network(sample)
        finally:
            for handle in handles:
                handle.remove()
    return int(counter.get_total_flops()), counts
