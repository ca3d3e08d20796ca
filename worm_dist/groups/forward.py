"""Forward: look at a network by running it on example inputs, and leave it as it was."""

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
    """One forward pass on one input, a tuple of inputs, or a dict of keyword inputs; they stay as
    they are, even if the network writes to what it is given."""
    inputs = mapped(example_inputs, lambda tensor: tensor.detach().clone())
    if isinstance(inputs, Mapping):
        return network(**inputs)
    if isinstance(inputs, (tuple, list)):
        return network(*inputs)
    return network(inputs)


def floats(output: Any) -> Iterator[Tensor]:
    """The floating point tensors in what a network takes or puts out, however nested."""
    return (each for each in tensors_in(output) if each.is_floating_point() and each.numel())


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Within, the network is in eval mode; afterwards its modes, what trains, and the random states
    (torch's, Python's, numpy's) are what they were, also after an error.  Hooks that a network
    installs when it first runs stay, since it believes in them.

    torch's fast path for transformers is off within: where inputs are padded it puts out zeros, the
    plain path does not, and a network that has lost heads takes the plain one.
    """
    modules_random, numpys_random = random.getstate(), numpy.random.get_state()
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
        random.setstate(modules_random)
        numpy.random.set_state(numpys_random)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training
        for parameter, trained in trains.items():
            parameter.requires_grad_(trained)


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Within, forward passes may write to statistics, queues and the like; afterwards all buffers
    are the same tensors with the same values, also after an error."""
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
            module._buffers[name] = buffer  # a pass may have put another in its place
            if not buffer.is_inference():  # what was made in inference mode nobody can write to
                with torch.no_grad():
                    buffer.copy_(value)
