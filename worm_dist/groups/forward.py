"""Forward passes on example inputs that leave the network's state unchanged."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .nested import mapped, tensors_in

__all__ = ["buffers_kept", "floats", "run", "undisturbed"]


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
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Put the network in eval mode; afterwards restore its modes, ``requires_grad`` flags and the
    random states of torch, Python and numpy, also after an error.

    Hooks that a network installs on its first run stay, since the network relies on them.  torch's
    fast path for transformers is off within: it outputs zeros for padded inputs, unlike the plain
    path, which a network with removed heads takes.
    """
    python_rng, numpy_rng = random.getstate(), numpy.random.get_state()
    modes = {module: module.training for module in network.modules()}
    trains = {parameter: parameter.requires_grad for parameter in network.parameters()}
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    network.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_rng)
        numpy.random.set_state(numpy_rng)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training
        for parameter, trained in trains.items():
            parameter.requires_grad_(trained)


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
