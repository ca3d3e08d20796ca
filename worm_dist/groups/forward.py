"""Forward passes on example inputs, in eval or training mode, that leave the network unchanged.

Some parts of a network run only in training mode, such as auxiliary heads, and channels that only
these parts read belong to groups too.  So, where it makes a difference, the network is traced with
its composite modules in training mode and its layers in eval mode, without dropout and batch
statistics.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .nested import mapped, tensors_in

__all__ = [
    "buffers_kept",
    "called_modules",
    "floats",
    "in_eval",
    "in_training",
    "norms_in_training",
    "run",
    "undisturbed",
]

_Norm = nn.modules.batchnorm._BatchNorm


def run(network: nn.Module, example_inputs: Any) -> Any:
    """Run one forward pass on copies of the inputs, since a network may modify its inputs.

    Args:
        network: the network to run.
        example_inputs: one input, a tuple of inputs, or a dict of keyword inputs.
    """
    inputs = mapped(example_inputs, lambda tensor: tensor.detach().clone())
    if isinstance(inputs, Mapping):
        return network(**inputs)
    if isinstance(inputs, (tuple, list)):
        return network(*inputs)
    return network(inputs)


def floats(output: Any) -> Iterator[Tensor]:
    """Iterate over the non-empty floating point tensors in nested inputs or outputs."""
    return (each for each in tensors_in(output) if each.is_floating_point() and each.numel())


@contextmanager
def in_eval(network: nn.Module) -> Iterator[None]:
    """Put the network in eval mode within the context; afterwards every module has its own mode."""
    with _modes_kept(network):
        network.eval()
        yield


@contextmanager
def in_training(network: nn.Module, modules: Collection[str]) -> Iterator[None]:
    """Put these modules, without their children, in training mode within the context."""
    with _modes_kept(network):
        for module in map(network.get_submodule, modules):
            module.training = True
        yield


@contextmanager
def _modes_kept(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Put the network in eval mode; afterwards restore its modes, ``requires_grad`` flags and the
    random states of torch, Python and numpy, also after an error.

    Hooks that a network installs on its first run stay, since the network relies on them.  torch's
    fast path for transformers is off within: it outputs zeros for padded inputs, unlike the plain
    path, which a network with removed heads takes.  Modules compiled in place run uncompiled:
    compiled code leaves out hooks that are registered after it was made.
    """
    python_rng, numpy_rng = random.getstate(), numpy.random.get_state()
    trains = {parameter: parameter.requires_grad for parameter in network.parameters()}
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with in_eval(network), torch.random.fork_rng(devices=devices), _uncompiled(network):
            yield
    finally:
        random.setstate(python_rng)
        numpy.random.set_state(numpy_rng)
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter, trained in trains.items():
            parameter.requires_grad_(trained)


def _uncompiled(network: nn.Module) -> AbstractContextManager[None]:
    if any(module._compiled_call_impl is not None for module in network.modules()):
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Restore all buffers afterwards to the same tensors with the same values, also after an error.

    Forward passes within may write to statistics, queues and other buffers.
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer  # a pass may have replaced it
            if not buffer.is_inference():  # inference tensors cannot be written to
                with torch.no_grad():
                    buffer.copy_(value)


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
