"""Training mode: parts of a network that run only while it trains, such as auxiliary heads.

Channels that only these read are channels all the same.  So the network is looked at with its own
code in training mode where that makes a difference, its layers in eval mode: no dropout, no
statistics of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .forward import run

__all__ = ["called_modules", "deciding_modules", "in_training", "norms_in_training"]

_Norm = nn.modules.batchnorm._BatchNorm


def deciding_modules(
    network: nn.Module, example_inputs: Any, may_lack: bool = False
) -> tuple[str, ...]:
    """The modules, by name, in training mode of which parts of the network run that otherwise do
    not; none if there are no such parts.

    Args:
        network: not wrapped, in eval mode.
        example_inputs: as for ``forward.run``.
        may_lack: whether other parts may run in eval mode only, so that neither mode shows all.
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
    return composed if in_both > in_eval or (may_lack and in_both - in_eval) else ()


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


@contextmanager
def norms_in_training(norms: Sequence[_Norm]) -> Iterator[None]:
    """Within, these norms are in training mode, and their running statistics those of this rank's
    newest batch; afterwards modes and momenta are what they were, statistics are not.

    A SyncBatchNorm issues collectives in training mode.  Ranks have run different numbers of
    batches, and a forward pass may fail on one of them, so within it normalises by itself.
    """
    modes = {norm: (norm.training, norm.momentum) for norm in norms}
    synced = [norm for norm in norms if isinstance(norm, nn.SyncBatchNorm)]
    forwards = {norm: vars(norm).get("forward") for norm in synced}
    try:
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        for norm in synced:
            vars(norm)["forward"] = partial(_Norm.forward, norm)
        yield
    finally:
        for norm, (training, momentum) in modes.items():
            norm.training, norm.momentum = training, momentum
        for norm, forward in forwards.items():
            del vars(norm)["forward"]
            if forward is not None:
                vars(norm)["forward"] = forward


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
