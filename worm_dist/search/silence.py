"""Silence: whether a channel whose scales and shifts are zero can still be heard.

Behind a sigmoid, or where a branch without a norm is added, it can; to remove it would change what
the network computes.  Rather than to know every operation, half of all channels are silenced, then
the other half, and the consumers say what reaches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .groups import ChannelGroup, Member
from .undisturbed import undisturbed

__all__ = ["loud_groups", "run"]


def run(network: nn.Module, example_inputs: Any) -> Any:
    """One forward pass on one input, a tuple of inputs, or a dict of keyword inputs."""
    if isinstance(example_inputs, Mapping):
        return network(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return network(*example_inputs)
    return network(example_inputs)


@torch.no_grad()
def loud_groups(
    network: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any
) -> dict[ChannelGroup, str]:
    """The groups that must stay dense, each with the reason.

    While one half of a group is silent the other is not, so that what the network makes of its
    live channels would be heard in the wrong place too.
    """
    loud: dict[ChannelGroup, str] = {}
    for half in (0, 1):
        with undisturbed(network), _silenced(network, groups, half), ExitStack() as listening:
            for group in groups:
                for member in group.consumers:
                    listener = _listener(group, member, half, loud)
                    module = network.get_submodule(member.module)
                    listening.callback(module.register_forward_pre_hook(listener).remove)
            run(network, example_inputs)
    return loud


def _listener(
    group: ChannelGroup, member: Member, half: int, loud: dict[ChannelGroup, str]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def listen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        dim = -1 if isinstance(module, nn.Linear) else 1
        places = member.positions[half::2].flatten().to(inputs[0].device)
        if bool(inputs[0].index_select(dim, places).any()):
            loud[group] = (
                f"with its scale and shift at zero, {member.module} still gets something of it"
            )

    return listen


@contextmanager
def _silenced(network: nn.Module, groups: Sequence[ChannelGroup], half: int) -> Iterator[None]:
    """Every other channel has scale and shift zero, the others one."""
    parameters = dict(network.named_parameters())
    saved: dict[nn.Parameter, Tensor] = {}
    for group in groups:
        for norm in group.norms:
            places = norm.positions[half::2].flatten()
            for name, _ in norm.parameters:
                parameter = parameters[name]
                if parameter not in saved:
                    saved[parameter] = parameter.detach().clone()
                    parameter.fill_(1)
                parameter[places.to(parameter.device)] = 0
    try:
        yield
    finally:
        for parameter, value in saved.items():
            parameter.copy_(value)
