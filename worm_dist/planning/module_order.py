"""Module order: when the modules of a network run, as shares of the FLOPs of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..groups.copying import copied
from ..groups.forward import run, undisturbed

__all__ = ["Event", "innermost", "module_order"]


class Event(NamedTuple):
    """The begin or the end of a call of a module in the forward pass.

    Attributes:
        module: the module's name.
        is_begin: whether the call begins.
        done: share of the FLOPs before, 0 to 1.
    """

    module: str
    is_begin: bool
    done: float


def module_order(network: nn.Module, sample: Tensor, flops: Mapping[str, int]) -> Sequence[Event]:
    """The calls of all modules in a forward pass, nested.

    Args:
        network: the network; a copy of it is run.
        sample: an input with a batch size of one.
        flops: FLOPs of every module without its submodules, by name; those of a module count when
            its first call ends.
    """
    network = copied(network)
    calls: list[tuple[str, bool]] = []

    def noting(name: str, is_begin: bool) -> Callable[..., None]:
        return lambda *_: calls.append((name, is_begin))

    for name, module in network.named_modules():
        module.register_forward_pre_hook(noting(name, True))
        module.register_forward_hook(noting(name, False))
    with torch.no_grad(), undisturbed(network):
        run(network, sample)
    pending, total, done = dict(flops), sum(flops.values()) or 1, 0
    events = []
    for name, is_begin in calls:
        done += 0 if is_begin else pending.pop(name, 0)
        events.append(Event(name, is_begin, done / total))
    return events


def innermost(parameter: str, modules: Collection[str]) -> str:
    """The innermost of these modules, of which one is the network, that has a parameter."""
    name = parameter
    while name not in modules:
        name = name.rpartition(".")[0]
    return name
