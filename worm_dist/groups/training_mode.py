"""Training mode: parts of a network that run only in training mode, such as auxiliary heads.

Channels that only these parts read belong to groups too.  So, where it makes a difference, the
network is traced with its composite modules in training mode and its layers in eval mode, without
dropout and batch statistics.
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
    """Return the names of the modules whose training mode makes more of the network run.

    Empty if the training mode makes no difference, or fails on these inputs.

    Args:
        network: the unwrapped network, in eval mode.
        example_inputs: inputs as for ``forward.run``.
        may_lack: whether to accept that other parts run in eval mode only.
    """
    composed = tuple(
        name for name, module in network.named_modules() if any(True for _ in module.children())
    )
    in_eval = called_modules(network, example_inputs)
    try:
        with in_training(network, composed):
            in_both = called_modules(network, example_inputs)
    except Exception:  # such as a forward that needs targets in training mode
        return ()
    return composed if in_both > in_eval or (may_lack and in_both - in_eval) else ()


@contextmanager
def in_training(network: nn.Module, modules: Collection[str]) -> Iterator[None]:
    """Put these modules, without their children, in training mode within the context."""
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
    """Put these norms in training mode with momentum one within the context, so that their running
    statistics are those of this rank's newest batch.

    Modes and momenta are restored afterwards, statistics are not.  SyncBatchNorm normalises without
    collectives within, since ranks may run different numbers of batches and a forward pass may fail
    on one of them.
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
    """Return the modules that a forward pass calls, in their current modes."""
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
