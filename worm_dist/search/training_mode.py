"""Training mode: parts of a network that run only while it trains, such as auxiliary heads.

Channels that only these read are channels all the same.  So the network is looked at with its own
code in training mode where that makes a difference, its layers in eval mode: no dropout, no
statistics of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .forward import run

__all__ = ["called_modules", "deciding_modules", "in_training"]


def deciding_modules(network: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    """The modules, by name, in training mode of which parts of the network run that otherwise do
    not; none if there are no such parts.

    Args:
        network: not wrapped, in eval mode.
        example_inputs: as for ``forward.run``.
    """
    composed = tuple(
        name for name, module in network.named_modules() if any(True for _ in module.children())
    )
    in_eval = called_modules(network, example_inputs)
    try:
        with in_training(network, composed):
            in_both = called_modules(network, example_inputs)
    except Exception:  # a forward that wants more while it trains, such as targets
        return ()
    return composed if in_both > in_eval else ()


@contextmanager
def in_training(network: nn.Module, modules: Collection[str]) -> Iterator[None]:
    """Within, these modules by themselves are in training mode."""
    changed = [m for m in map(network.get_submodule, modules) if not m.training]
    for module in changed:
        module.training = True
    try:
        yield
    finally:
        for module in changed:
            module.training = False


def called_modules(network: nn.Module, example_inputs: Any) -> set[nn.Module]:
    """The modules that a forward pass calls, in the modes they are in."""
    called: set[nn.Module] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args: called.add(module))
        for module in network.modules()
    ]
    try:
        with torch.no_grad():
            run(network, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called
